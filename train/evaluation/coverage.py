"""The coverage of prediction intervals on regions that had no part in making them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from topt_deploy.data.features import POSITION, all_widths
from topt_deploy.intervals import SizeTrend, cv_plus, fold_scores, interval, nonconformity_scores
from topt_deploy.model.leverage import Leverage

from .problem import Method, Problem
from .splits import HeldOut, Splits, honest, spatial
from .topt_variants import Topt

Array = np.ndarray[Any, Any]

SIZES = ("small", "medium", "large")
"""Thirds of the regions, by predicted count."""


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """Share of regions whose label lies in its interval, and the intervals' mean width in counts."""

    regions: int
    coverage: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Empirical coverage, over all regions, per third of predicted size, and per spatial block."""

    nominal: float
    all: Stratum
    by_size: dict[str, Stratum]
    by_block: list[Stratum]


def nested_intervals(
    method: Method, problem: Problem, task: str, held_out: HeldOut, *, seed: int, nominal: float
) -> tuple[Array, Array]:
    """Intervals around the first repetition's held-out predictions, as a city would get them there.

    An outer training set knows nothing of the regions held out of it; its own labels are split once more (as
    ``honest``, for such are the scores in a bundle), and the errors on those inner folds are its scores. All inner
    training sets go to the method at once.

    Args:
        held_out: The method's predictions under the outer folds.
        seed: Seed of the first repetition, and of the inner folds.
        nominal: How often the interval should hold, in (0, 1).

    Returns:
        Lower and upper ends, each float64 (N,); NaN for regions that take no part.

    Raises:
        UsageError: If an outer training set has too few labels for so high a coverage.
    """
    outer = Splits(labels=held_out.labels, fold=held_out.fold[:1], seeds=(seed,))
    inner = [honest(labels, seeds=(seed,)) for labels in outer.training_labels()]
    rows = [splits.training_labels() for splits in inner]
    together = np.concatenate(rows)
    predictions = np.split(
        method.predict(problem, task, together, [seed] * len(together)), np.cumsum([len(r) for r in rows])[:-1]
    )
    lower, upper = np.full((2, len(held_out.labels)), np.nan)
    fitted = _leverages(problem, inner) if method_has_folds(method, task) else None
    for k, (splits, prediction) in enumerate(zip(inner, predictions, strict=True)):
        mine = outer.fold[0] == k
        if fitted is not None:
            own, fold = splits.held_out(prediction)[0], splits.fold[0]
            trend = SizeTrend.fit(splits.labels, own, fitted[k])
            by_fold = fold_scores(splits.labels, own, fold, fitted[k], trend)
            lower[mine], upper[mine] = cv_plus(
                held_out.prediction[0, mine], prediction[:, mine].T, by_fold, fitted[k][mine], trend, nominal
            )
            continue
        pooled = nonconformity_scores(splits.labels, splits.held_out(prediction)[0])
        lower[mine], upper[mine] = interval(held_out.prediction[0, mine], pooled, nominal)
    return lower, upper


def method_has_folds(method: Method, task: str) -> bool:
    """Tell if a bundle of the method has its folds' fits, and so CV+ intervals."""
    return isinstance(method, Topt) and method.config(task, 0).tasks[task].ensemble.enabled


def _leverages(problem: Problem, inner: Sequence[Splits]) -> list[Array]:
    """Every region's leverage with respect to the other labelled regions of each outer training set, (N,) each."""
    inputs = {name: tensor.cpu() for name, tensor in problem.inputs.items()}
    found = []
    for splits in inner:
        known = torch.tensor(splits.fold[0] >= 0)
        found.append(Leverage.fit(all_widths(problem.schema), inputs, known).left_out(inputs, known))
    return found


def measure(method: Method, problem: Problem, task: str, held_out: HeldOut, *, seed: int, nominal: float) -> Coverage:
    """Empirical coverage of :func:`nested_intervals` over the first repetition, which costs as much as ten do."""
    lower, upper = nested_intervals(method, problem, task, held_out, seed=seed, nominal=nominal)
    truth = HeldOut(labels=held_out.labels, fold=held_out.fold[:1], prediction=held_out.prediction[:1]).truth()
    inside = (lower <= truth) & (truth <= upper)
    taking_part = np.flatnonzero(~np.isnan(truth))

    def stratum(regions: Array) -> Stratum:
        return Stratum(
            regions=len(regions),
            coverage=float(inside[regions].mean()),
            width=float((upper - lower)[regions].mean()),
        )

    by_size = np.array_split(taking_part[np.argsort(held_out.prediction[0, taking_part], kind="stable")], len(SIZES))
    block = spatial(truth, problem.inputs[POSITION].cpu().numpy(), seeds=(seed,)).fold[0]
    return Coverage(
        nominal=nominal,
        all=stratum(taking_part),
        by_size={name: stratum(regions) for name, regions in zip(SIZES, by_size, strict=True)},
        by_block=[stratum(np.flatnonzero(block == k)) for k in range(int(block.max()) + 1)],
    )
