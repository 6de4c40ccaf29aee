"""Train a task's ensemble head (topt_deploy.model.topt.EnsembleHead); all training sets as one batch.

Every training set is split once more, into inner folds. What a part predicts of the inner folds that it did not train
on says what it weighs in that training set's head (:mod:`.stacking`): no label that is held out of the training set has
a part in it.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topt_deploy.config.settings import Config, EnsembleConfig
from topt_deploy.data.city import Schema
from topt_deploy.data.features import all_widths, feature_widths
from topt_deploy.freed_memory import keep_freed_memory
from topt_deploy.model.gaussian_process import PROMPT, RADIAL, KernelHead, maximise_evidence
from topt_deploy.model.layers import Standardize, repeated
from topt_deploy.model.leverage import Leverage
from topt_deploy.model.prompt4re import PromptBasis
from topt_deploy.model.residual_mlp import ResidualMlp
from topt_deploy.model.target import Target
from topt_deploy.model.topt import TREES, EnsembleHead, all_features

from .extra_trees import fit_trees
from .loop import Workplace
from .prompt4re import HeadResult, fit_head, last_members, one_label
from .stacking import FoldRows, stack, with_inner
from .target_scale import chosen_powers

Array = np.ndarray[Any, Any]


def train_ensemble(
    inputs: Mapping[str, Tensor],
    schema: Schema,
    prompts: Tensor | None,
    labels: Array,
    config: Config,
    task: str,
    place: Workplace,
    *,
    embedding: Tensor | None = None,
    rows: int = 1,
    part: Array | None = None,
) -> HeadResult:
    """Train the ensemble head of ``task``.

    Nothing of one row reaches another's weights or target scale. Statistics of the features, the prompt basis and
    the random frequencies are the same for all rows, and see no label.

    Args:
        inputs: :func:`topt_deploy.data.features.features` as tensors on the engine's device.
        prompts: (N, H), or None without prompts.
        labels: float64 (S, N), a training set per row; NaN where unknown or held out.
        embedding: E (N, D), frozen; None where the settings have no SREL.
        rows: How many of the training sets, the last ones, the head holds the fits of.
        part: int64 (N,), the number of the city that each region is of, in order; None for one city.
    """
    embeddings = None if embedding is None else [embedding]
    (result,) = train_ensembles(
        inputs, schema, prompts, [labels], [config], task, place, embeddings=embeddings, rows=rows, part=part
    )
    return result


def train_ensembles(
    inputs: Mapping[str, Tensor],
    schema: Schema,
    prompts: Tensor | None,
    labels: Sequence[Array],
    configs: Sequence[Config],
    task: str,
    place: Workplace,
    *,
    embeddings: Sequence[Tensor] | None = None,
    rows: int = 1,
    part: Array | None = None,
) -> list[HeadResult]:
    """:func:`train_ensemble` of several seeds, whose networks are trained as one batch.

    Every seed's results are those that it would have alone, but for how sums are rounded. Several are trained without
    checkpoints, and not compiled: TorchInductor knows no generators of one's own.

    Args:
        labels: Of every seed.
        configs: The same for every seed, but for the seed.
        embeddings: Of every seed; None where the settings have no SREL.
        rows, part: As in :func:`train_ensemble`.
    """
    settings, stage, device = configs[0].tasks[task].ensemble, f"ensemble/{task}", place.engine.device
    begun: list[_Begun] = []
    keep_freed_memory()
    for own, config in zip(labels, configs, strict=True):
        place.engine.seed(config.seed, stage)
        split = with_inner(own, folds=settings.inner_folds, seed=config.seed, part=part)
        begun.append(_begin(inputs, schema, prompts, split, config, task, stage, device, rows))
    if settings.network:
        _train_networks(begun, configs[0], task, stage, place)
    if settings.topt:
        features, alone = all_features(inputs, schema), len(begun) == 1
        for i, (one, config) in enumerate(zip(begun, configs, strict=True)):
            embedding = None if embeddings is None else embeddings[i]
            there = place if alone else replace(place, checkpoints=None)
            place.engine.seed(config.seed, f"prompt4re/{task}")
            one.add_topt(embedding, features, config, task, there, part)
    return [one.result() for one in begun]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Begun:
    """One seed's head, before its networks are trained.

    Attributes:
        head: The head, with its Gaussian processes.
        rows: The training sets, and their inner folds': S rows in all.
        target: The target scale of every row.
        scaled: Labels on it (S, N).
        known: bool (S, N).
        parts: The prediction of each regression so far, (S, N) each, on the target scale.
        x: The input of the networks (N, F).
        coordinates: The prompts in their basis (N, R); None without.
        trust: How far each training set trusts each region (outer, N); None without radial kernels.
        network: Every row's networks, and the state of the random numbers from which they draw.
    """

    head: EnsembleHead
    rows: FoldRows
    target: Target
    scaled: Tensor
    known: Tensor
    parts: list[Tensor]
    x: Tensor
    coordinates: Tensor | None
    trust: Tensor | None
    network: ResidualMlp | None
    random: torch.Generator

    @property
    def kept(self) -> slice:
        """The rows that the head holds the fits of."""
        return self.rows.kept(self.head.rows)

    def add_topt(
        self,
        embedding: Tensor | None,
        features: Tensor,
        config: Config,
        task: str,
        place: Workplace,
        part: Array | None,
    ) -> None:
        """Train Prompt4RE on the embedding, as one more part."""
        labels = self.rows.labels
        model, outputs = fit_head(  # on the scale of the other parts, for they add up
            embedding, features, self.coordinates, labels, config, task, place, part=part, powers=self.target.power
        )
        members = config.tasks[task].prompt4re.members
        self.parts.append(outputs.double().unflatten(0, (-1, members)).mean(dim=1))
        outer = {
            name: tensor[: self.rows.outer * members] if name.startswith(("head.", "target.")) else tensor
            for name, tensor in model.state_dict().items()
        }
        assert self.head.topt is not None
        self.head.topt.load_state_dict(last_members(outer, self.head.rows * members))

    @torch.no_grad()
    def result(self) -> HeadResult:
        """Of all regressions: what they weigh, and what they say together."""
        names = self.head.regressions()
        everything = {name: self.target.bounded(part) for name, part in zip(names, self.parts, strict=True)}
        bounded = torch.stack([everything[name] for name in self.head.parts()])  # (P, S, N)
        outer = self.rows.outer
        named = self.head.parts()
        earned = [name == TREES for name in named]
        weights = stack(bounded.cpu().numpy(), self.scaled.cpu().numpy(), self.rows, earned=earned)  # (outer, P)

        def counts(shares: Array) -> Array:
            combined = torch.zeros_like(bounded[0])
            combined[:outer] = torch.einsum("sp,psn->sn", torch.tensor(shares).to(bounded), bounded[:, :outer])
            if self.trust is not None:
                combined[:outer] = self.trust * combined[:outer] + (1 - self.trust) * everything[RADIAL][:outer]
            return self.target.counts(combined)[:outer].cpu().numpy()

        without = {}
        for p, name in enumerate(named if len(named) > 1 else []):
            left = np.arange(len(named)) != p
            others = np.where(left, weights, 0.0)
            others = np.where(others.any(axis=1, keepdims=True), others, left)  # only trees left, which earned nothing
            without[name] = counts(others / others.sum(axis=1, keepdims=True))
        for name, tensor in self.target.state_dict().items():
            self.head.target.state_dict()[name].copy_(tensor[self.kept])
        self.head.weights.copy_(torch.tensor(weights)[self.kept])
        shares = dict(zip(named, weights[-1].tolist(), strict=True))
        return HeadResult(head=self.head.cpu().eval(), predicted=counts(weights), weights=shares, without=without)


def _begin(
    inputs: Mapping[str, Tensor],
    schema: Schema,
    prompts: Tensor | None,
    split: FoldRows,
    config: Config,
    task: str,
    stage: str,
    device: torch.device,
    rows: int,
) -> _Begun:
    labels = split.labels
    whole = config.tasks[task].with_labels(int((~np.isnan(labels[: split.outer])).sum(axis=1).min()))
    settings = whole.ensemble
    basis = None if prompts is None else PromptBasis.fit(prompts.cpu(), whole.prompt4re.components)
    head = EnsembleHead(
        widths=all_widths(schema),
        features=sum(feature_widths(schema).values()),
        prompt_width=0 if basis is None else basis.basis.shape[0],
        rank=0 if basis is None else basis.basis.shape[1],
        settings=whole,
        rows=rows,
    )
    if basis is not None:
        head.basis = basis
    head.to(device)
    target = Target(members=len(labels), config=whole.target).to(device)
    known = torch.tensor(~np.isnan(labels), device=device)
    with torch.no_grad():
        views = head.views(inputs, prompts)
        x = head.side_by_side(views)
        standardize = Standardize(x.shape[1], settings.clip).to(device)
        standardize.fit(x)
        counts = torch.tensor(one_label(labels), device=device)
        powers = chosen_powers(standardize(x), counts, known[: split.outer], target.config)
        if powers is not None:  # an inner fold's rows have the scale of their training set
            powers = powers[split.parents]
        scaled = target.fit(counts, known.float(), powers)  # (S, N)
    parts = []
    if head.kernel is not None:
        seed = zlib.crc32(f"{config.seed}/{stage}".encode())
        parts += _fit_kernel(head.kernel, views, scaled, known, split, rows, seed=seed)
    trust = None
    if settings.radial:
        own = (Leverage.fit(all_widths(schema), inputs, row) for row in known[: split.outer])
        trust = torch.stack([leverage.to(device).trust(inputs) for leverage in own]).double()
    if head.trees is not None:
        trees_seed = zlib.crc32(f"{config.seed}/{stage}/trees".encode())
        head.trees, predicted = fit_trees(x, scaled, known, settings, seed=trees_seed, kept=split.kept(rows))
        parts.append(predicted)
    network = None
    if head.network is not None:
        network = ResidualMlp(members=sum(_members(split, settings)), inputs=x.shape[1], config=settings).to(device)
        network.standardize = head.network.standardize = standardize
    return _Begun(
        head=head, rows=split, target=target, scaled=scaled, known=known, parts=parts, x=x,
        coordinates=views.get(PROMPT), trust=trust, network=network, random=random_here(device),
    )  # fmt: skip


def _members(rows: FoldRows, settings: EnsembleConfig) -> list[int]:
    """How many networks every row has: one for an inner fold, where only their share of the whole is in question."""
    return [settings.members if row < rows.outer else 1 for row in range(len(rows.parents))]


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
        network = ResidualMlp.joined(networks, settings).to(place.engine.device)
        generators = [one.random for one in begun]
        network.draw_from(generators, [one.members for one in networks])
        engine = replace(place.engine, compile=False)
        place = replace(place, engine=engine, checkpoints=None)
    known = torch.cat([one.known for one in begun])
    counts = [_members(one.rows, settings) for one in begun]
    each = [count for own in counts for count in own]
    weights = repeated(known / known.sum(dim=1, keepdim=True), each, dim=0)
    aims = repeated(torch.cat([one.scaled for one in begun]).float(), each, dim=0)
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
        everything = network.eval()(x).double()  # (Σ members, N)
    state, stop = network.state_dict(), 0
    for one, own in zip(begun, counts, strict=True):
        start, stop = stop, stop + sum(own)
        one.parts.append(torch.stack([part.mean(dim=0) for part in everything[start:stop].split(own)]))
        first, end = start + one.kept.start * settings.members, start + one.rows.outer * settings.members
        last = {name: t[first:end] for name, t in state.items() if "standardize" not in name}
        assert one.head.network is not None
        one.head.network.load_state_dict(one.head.network.state_dict() | last)


@torch.no_grad()
def _fit_kernel(
    head: KernelHead,
    views: Mapping[str, Tensor],
    scaled: Tensor,
    known: Tensor,
    split: FoldRows,
    rows: int,
    *,
    seed: int,
) -> list[Tensor]:
    """Give the head the last training sets' coefficients; return each regression's predictions of every row, (S, N).

    The rows of inner folds take the kernels' weights from their training set's own fit, which saw no more labels.
    """
    head.fit_features({name: view.cpu() for name, view in views.items()}, seed)
    features = head.features(views)
    blocks = features.split(head.sizes, dim=1)
    predicted = []
    head.coefficients.zero_()
    places = torch.arange(features.shape[1]).split(head.sizes)
    optional = head.local()
    for p, kernels in enumerate(head.regressions().values()):
        seen = torch.cat([blocks[q] for q in kernels], dim=1)
        sizes = [head.sizes[q] for q in kernels]
        local = [i for i, q in enumerate(kernels) if q in optional]
        fitted = maximise_evidence(seen, sizes, scaled, known, steps=head.steps, like=split.parents, local=local)
        kept = fitted.coefficients[split.kept(rows)].float()
        head.coefficients[:, p, torch.cat([places[q] for q in kernels])] = kept
        predicted.append(fitted.coefficients @ seen.double().T)
    return predicted
