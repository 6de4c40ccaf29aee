"""Stage 2: train a task's Prompt4RE head on frozen embeddings; all training sets as one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import KFold
from torch import Tensor

from topt_deploy.config.settings import Config, TaskConfig
from topt_deploy.errors import BadData
from topt_deploy.model.layers import drawn
from topt_deploy.model.prompt4re import PromptBasis, ridge
from topt_deploy.model.row_tiles import held_on, one_tile
from topt_deploy.model.topt import EnsembleHead, TaskHead

from .loop import Workplace
from .target_scale import chosen_powers

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class HeadResult:
    """The result of S training sets.

    Attributes:
        head: The head of the last training set, in evaluation mode.
        predicted: float64 (S, N): counts, every region as each training set's head predicts it, at the last epoch.
        weights: What the parts of an ensemble weigh in the head, by name; they add up to 1.
        without: As ``predicted``, with one part left out and the others' weights scaled up, by the part's name.
    """

    head: TaskHead | EnsembleHead
    predicted: Array
    weights: Mapping[str, float] = field(default_factory=dict)
    without: Mapping[str, Array] = field(default_factory=dict)


LARGEST_SHARE = 0.75
"""Whole cities are held out in turns, unless one of them has more than this share of the labels."""


def by_city(labels: Array, part: Array | None) -> bool:
    """True if there are several cities with labels, so that whole ones can be held out (:data:`LARGEST_SHARE`).

    Args:
        labels: float64 (N,), NaN where unknown.
        part: int64 (N,), the number of the city that each region is of; None for one city.
    """
    if part is None:
        return False
    known = np.bincount(part[~np.isnan(labels)])
    return bool((known > 0).sum() > 1 and known.max() <= LARGEST_SHARE * known.sum())


def blocks_of(part: Array | None) -> list[slice]:
    """The rows of every city, in the order of their numbers; none for one city. A city's rows stand together."""
    if part is None:
        return []
    ends = np.cumsum(np.bincount(part)).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def fold_of(labels: Array, *, folds: int, seed: int, drop_zeros: bool, part: Array | None = None) -> Array:
    """The fold each labelled region is held out in; -1 for regions that take no part. (N,)

    KFold(folds, shuffle=True, random_state=seed) over the labelled regions in canonical order; with fewer regions
    than folds, every region is a fold. Where :func:`by_city` holds, a fold is a whole city.
    """
    taking_part = ~np.isnan(labels) & ((labels > 0) | (not drop_zeros))
    regions = np.flatnonzero(taking_part)
    if len(regions) < 3:
        raise BadData("too few labelled regions to train on", expected="at least 3", found=len(regions))
    fold = np.full(len(labels), -1)
    if part is not None and by_city(np.where(taking_part, labels, np.nan), part):
        fold[regions] = np.unique(part[regions], return_inverse=True)[1]
        return fold
    split = KFold(min(folds, len(regions)), shuffle=True, random_state=seed).split(regions)
    for number, (_, held_out) in enumerate(split):
        fold[regions[held_out]] = number
    return fold


def training_sets(labels: Array, fold: Array) -> Array:
    """Rows of labels: every fold's training set, then all of them. Float64 (K + 1, N), NaN where not to be seen.

    Args:
        labels: float64 (N,).
        fold: :func:`fold_of`.
    """
    folds = np.arange(int(fold.max()) + 1)[:, None]
    seen = np.concatenate([(fold >= 0) & (fold != folds), (fold >= 0)[None]])
    return np.where(seen, labels, np.nan)


def one_label(labels: Array) -> Array:
    """Each region's label from rows of training sets (S, N), wherever a row has it; 0 for none. Float64 (N,)."""
    return np.nan_to_num(np.fmax.reduce(labels, axis=0))


def train_head(
    embedding: Tensor,
    features: Tensor,
    prompts: Tensor | None,
    labels: Array,
    config: Config,
    task: str,
    place: Workplace,
    *,
    part: Array | None = None,
) -> HeadResult:
    """Train the head of ``task``.

    Every choice is fixed before training, and nothing of one row reaches another's weights, target scale or number
    of epochs. The prompt basis and the embedding see all regions and no labels.

    Args:
        embedding: E (N, D), frozen.
        features: All views side by side (N, F).
        prompts: (N, H), or None without Prompt4RE.
        labels: float64 (S, N), a training set per row; NaN where unknown or held out.
        part: int64 (N,), the number of the city that each region is of; None for one city.
    """
    place.engine.seed(config.seed, f"prompt4re/{task}")
    settings = config.tasks[task].prompt4re
    basis = None if prompts is None else PromptBasis.fit(prompts.cpu(), settings.components).to(features.device)
    coordinates = None if basis is None else basis(prompts)
    model, outputs = fit_head(embedding, features, coordinates, labels, config, task, place, part=part)
    with torch.no_grad():
        predicted = model.target.counts(outputs)  # (M, N)
    by_row = predicted.double().cpu().numpy().reshape(len(labels), settings.members, -1).mean(axis=1)
    final = TaskHead(
        members=settings.members,
        features=features.shape[1],
        rank=0 if basis is None else basis.basis.shape[1],
        settings=config.tasks[task],
        prompt_width=0 if basis is None else basis.basis.shape[0],
    )
    state = model.state_dict() if basis is None else model.state_dict() | basis.state_dict(prefix="basis.")
    final.load_state_dict(last_members(state, settings.members))
    return HeadResult(head=final.eval(), predicted=by_row)


