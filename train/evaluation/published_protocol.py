"""The published protocol, which selects on the very labels it reports on: for comparison with published tables only.

Both stages keep the epoch whose predictions of *held-out* regions are closest to their labels (HAFusion's and ToPT's
published code). What comes out is therefore no estimate of anything that a city will see. This is the one module that
gives a held-out label to what it evaluates; nothing that trains a model to be deployed may import it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from topt_deploy.config.settings import Config, SrelConfig, TaskConfig
from topt_deploy.data.features import MOBILITY, POSITION, feature_widths
from topt_deploy.errors import BadData
from topt_deploy.model.checkpoint import load_tensors, save_tensors
from topt_deploy.model.prompt4re import Prompt4Re, PromptBasis, ridge
from topt_deploy.model.row_tiles import Matrix, one_tile
from topt_deploy.model.srel import Srel
from topt_deploy.model.target import Target
from topt_deploy.storage.os_errors import writing

from ..loop import Workplace, fit
from ..prompt4re import fold_of, training_sets
from ..srel import embed, embed_with_dropout, train_embedding, without_trace
from .literature.embedding import EmbeddingMethod, TrainingRecipe
from .literature.graphs import od_matrix
from .problem import Problem
from .splits import HeldOut

Array = np.ndarray[Any, Any]

PRESET = "paper"
EMBEDDING_FOLDS = 25
LOOK_EVERY = 10
"""Epochs between the looks at the embedding that are kept."""
EMBEDDING_EVERY = 30
"""HAFusion's published code looks at the embedding after epochs 1, 31, 61 …"""
PREDICTION_EVERY = 20
"""ToPT's published code looks at the test fold after epochs 1, 21, 41 …"""
_looks: WeakKeyDictionary[Problem, dict[tuple[str, TrainingRecipe, int], Tensor]] = WeakKeyDictionary()
"""Of the literature's methods: one training per method's name, recipe and seed, whatever the task."""
MEANING = (
    "The published protocol, for comparison with published tables only. KFold(10, shuffle, seed 2024). Both the"
    " embedding's epoch and, per fold, the head's epoch are those that predict the held-out labels best, with dropout"
    " active in the embedding and in the head (training mode, as published): these figures do not hold for regions"
    " whose labels are unknown. Repetitions differ in initialisation only. Of the literature the embedding's epoch is"
    " chosen so, and nothing else."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Looks:
    """The embeddings that stage 1 offers of one seed, without any label: after epochs 1, 11, 21 …, L of them.

    Attributes:
        embeddings: float32 (L, N, D), in training mode: dropout is active.
        last: float32 (N, D), after the last epoch, in evaluation mode.
    """

    embeddings: Tensor
    last: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadPredictions:
    """Held-out predictions of one head's folds, float64 (N,) each; NaN for regions that take no part.

    Attributes:
        selected: Each fold's at the look that fits its labels best, with dropout active.
        last: After the last epoch, without dropout.
    """

    selected: Array
    last: Array


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
        cache: Folder that embeddings are kept in, and found by tasks, variants and runs with the same stage 1.

    Raises:
        BadData: If the city lacks the prompts that the settings read.
    """
    check_prompts(problem, task, settings)
    fold = published_folds(labels, settings)
    predictions = []
    for seed in seeds:
        offered = looks(problem, settings.srel, seed=seed, cache=cache)
        embedding = selected_embedding(offered, labels, settings)
        predictions.append(predict_folds(problem, task, embedding, labels, fold, settings, seed).selected)
    return HeldOut(labels=labels, fold=np.stack([fold] * len(seeds)), prediction=np.stack(predictions))


def hold_out_literature(
    problem: Problem, task: str, method: EmbeddingMethod, labels: Array, settings: TaskConfig, *, seeds: Sequence[int]
) -> HeldOut:
    """As :func:`hold_out`, of a method of the literature: the embedding's epoch is chosen by the held-out labels, as in
    the authors' code, and its own regression predicts each fold from the others, with nothing more selected.

    Args:
        settings: The paper's for this task: folds, regions that take no part, and the ridge that chooses the epoch.
    """
    fold = published_folds(labels, settings)
    training = training_sets(labels, fold)[:-1]
    predictions = []
    for seed in seeds:
        offered = _literature_looks(problem, method, seed)
        chosen = offered[best_look(offered, labels, settings)]
        by_fold = method.counts(problem, task, chosen, training, seed)  # (K, N)
        predictions.append(np.where(fold >= 0, by_fold[fold, np.arange(len(fold))], np.nan))
    return HeldOut(labels=labels, fold=np.stack([fold] * len(seeds)), prediction=np.stack(predictions))


def _literature_looks(problem: Problem, method: EmbeddingMethod, seed: int) -> Tensor:
    """No label is seen, so that all tasks share them."""
    trained, key = _looks.setdefault(problem, {}), (method.name, method.recipe, seed)
    if key not in trained:
        trained[key] = method.looks(problem, seed, every=LOOK_EVERY)
    return trained[key]


def check_prompts(problem: Problem, task: str, settings: TaskConfig) -> None:
    """Raise BadData if the city lacks the prompts that the settings read."""
    column = settings.prompt_column(task)
    if column is not None and column not in problem.inputs:
        raise BadData(
            "the city has no such prompt vectors",
            column=column,
            expected=f"prompt vectors in {column!r}",
            found=", ".join(problem.schema.prompts) or "none",
            fix="import the city with them, or leave this variant out",
        )


def published_folds(labels: Array, settings: TaskConfig) -> Array:
    """The fold of every region, int64 (N,): the same in all repetitions; -1 for regions that take no part."""
    head = settings.prompt4re
    return fold_of(labels, folds=head.folds, seed=head.fold_seed, drop_zeros=settings.target.drop_zeros)


def predict_folds(
    problem: Problem, task: str, embedding: Tensor, labels: Array, fold: Array, settings: TaskConfig, seed: int
) -> HeadPredictions:
    """Held-out predictions from an embedding (N, D): of Prompt4RE, or of the ridge that it would start from where it is
    left out, which has no epochs."""
    column = settings.prompt_column(task)
    if column is None:
        alone = ridge_predictions(embedding, labels, fold, alpha=settings.prompt4re.ridge_alpha)
        return HeadPredictions(selected=alone, last=alone)
    return head_predictions(problem, task, embedding, problem.inputs[column], labels, fold, settings, seed)


def ridge_predictions(embedding: Tensor, labels: Array, fold: Array, *, alpha: float) -> Array:
    """Held-out predictions of a ridge regression on the embedding, never negative.

    One regression on all regions gives those of every fold exactly: with its hat matrix H and residuals r, the
    residuals of a fold F that was held out are (I − H_FF)⁻¹ r_F.

    Args:
        embedding: E (N, D).
        labels: float64 (N,).
        fold: int64 (N,), -1 for regions that take no part.

    Returns:
        float64 (N,); NaN for regions that take no part.
    """
    part = np.flatnonzero(fold >= 0)
    x, y = embedding.cpu().numpy()[part].astype(np.float64), labels[part]
    x = x - x.mean(axis=0)
    gram = x @ x.T
    hat = np.linalg.solve(gram + alpha * np.eye(len(y)), gram) + 1 / len(y)
    residual = y - hat @ y
    predicted = np.full(len(labels), np.nan)
    for k in range(int(fold.max()) + 1):
        own = np.flatnonzero(fold[part] == k)
        predicted[part[own]] = y[own] - np.linalg.solve(np.eye(len(own)) - hat[np.ix_(own, own)], residual[own])
    return np.maximum(predicted, 0)


def selected_embedding(offered: Looks, labels: Array, settings: TaskConfig, *, every: int = EMBEDDING_EVERY) -> Tensor:
    """The embedding E (N, D), among the looks that are so many epochs apart, from which a ridge predicts held-out
    labels best.

    The highest R² over concatenated folds, KFold(25), is the lowest sum of squared errors.
    """
    return offered.embeddings[best_look(offered.embeddings, labels, settings, every=every)]


def best_look(offered: Tensor, labels: Array, settings: TaskConfig, *, every: int = EMBEDDING_EVERY) -> int:
    """The number of the look, of those that are :data:`LOOK_EVERY` epochs apart (L, N, D), that
    :func:`selected_embedding` takes."""
    head, step = settings.prompt4re, every // LOOK_EVERY
    fold = fold_of(labels, folds=EMBEDDING_FOLDS, seed=head.fold_seed, drop_zeros=settings.target.drop_zeros)
    predicted = [ridge_predictions(embedding, labels, fold, alpha=head.ridge_alpha) for embedding in offered[::step]]
    return step * int(np.argmin([np.nansum(np.square(own - labels)) for own in predicted]))


def looks(problem: Problem, srel: SrelConfig, *, seed: int, cache: Path) -> Looks:
    """Train stage 1, and keep what the published code looks at. No label is seen, so that all tasks share it."""
    inputs = _inputs(problem, srel)
    file = cache / f"srel-{_identity(problem, inputs, srel, seed)}.safetensors"
    if file.exists():
        kept = {name: tensor.to(problem.engine.device) for name, tensor in load_tensors(file)[0].items()}
        return Looks(embeddings=kept["embeddings"], last=kept["last"])
    seen: list[Tensor] = []
    adjacency: list[Matrix] = []

    def look(epoch: int, model: Srel) -> None:
        if not adjacency:
            adjacency.append(model.adjacency(inputs[POSITION]))
        if (epoch - 1) % LOOK_EVERY == 0:
            seen.append(embed_with_dropout(model, inputs, adjacency[0]))

    model = train_embedding(
        problem.city,
        inputs,
        problem.schema,
        Config(tasks={PRESET: TaskConfig(srel=srel)}, seed=seed),
        PRESET,
        Workplace(engine=problem.engine, reporter=problem.reporter),
        rows=srel.inputs == "rows",
        observe=look,
    )
    offered = Looks(embeddings=torch.stack(seen), last=embed(model, inputs))
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    save_tensors(file, {"embeddings": offered.embeddings, "last": offered.last}, {})
    return offered


def _inputs(problem: Problem, srel: SrelConfig) -> Mapping[str, Tensor]:
    """The inputs of stage 1 in the form that the settings ask for."""
    if srel.inputs == "context":
        return problem.inputs
    city, device = problem.city, problem.engine.device
    raw = dict(city.views)
    if city.flows is not None:
        raw[MOBILITY] = od_matrix(city.flows, len(city))
    tensors = {name: torch.tensor(array, dtype=torch.float32, device=device) for name, array in raw.items()}
    return tensors | {POSITION: problem.inputs[POSITION]}


def _identity(problem: Problem, inputs: Mapping[str, Tensor], srel: SrelConfig, seed: int) -> str:
    """Hash of all that stage 1's looks depend on."""
    flows = problem.city.flows
    digest = hashlib.sha256(f"{(srel, seed, problem.engine)}{LOOK_EVERY}{torch.__version__}".encode())
    arrays = [inputs[name].cpu().numpy() for name in (*feature_widths(problem.schema), POSITION)]
    arrays += [] if flows is None else [flows.origin, flows.dest, flows.target]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:20]


def head_predictions(
    problem: Problem,
    task: str,
    embedding: Tensor,
    prompts: Tensor,
    labels: Array,
    fold: Array,
    settings: TaskConfig,
    seed: int,
) -> HeadPredictions:
    """Held-out predictions of Prompt4RE: each fold's from the epoch after which they fit its labels best.

    The folds train side by side. Within a fold the highest R² is the lowest sum of squared errors, which a fold of
    one region has too. Dropout is active when the held-out regions are predicted, as published; training goes on as
    if they had not been.

    Args:
        embedding: E (N, D), frozen.
        prompts: (N, H).
        labels: float64 (N,).
        fold: int64 (N,), -1 for regions that take no part: the attention does not see them either.
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
            with without_trace(device):
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
    with torch.no_grad():
        last = target.counts(head.eval()(seen, coordinates)).double()

    def whole(by_fold: Tensor) -> Array:
        predicted = np.full(len(labels), np.nan)
        predicted[fold >= 0] = by_fold[own, torch.arange(len(own), device=device)].cpu().numpy()
        return predicted

    return HeadPredictions(selected=whole(kept), last=whole(last))
