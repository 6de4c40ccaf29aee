"""The published protocol, which selects on the very labels it reports on: for comparison with published tables only.

Both stages keep the epoch whose predictions of *held-out* regions are closest to their labels (HAFusion's and ToPT's
published code). What comes out is therefore no estimate of anything that a city will see. This is the one module that
gives a held-out label to what it evaluates; nothing that trains a model to be deployed may import it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from torch import Tensor

from topt_deploy.config.settings import Config, TaskConfig
from topt_deploy.data.features import POSITION, feature_widths
from topt_deploy.errors import BadData
from topt_deploy.model.checkpoint import load_tensors, save_tensors
from topt_deploy.model.prompt4re import Prompt4Re, PromptBasis, ridge
from topt_deploy.model.row_tiles import one_tile
from topt_deploy.model.srel import Srel
from topt_deploy.model.target import Target
from topt_deploy.storage.os_errors import write_error

from ..loop import Workplace, fit
from ..prompt4re import fold_of
from ..srel import embed, train_embedding
from .problem import Problem
from .splits import HeldOut

Array = np.ndarray[Any, Any]

PRESET = "paper"
EMBEDDING_FOLDS = 25
EMBEDDING_EVERY = 30
"""HAFusion's published code looks at the embedding after epochs 1, 31, 61 …"""
PREDICTION_EVERY = 20
"""ToPT's published code looks at the test fold after epochs 1, 21, 41 …"""
MEANING = (
    "The published protocol, for comparison with published tables only. KFold(10, shuffle, seed 2024). Both the"
    " embedding's epoch and, per fold, the head's epoch are those that predict the held-out labels best, with dropout"
    " active in the head: these figures do not hold for regions whose labels are unknown. Repetitions differ in"
    " initialisation only."
)


def hold_out(
    problem: Problem, task: str, labels: Array, settings: TaskConfig, *, seeds: Sequence[int], cache: Path
) -> HeldOut:
    """Predictions of every region by the fold that did not train on it, at the epoch that suits its label best.

    Regions that take no part (an unknown label; a zero where ``target.drop_zeros``) are in stage 1, which needs no
    label, and nowhere else. Negative predictions become 0.

    Args:
        labels: float64 (N,), NaN where unknown. All of them are seen.
        settings: Such as :func:`paper_settings` gives; what the paper's form lacks (``skip``, ``members``, the
            ensemble) is not read.
        seeds: One per repetition, of the initialisation; the folds are the same in all.
        cache: Folder that selected embeddings are kept in, and found by variants and runs with the same stage 1.

    Raises:
        BadData: If the city lacks the prompts that the settings read.
    """
    column = settings.prompt_column(task)
    if column is not None and column not in problem.inputs:
        raise BadData(
            "the city has no such prompt vectors",
            column=column,
            expected=f"prompt vectors in {column!r}",
            found=", ".join(problem.schema.prompts) or "none",
            fix="import the city with them, or leave this variant out",
        )
    head = settings.prompt4re
    fold = fold_of(labels, folds=head.folds, seed=head.fold_seed, drop_zeros=settings.target.drop_zeros)
    predictions = []
    for seed in seeds:
        embedding = selected_embedding(problem, task, labels, settings, seed=seed, cache=cache)
        if column is None:  # the regression on the embedding, which Prompt4RE would start from
            predictions.append(ridge_predictions(embedding, labels, fold, alpha=head.ridge_alpha))
        else:
            prompts = problem.inputs[column]
            predictions.append(selected_predictions(problem, task, embedding, prompts, labels, fold, settings, seed))
    return HeldOut(labels=labels, fold=np.stack([fold] * len(seeds)), prediction=np.stack(predictions))


def ridge_predictions(embedding: Tensor, labels: Array, fold: Array, *, alpha: float) -> Array:
    """Held-out predictions of a ridge regression on the embedding, never negative.

    Args:
        embedding: E (N, D).
        labels: float64 (N,).
        fold: int64 (N,), -1 for regions that take no part.

    Returns:
        float64 (N,); NaN for regions that take no part.
    """
    part = fold >= 0
    predicted = np.full(len(labels), np.nan)
    x = embedding.cpu().numpy()[part].astype(np.float64)
    predicted[part] = cross_val_predict(Ridge(alpha=alpha), x, labels[part], cv=PredefinedSplit(fold[part]))
    return np.maximum(predicted, 0)


