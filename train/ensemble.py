"""Train a task's ensemble head (topt_deploy.model.topt.EnsembleHead); all training sets as one batch."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topt_deploy.config.settings import Config
from topt_deploy.data.city import Schema
from topt_deploy.data.features import all_widths
from topt_deploy.model.gaussian_process import KernelHead, maximise_evidence
from topt_deploy.model.prompt4re import PromptBasis
from topt_deploy.model.residual_mlp import Network
from topt_deploy.model.target import Target
from topt_deploy.model.topt import EnsembleHead

from .loop import Workplace
from .prompt4re import HeadResult, one_label

Array = np.ndarray[Any, Any]


def train_ensemble(
    inputs: Mapping[str, Tensor],
    schema: Schema,
    prompts: Tensor | None,
    labels: Array,
    config: Config,
    task: str,
    place: Workplace,
) -> HeadResult:
    """Train the ensemble head of ``task``.

    Nothing of one row reaches another's weights or target scale. Statistics of the features, the prompt basis and
    the random frequencies are the same for all rows, and see no label.

    Args:
        inputs: :func:`topt_deploy.data.features.features` as tensors on the engine's device.
        prompts: (N, H), or None without prompts.
        labels: float64 (S, N), a training set per row; NaN where unknown or held out.
    """
    (result,) = train_ensembles(inputs, schema, prompts, [labels], [config], task, place)
    return result


def train_ensembles(
    inputs: Mapping[str, Tensor],
    schema: Schema,
    prompts: Tensor | None,
    labels: Sequence[Array],
    configs: Sequence[Config],
    task: str,
    place: Workplace,
) -> list[HeadResult]:
    """:func:`train_ensemble` of several seeds, whose networks are trained as one batch.

    Every seed's results are those that it would have alone, but for how sums are rounded. Several are trained without
    checkpoints, and not compiled: TorchInductor knows no generators of one's own.

    Args:
        labels: Of every seed.
        configs: The same for every seed, but for the seed.
    """
    settings, stage, device = configs[0].tasks[task].ensemble, f"ensemble/{task}", place.engine.device
    begun: list[_Begun] = []
    for rows, config in zip(labels, configs, strict=True):
        place.engine.seed(config.seed, stage)
        begun.append(_begin(inputs, schema, prompts, rows, config, task, stage, device))
    if settings.network:
        _train_networks(begun, configs[0], task, stage, place)
    return [one.result() for one in begun]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Begun:
    """One seed's head, before its networks are trained.

    Attributes:
        head: The head, with its Gaussian processes.
        target: The target scale of every row.
        scaled: Labels on it (S, N).
        known: bool (S, N).
        parts: The prediction of each regression so far, (S, N) each, on the target scale.
        x: The input of the networks (N, F).
        network: Every row's networks, and the state of the random numbers from which they draw.
    """

    head: EnsembleHead
    target: Target
    scaled: Tensor
    known: Tensor
    parts: list[Tensor]
    x: Tensor
    network: Network | None
    random: torch.Generator

    def result(self) -> HeadResult:
        """Of all regressions."""
        with torch.no_grad():
            predicted = self.target.counts(torch.stack(self.parts).mean(dim=0)).cpu().numpy()
        self.head.target.mean.copy_(self.target.mean[-1:])
        self.head.target.scale.copy_(self.target.scale[-1:])
        return HeadResult(head=self.head.cpu().eval(), predicted=predicted)


def _begin(
    inputs: Mapping[str, Tensor],
    schema: Schema,
    prompts: Tensor | None,
    labels: Array,
    config: Config,
    task: str,
    stage: str,
    device: torch.device,
) -> _Begun:
    settings = config.tasks[task].ensemble
    basis = None if prompts is None else PromptBasis.fit(prompts.cpu(), config.tasks[task].prompt4re.components)
    head = EnsembleHead(
        widths=all_widths(schema),
        prompt_width=0 if basis is None else basis.basis.shape[0],
        rank=0 if basis is None else basis.basis.shape[1],
        settings=config.tasks[task],
    )
    if basis is not None:
        head.basis = basis
    head.to(device)
    target = Target(members=len(labels), config=config.tasks[task].target).to(device)
    known = torch.tensor(~np.isnan(labels), device=device)
    with torch.no_grad():
        views = head.views(inputs, prompts)
        scaled = target.fit(torch.tensor(one_label(labels), device=device), known.float())  # (S, N)
        x = head.side_by_side(views)
    parts = []
    if head.kernel is not None:
        seed = zlib.crc32(f"{config.seed}/{stage}".encode())
        parts += _fit_kernel(head.kernel, views, scaled, known, seed=seed)
    network = None
    if head.network is not None:
        head.network.standardize.fit(x)
        network = Network(members=len(labels) * settings.members, inputs=x.shape[1], config=settings).to(device)
        network.standardize = head.network.standardize
    return _Begun(
        head=head, target=target, scaled=scaled, known=known, parts=parts, x=x, network=network,
        random=random_here(device),
    )  # fmt: skip


def random_here(device: torch.device) -> torch.Generator:
    """A generator that goes on as PyTorch's own would from here."""
    generator = torch.Generator(device)
    generator.set_state(torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state())
    return generator


