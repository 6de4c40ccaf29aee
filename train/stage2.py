"""Stage 2: train a task's Prompt4RE head on frozen embeddings; folds and the final fit as one batch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import KFold
from torch import Tensor

from topt_deploy.config import Config
from topt_deploy.errors import BadData
from topt_deploy.model.prompt4re import PromptBasis, ridge
from topt_deploy.model.topt import TaskHead

from .fit import Engine, fit
from .progress import Reporter

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class HeadResult:
    """A trained head and what it says about the labelled regions.

    Attributes:
        head: The deployed head: the final fit's members.
        held_out: float64 (N,): each labelled region as predicted by the fold that did not train on it, at the last
            epoch; NaN for regions that took no part.
        in_sample: float64 (N,): the deployed head on every region.
        fold: int64 (N,): the fold a region was held out in, -1 for none.
    """

    head: TaskHead
    held_out: Array
    in_sample: Array
    fold: Array


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


def train_head(
    embedding: Tensor,
    features: Tensor,
    prompts: Tensor | None,
    labels: Array,
    config: Config,
    task: str,
    *,
    engine: Engine,
    reporter: Reporter,
    identity: str,
    checkpoint: Path | None = None,
) -> HeadResult:
    """Train the head of ``task``.

    Every choice is fixed before training: no label outside a fold's training regions reaches the fold's weights,
    its target scale or its number of epochs. The prompt basis and the embedding see all regions and no labels.

    Args:
        embedding: E (N, D), frozen.
        features: All views side by side (N, F).
        prompts: (N, H), or None without Prompt4RE.
        labels: float64 (N,), NaN where unknown.
    """
    settings = config.tasks[task].prompt4re
    targets = config.tasks[task].target
    stage = f"prompt4re/{task}"
    fold = fold_of(labels, folds=settings.folds, seed=settings.fold_seed, drop_zeros=targets.drop_zeros)
    folds, repeat = int(fold.max()) + 1, settings.members
    taking_part = fold >= 0
    # Members: every fold, then the final fit, each `repeat` times. (M, N) ∈ {0, 1}
    training_regions = np.stack([taking_part & (fold != k) for k in range(folds)] + [taking_part])
    weights = torch.tensor(training_regions.repeat(repeat, axis=0)).float().to(engine.device)
    counts = torch.tensor(np.where(taking_part, labels, 0.0)).to(engine.device)

    engine.seed(config.seed, stage)
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
    model.to(engine.device)
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

    fit(
        model,
        loss,
        settings,
        stage=stage,
        identity=hashlib.sha256(f"{identity}{config.seed}{config.tasks[task]}".encode()).hexdigest(),
        engine=engine,
        reporter=reporter,
        checkpoint=checkpoint,
        checkpoint_every=config.checkpoint_every,
    )
    model.eval()
    with torch.no_grad():
        predicted = model.target.counts(model.head(seen, coordinates))  # (M, N)
    by_fit = predicted.double().cpu().numpy().reshape(folds + 1, repeat, -1).mean(axis=1)
    held_out = np.where(taking_part, by_fit[fold, np.arange(len(fold))], np.nan)
    final = TaskHead(members=repeat, **sizes)
    # Weights have the members in front, and the final fit's are the last; the rest is shared by all.
    final.load_state_dict(
        {
            name: tensor[-repeat:] if name.startswith(("head.", "target.")) else tensor
            for name, tensor in model.state_dict().items()
        }
    )
    return HeadResult(head=final.eval(), held_out=held_out, in_sample=by_fit[-1], fold=fold)
