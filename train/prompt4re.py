"""Stage 2: train a task's Prompt4RE head on frozen embeddings; all training sets as one batch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import KFold
from torch import Tensor

from topt_deploy.config.settings import Config
from topt_deploy.errors import BadData
from topt_deploy.model.prompt4re import PromptBasis, ridge
from topt_deploy.model.row_tiles import held_on, one_tile
from topt_deploy.model.topt import EnsembleHead, TaskHead

from .loop import Workplace

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class HeadResult:
    """The result of S training sets.

    Attributes:
        head: The head of the last training set, in evaluation mode.
        predicted: float64 (S, N): counts, every region as each training set's head predicts it, at the last epoch.
    """

    head: TaskHead | EnsembleHead
    predicted: Array


def fold_of(labels: Array, *, folds: int, seed: int, drop_zeros: bool) -> Array:
    """The fold each labelled region is held out in; -1 for regions that take no part. (N,)

    KFold(folds, shuffle=True, random_state=seed) over the labelled regions in canonical order; with fewer regions
    than folds, every region is a fold.
    """
    taking_part = ~np.isnan(labels) & ((labels > 0) | (not drop_zeros))
    regions = np.flatnonzero(taking_part)
    if len(regions) < 3:
        raise BadData("too few labelled regions to train on", expected="at least 3", found=len(regions))
    fold = np.full(len(labels), -1)
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
) -> HeadResult:
    """Train the head of ``task``.

    Every choice is fixed before training, and nothing of one row reaches another's weights, target scale or number
    of epochs. The prompt basis and the embedding see all regions and no labels.

    Args:
        embedding: E (N, D), frozen.
        features: All views side by side (N, F).
        prompts: (N, H), or None without Prompt4RE.
        labels: float64 (S, N), a training set per row; NaN where unknown or held out.
    """
    settings = config.tasks[task].prompt4re
    stage, device = f"prompt4re/{task}", place.engine.device
    repeat = settings.members
    known = ~np.isnan(labels)
    weights = torch.tensor(known.repeat(repeat, axis=0)).float().to(device)  # (S · repeat, N) ∈ {0, 1}
    counts = torch.tensor(one_label(labels)).to(device)

    place.engine.seed(config.seed, stage)
    basis = None if prompts is None else PromptBasis.fit(prompts.cpu(), settings.components)
    sizes: dict[str, Any] = {
        "features": features.shape[1],
        "prompt_width": 0 if basis is None else basis.basis.shape[0],
        "rank": 0 if basis is None else basis.basis.shape[1],
        "settings": config.tasks[task],
    }
    model = TaskHead(members=len(weights), **sizes)
    if basis is not None:
        model.basis = basis
    model.to(device)
    with torch.no_grad():  # what depends on no trained weight is computed once
        coordinates = model.coordinates(prompts)
        if model.skip is not None:
            model.skip.fit(model.joined(embedding, features, coordinates))
        seen = model.see(embedding, features, coordinates)
        start = ridge(seen, model.target.fit(counts, weights), weights, settings.ridge_alpha)
        model.head.start_from_ridge(start, prompts_from_zero=settings.ridge_penalty)
    penalty = (start.alphas / weights.sum(dim=1)).float() if settings.ridge_penalty else None  # (M,)

    def loss() -> dict[str, Tensor]:
        terms = {"fit": model.target.loss(model.head(seen, coordinates), counts, weights).sum()}
        if penalty is not None:
            terms["ridge"] = (penalty * model.head.linear.weight[..., 0].square().sum(dim=1)).sum()
        return terms

    with held_on(device):
        place.fit(
            model,
            loss,
            settings,
            stage=stage,
            config=config,
            depends_on=config.tasks[task],
            capturable=basis is None or not settings.alignment or one_tile(labels.shape[1]),
        )
    model.eval()
    with torch.no_grad(), held_on(device):
        predicted = model.target.counts(model.head(seen, coordinates))  # (M, N)
    by_row = predicted.double().cpu().numpy().reshape(len(labels), repeat, -1).mean(axis=1)
    final = TaskHead(members=repeat, **sizes)
    # Weights have the members in front, and the last training set's are the last; the rest is shared by all.
    final.load_state_dict(
        {
            name: tensor[-repeat:] if name.startswith(("head.", "target.")) else tensor
            for name, tensor in model.state_dict().items()
        }
    )
    return HeadResult(head=final.eval(), predicted=by_row)
