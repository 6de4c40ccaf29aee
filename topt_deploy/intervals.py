"""Prediction intervals from held-out errors.

An error is measured on the scale of ∛count, where its spread depends least on the size of the count (dev/LOG.md). A
region's score is the error of the fold that did not train on it.

**CV+** (Barber, Candès, Ramdas and Tibshirani, Annals of Statistics 2021): the ends of a new region's interval are
quantiles of μ₋ₖ₍ᵢ₎(x) ± Rᵢ over the labelled regions i, where μ₋ₖ₍ᵢ₎ is the fit that did not see i. For regions
that are exchangeable with the labelled ones, an interval of nominal coverage 1 − α holds with a probability of at least
about 1 − 2α, and in practice of about 1 − α. Scores are normalised twice: by √(1 + h), h the region's leverage
(:mod:`topt_deploy.model.leverage`), so that far from the labelled regions intervals grow wider; and by how errors grow
with the prediction itself (:class:`SizeTrend`), so that they hold as often for small counts as for large ones. The
bundle has scores by fold, sorted, and no region's row.

**Around the final fit** (bundles without fits of the folds): the final prediction ± a quantile of the scores. This has
no guarantee for finite samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UsageError

Array = np.ndarray[Any, Any]

COVERAGE = 0.9
"""Of intervals, where none is asked for."""
FOLDS = "_folds"
"""After a task's name, the graph's output of the folds' fits (N, K)."""
LEVERAGE = "leverage"
"""The graph's output of the regions' leverage (N,)."""
ENTRIES = 1 << 22
"""Of the matrix of regions and scores that is sorted at once."""
SCALE = "cbrt"
"""The scale of scores, ∛count; a bundle records it beside its scores."""
SCALE_BY_SIZE = "cbrt by size"
"""That of scores by fold, which a :class:`SizeTrend` belongs to."""
FURTHEST = 2.0
"""Standard deviations of ∛ŷ that a trend reaches to either side."""
FACTORS = (0.5, 2.0)
"""The least and the most that a trend multiplies an interval by."""
SHRINKAGE = 20.0
"""As many regions without a trend, one standard deviation from the mean, draw a slope towards none."""
FEWEST = 3
"""Regions that a slope takes."""


def nonconformity_scores(labels: Array, held_out: Array) -> list[float]:
    """Sorted scores |∛y − ∛ŷ| of the regions that have a label and a held-out prediction.

    *Shape:* (N,), (N,)
    """
    error = np.abs(np.cbrt(labels) - _root(held_out))
    return sorted(float(e) for e in error[~np.isnan(error)])


def interval(
    prediction: Array, score: Sequence[float], coverage: float, stretched: Array | float = 1.0
) -> tuple[Array, Array]:
    """Lower and upper ends for every prediction.

    The quantile is the ⌈(n + 1)·coverage⌉-th smallest of the n scores, as split conformal prediction has it.

    Args:
        prediction: (N,) counts.
        score: :func:`nonconformity_scores` of the training city; or its :func:`fold_scores`, in one sorted list.
        coverage: How often the interval should hold, in (0, 1).
        stretched: :func:`stretch` of the predictions (N,), for normalised scores.

    Raises:
        UsageError: If so few labels cannot carry so high a coverage.
    """
    _check(score, coverage)
    root, width = _root(prediction), score[_rank(score, coverage) - 1] * stretched
    return np.maximum(root - width, 0) ** 3, (root + width) ** 3


def _check(score: Sequence[float] | Array, coverage: float) -> None:
    if not carries(score, coverage):
        highest = len(score) / (len(score) + 1)
        raise UsageError(
            "no interval can be given at this coverage",
            expected=f"a coverage above 0 and at most {highest:.3f}, with {len(score)} labelled regions",
            found=f"{coverage:g}",
            fix="lower --coverage",
        )


def carries(score: Sequence[float] | Array, coverage: float) -> bool:
    """True if there are enough labels for an interval of this coverage."""
    return 0 < coverage < 1 and _rank(score, coverage) <= len(score)


def _rank(score: Sequence[float] | Array, coverage: float) -> int:
    return math.ceil((len(score) + 1) * coverage)


@dataclass(frozen=True, kw_only=True)
class SizeTrend:
    """How errors grow with the prediction: by 1 + slope · z, z = (∛ŷ − mean) / deviation.

    z counts up to :data:`FURTHEST`, and the factor stays within :data:`FACTORS`.
    """

    mean: float = 0.0
    deviation: float = 1.0
    slope: float = 0.0

    @classmethod
    def fit(cls, labels: Array, held_out: Array, leverage: Array) -> "SizeTrend":
        """Least squares of the errors |∛y − ∛ŷ| / √(1 + h) on z, drawn towards no trend; none with too few regions.

        *Shape:* (N,) each, NaN where unknown
        """
        root, error = _root(held_out), _normal(labels, held_out, leverage, cls())
        known = ~np.isnan(error)
        root, error = root[known], error[known]
        if len(error) < FEWEST or root.std() == 0 or error.mean() == 0:
            return cls()
        flat = cls(mean=float(root.mean()), deviation=float(root.std()))
        z = flat._z(root)
        z = z - z.mean()
        slope = (error * z).sum() / (np.square(z).sum() + SHRINKAGE) / error.mean()
        return cls(mean=flat.mean, deviation=flat.deviation, slope=float(slope))

    def _z(self, root: Array) -> Array:
        return np.clip((root - self.mean) / self.deviation, -FURTHEST, FURTHEST)

    def factor(self, root: Array) -> Array:
        """Divisors of scores, and multipliers of intervals, of predictions with these ∛ŷ. Of any shape."""
        return np.clip(1 + self.slope * self._z(root), *FACTORS)