def _train_networks(begun: Sequence[_Begun], config: Config, task: str, stage: str, place: Workplace) -> None:
    """Train all networks; their predictions become a part of every head, and the last row's networks the head's own."""
    settings, x = config.tasks[task].ensemble, begun[0].x  # no label is in what networks see: it is every seed's
    networks = [one.network for one in begun if one.network is not None]
    generators: list[torch.Generator] = []
    network = networks[0]
    if len(begun) > 1:
        network = Network.joined(networks, settings).to(place.engine.device)
        generators = [one.random for one in begun]
        network.draw_from(generators, [one.members for one in networks])
        engine = replace(place.engine, compile=False)
        place = replace(place, engine=engine, checkpoints=None)
    known = torch.cat([one.known for one in begun])
    weights = (known / known.sum(dim=1, keepdim=True)).repeat_interleave(settings.members, dim=0)
    aims = torch.cat([one.scaled for one in begun]).float().repeat_interleave(settings.members, dim=0)
    place.fit(
        network,
        lambda: {"fit": ((network(x) - aims).square() * weights).sum()},
        settings,
        stage=stage,
        config=config,
        depends_on=config.tasks[task],
        generators=generators,
    )
    with torch.no_grad():
        everything = network.eval()(x).double()  # (ΣS · members, N)
    state, stop = network.state_dict(), 0
    for one in begun:
        start, stop = stop, stop + len(one.known) * settings.members
        one.parts.append(everything[start:stop].unflatten(0, (len(one.known), settings.members)).mean(dim=1))
        last = {name: t[stop - settings.members : stop] for name, t in state.items() if "standardize" not in name}
        assert one.head.network is not None
        one.head.network.load_state_dict(one.head.network.state_dict() | last)


@torch.no_grad()
def _fit_kernel(
    head: KernelHead, views: Mapping[str, Tensor], scaled: Tensor, known: Tensor, *, seed: int
) -> list[Tensor]:
    """Give the head the last row's mean coefficients; return each regression's predictions of every row, (S, N)."""
    head.fit_features({name: view.cpu() for name, view in views.items()}, seed)
    features = head.features(views)
    blocks = features.split(head.sizes, dim=1)
    predicted = []
    head.coefficients.zero_()
    places = torch.arange(features.shape[1]).split(head.sizes)
    for kernels in head.nested():
        seen = torch.cat([blocks[q] for q in kernels], dim=1)
        with torch.enable_grad():
            fitted = maximise_evidence(seen, [head.sizes[q] for q in kernels], scaled, known, steps=head.steps)
        head.coefficients[torch.cat([places[q] for q in kernels])] += fitted.coefficients[-1].float() / len(
            head.lengths
        )
        predicted.append(fitted.coefficients @ seen.double().T)
    return predicted
