"""Prediction intervals from held-out errors (cross-conformal; Vovk 2015, Barber et al. 2021).

An error is measured on the scale of ∛count, where its spread depends least on the size of the count (dev/LOG.md). A
region's score is the error of the fold that did not train on it. The interval of a new region is every count whose
score would be no larger than a given share of those; it is right that often as far as the new region is like the
labelled ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import UsageError

Array = np.ndarray[Any, Any]

SCALE = "cbrt"
"""The scale of scores, ∛count; a bundle records it beside its scores."""


def scores(labels: Array, held_out: Array) -> list[float]:
    """Sorted scores |∛y − ∛ŷ| of the regions that have a label and a held-out prediction.

    *Shape:* (N,), (N,)
    """
    error = np.abs(np.cbrt(labels) - np.cbrt(np.maximum(held_out, 0)))
    return sorted(float(e) for e in error[~np.isnan(error)])


def interval(prediction: Array, score: Sequence[float], coverage: float) -> tuple[Array, Array]:
    """Lower and upper ends for every prediction.

    The quantile is the ⌈(n + 1)·coverage⌉-th smallest of the n scores, as split conformal prediction has it.

    Args:
        prediction: (N,) counts.
        score: :func:`scores` of the training city.
        coverage: How often the interval should hold, in (0, 1).

    Raises:
        UsageError: If so few labels cannot carry so high a coverage.
    """
    if not carries(score, coverage):
        highest = len(score) / (len(score) + 1)
        raise UsageError(
            "no interval can be given at this coverage",
            expected=f"a coverage above 0 and at most {highest:.3f}, with {len(score)} labelled regions",
            found=f"{coverage:g}",
            fix="lower --coverage",
        )
    root, width = np.cbrt(np.maximum(prediction, 0)), score[_rank(score, coverage) - 1]
    return np.maximum(root - width, 0) ** 3, (root + width) ** 3


def carries(score: Sequence[float], coverage: float) -> bool:
    """True if there are enough labels for an interval of this coverage."""
    return 0 < coverage < 1 and _rank(score, coverage) <= len(score)


def _rank(score: Sequence[float], coverage: float) -> int:
    return math.ceil((len(score) + 1) * coverage)