def stretch(prediction: Array, leverage: Array, trend: SizeTrend) -> Array:
    """The factor √(1 + h) · trend(ŷ) that scores are divided by and intervals multiplied by.

    Args:
        prediction: Counts, of any shape.
        leverage: h of the same regions, of a shape that goes with it.
        trend: Of the training city.
    """
    factor: Array = np.sqrt(1 + np.maximum(leverage, 0)) * trend.factor(_root(prediction))
    return factor


def _root(prediction: Array) -> Array:
    root: Array = np.cbrt(np.maximum(prediction, 0))
    return root


def _normal(labels: Array, held_out: Array, leverage: Array, trend: SizeTrend) -> Array:
    """Normalised scores (N,), NaN where unknown."""
    normal: Array = np.abs(np.cbrt(labels) - _root(held_out)) / stretch(held_out, leverage, trend)
    return normal


def fold_scores(labels: Array, held_out: Array, fold: Array, leverage: Array, trend: SizeTrend) -> list[list[float]]:
    """Sorted normalised scores |∛y − ∛ŷ| / √(1 + h) / trend(ŷ) of each fold's held-out regions.

    Args:
        labels, held_out: (N,), NaN where unknown.
        fold: int64 (N,), the fold that a region was held out in; -1 for none.
        leverage: (N,), each labelled region's with respect to the others.
        trend: How errors grow with the prediction.
    """
    normal = _normal(labels, held_out, leverage, trend)
    own = [normal[(fold == k) & ~np.isnan(normal)] for k in range(int(fold.max()) + 1)]
    return [sorted(float(score) for score in scores) for scores in own]


def coverage_by_size(labels: Array, held_out: Array, fold: Array, leverage: Array, coverage: float) -> dict[str, float]:
    """How often intervals hold around the held-out predictions of labelled regions, each by the scores of the others
    and the trend of the other folds: of all, and of the thirds by predicted size. Empty with too few labels for such
    intervals."""
    own = np.flatnonzero((fold >= 0) & ~np.isnan(held_out) & ~np.isnan(labels))
    labels, held_out, fold, leverage = labels[own], held_out[own], fold[own], leverage[own]
    normal = np.empty(len(own))
    for k in np.unique(fold):
        mine = fold == k
        trend = SizeTrend.fit(labels[~mine], held_out[~mine], leverage[~mine])
        normal[mine] = _normal(labels[mine], held_out[mine], leverage[mine], trend)
    if not carries(normal[1:], coverage):
        return {}
    ordered, rank = np.sort(normal), _rank(normal[1:], coverage) - 1
    # Without a score below the quantile, the quantile of the others is the next larger one.
    limit = np.where(normal <= ordered[rank], ordered[min(rank + 1, len(ordered) - 1)], ordered[rank])
    inside = normal <= limit
    thirds = np.array_split(np.argsort(held_out, kind="stable"), 3)
    named = zip(("small", "medium", "large"), thirds, strict=True)
    return {"all": float(inside.mean())} | {name: float(inside[part].mean()) for name, part in named if len(part)}


def cv_plus(
    prediction: Array,
    folds: Array,
    score: Sequence[Sequence[float]],
    leverage: Array,
    trend: SizeTrend,
    coverage: float,
) -> tuple[Array, Array]:
    """Lower and upper ends for every region, by CV+.

    Args:
        prediction: (N,) counts, of the fit of all labels. An end that would leave it outside is moved to it, which
            costs no coverage.
        folds: (N, K) counts, as the fits of the K folds predict every region.
        score: :func:`fold_scores` of the training city.
        leverage: (N,), the regions'.
        trend: Of the training city.
        coverage: How often the interval should hold, in (0, 1).

    Raises:
        UsageError: If so few labels cannot carry so high a coverage.
    """
    flat = np.array([s for scores in score for s in scores])
    _check(flat, coverage)
    column = np.repeat(np.arange(len(score)), [len(scores) for scores in score])
    root, wide = _root(folds), stretch(folds, leverage[:, None], trend)
    rank = _rank(flat, coverage) - 1
    ends = np.empty((2, len(folds)))
    step = max(1, ENTRIES // len(flat))
    for start in range(0, len(folds), step):
        part = slice(start, start + step)
        centre, reach = root[part][:, column], wide[part][:, column] * flat
        # The k-th smallest of all upper ends, and, by symmetry, the k-th largest of all lower ends.
        ends[0, part] = -np.partition(reach - centre, rank, axis=1)[:, rank]
        ends[1, part] = np.partition(centre + reach, rank, axis=1)[:, rank]
    return np.minimum(np.maximum(ends[0], 0) ** 3, prediction), np.maximum(ends[1] ** 3, prediction)