def last_members(state: Mapping[str, Tensor], members: int) -> dict[str, Tensor]:
    """A head's weights with the last members alone: they have the members in front, and the rest is shared by all."""
    return {
        name: tensor[-members:] if name.startswith(("head.", "target.")) else tensor for name, tensor in state.items()
    }


def fit_head(
    embedding: Tensor | None,
    features: Tensor,
    coordinates: Tensor | None,
    labels: Array,
    config: Config,
    task: str,
    place: Workplace,
    *,
    part: Array | None = None,
    powers: Tensor | None = None,
) -> tuple[TaskHead, Tensor]:
    """Train the heads of all training sets as one batch.

    Args:
        embedding: E (N, D), frozen; None without SREL.
        features: All views side by side (N, F).
        coordinates: (N, R), the prompts in their basis; None without Prompt4RE.
        labels: float64 (S, N), a training set per row.
        part: As in :func:`train_head`. Attention stays inside a city.
        powers: (S, 1), of the target's scale ``auto`` where it has been chosen (:func:`.target_scale.chosen_powers`).

    Returns:
        The heads, and what they say of every region on the standardised target scale (S · members, N).
    """
    settings = config.tasks[task].prompt4re
    stage, device = f"prompt4re/{task}", place.engine.device
    start = _start_from_ridge(embedding, features, coordinates, labels, config.tasks[task], device, powers)
    model, seen = start.model, start.seen
    attends = coordinates is not None and settings.alignment
    cities = [torch.arange(len(seen), device=device)[own] for own in blocks_of(part) or [slice(None)]]
    most = settings.regions if attends and settings.regions else len(seen)

    def outputs(cities: Sequence[Tensor]) -> Tensor:
        if coordinates is None or not attends:
            whole: Tensor = model.head(seen, coordinates)
            return whole
        return torch.cat([model.head(seen[own], coordinates[own]) for own in cities], dim=1)

    def loss() -> dict[str, Tensor]:
        parts = [drawn(own, most) for own in cities]  # whether a region has a label makes no difference
        some = torch.cat(parts)
        terms = {"fit": model.target.loss(outputs(parts), start.counts[some], start.weights[:, some]).sum()}
        if start.penalty is not None:
            terms["ridge"] = (start.penalty * model.head.linear.weight[..., 0].square().sum(dim=1)).sum()
        return terms

    with held_on(device):
        place.fit(
            model,
            loss,
            settings,
            stage=stage,
            config=config,
            depends_on=config.tasks[task],
            capturable=not attends or (one_tile(labels.shape[1]) and all(len(own) <= most for own in cities)),
        )
    model.eval()
    with torch.no_grad(), held_on(device):
        return model, outputs(cities)


@dataclass(frozen=True, kw_only=True, eq=False)
class _RidgeStart:
    """Heads that start from their ridge fits, and what they are trained on.

    Attributes:
        model: The heads of all training sets, M = S · members.
        seen: What they see of every region (N, I), which depends on no trained weight.
        counts: float64 (N,), anything where no head has the label.
        weights: (M, N) ∈ {0, 1}, the regions that each is trained on.
        penalty: The ridge's, over the number of labels (M,); None without.
    """

    model: TaskHead
    seen: Tensor
    counts: Tensor
    weights: Tensor
    penalty: Tensor | None


@torch.no_grad()
def _start_from_ridge(
    embedding: Tensor | None,
    features: Tensor,
    coordinates: Tensor | None,
    labels: Array,
    task: TaskConfig,
    device: torch.device,
    powers: Tensor | None,
) -> _RidgeStart:
    """The arguments are those of :func:`fit_head`."""
    settings, known = task.prompt4re, ~np.isnan(labels)
    weights = torch.tensor(known.repeat(settings.members, axis=0)).float().to(device)
    counts = torch.tensor(one_label(labels)).to(device)
    rank = 0 if coordinates is None else coordinates.shape[1]
    model = TaskHead(members=len(weights), features=features.shape[1], rank=rank, settings=task).to(device)
    if model.skip is not None:
        model.skip.fit(model.joined(embedding, features, coordinates))
    seen = model.see(embedding, features, coordinates)
    if powers is None:
        powers = chosen_powers(seen, counts, torch.tensor(known, device=device), task.target)
    if powers is not None:
        powers = powers.repeat_interleave(settings.members, dim=0)
    fitted = ridge(seen, model.target.fit(counts, weights, powers), weights, settings.ridge_alpha)
    model.head.start_from_ridge(fitted, prompts_from_zero=settings.ridge_penalty)
    penalty = (fitted.alphas / weights.sum(dim=1)).float() if settings.ridge_penalty else None
    return _RidgeStart(model=model, seen=seen, counts=counts, weights=weights, penalty=penalty)
