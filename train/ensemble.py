"""Train a task's ensemble head (topt_deploy.model.topt.EnsembleHead); all training sets as one batch."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topt_deploy.config import Config
from topt_deploy.features import all_widths
from topt_deploy.model.kernel import KernelHead, maximise_evidence
from topt_deploy.model.network import Network
from topt_deploy.model.prompt4re import PromptBasis
from topt_deploy.model.target import Target
from topt_deploy.model.topt import EnsembleHead
from topt_deploy.table import Schema

from .fit import Workplace
from .stage2 import HeadResult, one_label

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
        inputs: :func:`topt_deploy.features.features` as tensors on the engine's device.
        prompts: (N, H), or None without prompts.
        labels: float64 (S, N), a training set per row; NaN where unknown or held out.
    """
    settings = config.tasks[task].ensemble
    stage, device = f"ensemble/{task}", place.engine.device
    place.engine.seed(config.seed, stage)
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
    parts = []
    if head.kernel is not None:
        seed = zlib.crc32(f"{config.seed}/{stage}".encode())
        parts += _fit_kernel(head.kernel, views, scaled, known, seed=seed)
    if head.network is not None:
        x = head.side_by_side(views)
        head.network.standardize.fit(x)
        network = Network(members=len(labels) * settings.members, inputs=x.shape[1], config=settings).to(device)
        network.standardize = head.network.standardize
        weights = (known / known.sum(dim=1, keepdim=True)).repeat_interleave(settings.members, dim=0)
        aims = scaled.float().repeat_interleave(settings.members, dim=0)
        place.fit(
            network,
            lambda: {"fit": ((network(x) - aims).square() * weights).sum()},
            settings,
            stage=stage,
            config=config,
            depends_on=config.tasks[task],
        )
        with torch.no_grad():
            parts.append(network.eval()(x).double().unflatten(0, (len(labels), settings.members)).mean(dim=1))
        last = {name: t[-settings.members :] for name, t in network.state_dict().items() if "standardize" not in name}
        head.network.load_state_dict(head.network.state_dict() | last)
    with torch.no_grad():
        predicted = target.counts(torch.stack(parts).mean(dim=0)).cpu().numpy()
    head.target.mean.copy_(target.mean[-1:])
    head.target.scale.copy_(target.scale[-1:])
    return HeadResult(head=head.cpu().eval(), predicted=predicted)


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
