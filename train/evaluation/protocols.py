"""Protocols: how held-out predictions come about, and what their figures mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topt_deploy.features import POSITION

from ..metrics import Metrics, metrics
from .problem import Method, Problem
from .splits import FOLDS, Splits, honest, spatial

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Held-out predictions of one method for one task.

    Attributes:
        labels: float64 (N,).
        fold: int64 (R, N); -1 for regions that take no part.
        prediction: float64 (R, N); NaN for regions that take no part.
    """

    labels: Array
    fold: Array
    prediction: Array

    def truth(self) -> Array:
        """The labels of the regions that take part, float64 (N,); NaN for the others."""
        return np.where((self.fold >= 0).all(axis=0), self.labels, np.nan)

    def metrics(self) -> list[Metrics]:
        """Over all regions' held-out predictions, for every repetition (R)."""
        return [metrics(self.truth(), prediction) for prediction in self.prediction]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol.

    Attributes:
        meaning: What was held out from what, for the head of a table.
        predict: (method, problem, task, labels (N,), seeds (R)) → held-out predictions.
    """

    meaning: str
    predict: Callable[[Method, Problem, str, Array, Sequence[int]], HeldOut]


def fit_and_hold_out(method: Method, problem: Problem, task: str, splits: Splits) -> HeldOut:
    """Give a method every training set of the splits, and keep what it says of the regions held out of each."""
    predictions = method.predict(problem, task, splits.training_labels(), splits.row_seeds())
    return HeldOut(labels=splits.labels, fold=splits.fold, prediction=splits.held_out(predictions))


def _honest(method: Method, problem: Problem, task: str, labels: Array, seeds: Sequence[int]) -> HeldOut:
    return fit_and_hold_out(method, problem, task, honest(labels, seeds=seeds))


def _spatial(method: Method, problem: Problem, task: str, labels: Array, seeds: Sequence[int]) -> HeldOut:
    position = problem.inputs[POSITION].cpu().numpy()
    return fit_and_hold_out(method, problem, task, spatial(labels, position, seeds=seeds))


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
}
