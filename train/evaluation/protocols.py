"""Protocols: how held-out predictions come about, and what their figures mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.data.features import POSITION
from topt_deploy.errors import UsageError

from . import published_protocol
from .literature.embedding import EmbeddingMethod
from .plain_baselines import Mean, Plain
from .problem import Method, Problem
from .splits import FOLDS, HeldOut, Splits, honest, spatial, transfer
from .topt_variants import Topt

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol.

    Attributes:
        meaning: The held-out labels, described for the head of a table.
        predict: (method, problem, task, labels (N,), seeds (R), folder for what may be kept) → held-out predictions.
    """

    meaning: str
    predict: Callable[[Method, Problem, str, Array, Sequence[int], Path], HeldOut]


def fit_and_hold_out(method: Method, problem: Problem, task: str, splits: Splits) -> HeldOut:
    """Give a method every training set of the splits, and keep what it says of the regions held out of each."""
    predictions = method.predict(problem, task, splits.training_labels(), splits.row_seeds())
    return HeldOut(labels=splits.labels, fold=splits.fold, prediction=splits.held_out(predictions))


def _honest(method: Method, problem: Problem, task: str, labels: Array, seeds: Sequence[int], _: Path) -> HeldOut:
    return fit_and_hold_out(method, problem, task, honest(labels, seeds=seeds))


def _spatial(method: Method, problem: Problem, task: str, labels: Array, seeds: Sequence[int], _: Path) -> HeldOut:
    position = problem.inputs[POSITION].cpu().numpy()
    return fit_and_hold_out(method, problem, task, spatial(labels, position, seeds=seeds))


def _transfer(
    method: Method, problem: Problem, task: str, labels: Array, seeds: Sequence[int], _: Path, *, few: int = 0
) -> HeldOut:
    if not isinstance(method, Topt | Plain | Mean):
        raise UsageError(
            "this method embeds the regions of one city by its flows, and says nothing of another city",
            fix="leave it out: --baselines plain",
        )
    return fit_and_hold_out(method, problem, task, transfer(labels, problem.city.part, seeds=seeds, few=few))


def transfer_with(labels: int) -> Protocol:
    """The protocol ``transfer`` with so many labels of the held-out city."""
    return replace(PROTOCOLS["transfer"], predict=partial(_transfer, few=labels))


def _paper(method: Method, problem: Problem, task: str, labels: Array, seeds: Sequence[int], kept: Path) -> HeldOut:
    if isinstance(method, EmbeddingMethod):
        settings = Topt(published_protocol.PRESET).config(task, seeds[0]).tasks[task]
        return published_protocol.hold_out_literature(problem, task, method, labels, settings, seeds=seeds)
    if not isinstance(method, Topt) or method.preset != published_protocol.PRESET:
        raise UsageError(
            "the published protocol selects epochs of the paper's own models and of the literature's embeddings",
            expected="--variants 'paper*' --baselines literature",
            fix="evaluate other methods under honest or spatial",
        )
    settings = method.config(task, seeds[0]).tasks[task]
    return published_protocol.hold_out(problem, task, labels, settings, seeds=seeds, cache=kept / "embeddings")


PROTOCOLS: Mapping[str, Protocol] = {
    "honest": Protocol(
        meaning=f"Every labelled region is predicted by a fit that has not seen its label: KFold({FOLDS}, shuffled),"
        " repeated with each seed. Every choice is fixed beforehand or made inside the training folds; nothing is"
        " selected on a held-out label. Features of all regions are seen, labels are not (transductive).",
        predict=_honest,
    ),
    "spatial": Protocol(
        meaning=f"As `honest`, but whole areas are held out: up to {FOLDS} spatial blocks (k-means on the regions'"
        " positions), drawn anew with each seed. Expect this where no label is near.",
        predict=_spatial,
    ),
    "transfer": Protocol(
        meaning="Whole cities are held out: each city is predicted by a model that was trained on the others, and has"
        " seen nothing of it, neither labels nor features. With --labels, so many labelled regions of the city joined"
        " the training, with its features; all figures leave them out.",
        predict=_transfer,
    ),
    "paper": Protocol(meaning=published_protocol.MEANING, predict=_paper),
}