def selected_embedding(
    problem: Problem, task: str, labels: Array, settings: TaskConfig, *, seed: int, cache: Path
) -> Tensor:
    """The embedding E (N, D) of the stage-1 epoch from which a ridge predicts held-out labels best.

    The highest R² over concatenated folds, KFold(25), is the lowest sum of squared errors.
    """
    file = cache / f"srel-{task}-{_identity(problem, labels, settings, seed)}.safetensors"
    if file.exists():
        return load_tensors(file)[0]["embedding"].to(problem.engine.device)
    head = settings.prompt4re
    fold = fold_of(labels, folds=EMBEDDING_FOLDS, seed=head.fold_seed, drop_zeros=settings.target.drop_zeros)
    best: dict[str, Any] = {"squared_error": np.inf}

    def consider(epoch: int, srel: Srel) -> None:
        if (epoch - 1) % EMBEDDING_EVERY:
            return
        embedding = embed(srel, problem.inputs)
        predicted = ridge_predictions(embedding, labels, fold, alpha=head.ridge_alpha)
        error = float(np.nansum(np.square(predicted - labels)))
        if error < best["squared_error"]:
            best.update(squared_error=error, epoch=epoch, embedding=embedding)

    train_embedding(
        problem.city,
        problem.inputs,
        problem.schema,
        Config(tasks={task: settings}, seed=seed),
        task,
        Workplace(engine=problem.engine, reporter=problem.reporter),
        observe=consider,
    )
    embedding: Tensor = best.pop("embedding")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(cache, error) from error
    save_tensors(file, {"embedding": embedding}, best)
    return embedding


def _identity(problem: Problem, labels: Array, settings: TaskConfig, seed: int) -> str:
    """Hash of all that a selected embedding depends on."""
    head, flows = settings.prompt4re, problem.city.flows
    facts = (settings.srel, settings.target.drop_zeros, head.ridge_alpha, head.fold_seed, seed, problem.engine)
    digest = hashlib.sha256(f"{facts}{EMBEDDING_FOLDS}{EMBEDDING_EVERY}{torch.__version__}".encode())
    arrays = [problem.inputs[name].cpu().numpy() for name in (*feature_widths(problem.schema), POSITION)]
    arrays += [] if flows is None else [flows.origin, flows.dest, flows.target]
    for array in (*arrays, labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:20]


def selected_predictions(
    problem: Problem,
    task: str,
    embedding: Tensor,
    prompts: Tensor,
    labels: Array,
    fold: Array,
    settings: TaskConfig,
    seed: int,
) -> Array:
    """Held-out predictions of Prompt4RE, each fold's from the epoch after which they fit its labels best.

    The folds train side by side. Within a fold the highest R² is the lowest sum of squared errors, which a fold of
    one region has too. Dropout is active when the held-out regions are predicted, as published.

    Args:
        embedding: E (N, D), frozen.
        prompts: (N, H).
        labels: float64 (N,).
        fold: int64 (N,), -1 for regions that take no part: the attention does not see them either.

    Returns:
        float64 (N,); NaN for regions that take no part.
    """
    stage, device = f"prompt4re/{task}", problem.engine.device
    part = torch.tensor(fold >= 0, device=device)
    own = torch.tensor(fold[fold >= 0], device=device)  # n regions take part, in K folds
    counts = torch.tensor(labels[fold >= 0], device=device)
    held_out = own == torch.arange(int(own.max()) + 1, device=device)[:, None]  # (K, n)
    training_regions = (~held_out).float()

    problem.engine.seed(seed, stage)
    basis = PromptBasis.fit(prompts[part].cpu(), settings.prompt4re.components).to(device)
    seen, coordinates = embedding[part], basis(prompts[part])
    width, members = seen.shape[1], len(held_out)
    rank = coordinates.shape[1]
    head = Prompt4Re(members=members, inputs=width, width=width, rank=rank, config=settings.prompt4re).to(device)
    target = Target(members=members, config=settings.target).to(device)
    start = ridge(seen, target.fit(counts, training_regions), training_regions, settings.prompt4re.ridge_alpha)
    head.start_from_ridge(start, prompts_from_zero=False)
    best = torch.full((members,), torch.inf, dtype=torch.float64, device=device)
    kept = torch.zeros(members, len(own), dtype=torch.float64, device=device)

    @torch.no_grad()
    def observe(epoch: int) -> None:
        if (epoch - 1) % PREDICTION_EVERY == 0:
            predicted = target.counts(head(seen, coordinates)).double()
            error = (held_out * (predicted - counts).square()).sum(dim=1)
            better = error < best
            best[better], kept[better] = error[better], predicted[better]

    fit(
        head,
        lambda: {"fit": target.loss(head(seen, coordinates), counts, training_regions).sum()},
        settings.prompt4re,
        stage=stage,
        identity="",
        engine=problem.engine,
        reporter=problem.reporter,
        observe=observe,
        capturable=one_tile(len(own)),
    )
    predicted = np.full(len(labels), np.nan)
    predicted[fold >= 0] = kept[own, torch.arange(len(own), device=device)].cpu().numpy()
    return predicted
