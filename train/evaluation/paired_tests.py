"""Paired comparison of two methods on the same held-out regions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from .splits import HeldOut

Array = np.ndarray[Any, Any]

SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A comparison of two methods' errors; negative is in favour of the first.

    Attributes:
        difference: Its MAE over the other's, less 1.
        rank_biserial: Matched-pairs rank-biserial correlation in [-1, 1] (Kerby 2014), the size of Wilcoxon's effect.
        wilcoxon_p: Wilcoxon signed-rank test over regions, two-sided: the primary test.
        corrected_t_p: Corrected resampled t test over folds (Nadeau and Bengio 2003), two-sided; None with fewer than
            two folds a repetition.
    """

    difference: float
    rank_biserial: float
    wilcoxon_p: float
    corrected_t_p: float | None

    @property
    def significant(self) -> bool:
        """True if the primary test finds a difference in the direction in which the MAEs differ."""
        return self.wilcoxon_p < SIGNIFICANT and self.difference * self.rank_biserial > 0


def compare(a: HeldOut, b: HeldOut) -> Paired:
    """Compare ``a`` with ``b``, which must be of the same labels and folds.

    Counts are heavy-tailed, and repetitions say nothing about further regions: so the first test is by ranks, and
    over regions, each with its absolute error averaged over repetitions. The second is over the R·K folds' MAEs, with
    the variance corrected for training sets that overlap.
    """
    if not (np.array_equal(a.labels, b.labels, equal_nan=True) and np.array_equal(a.fold, b.fold)):
        raise ValueError("a paired comparison needs the same labels and folds")
    taking_part = ~np.isnan(a.truth())
    error_a, error_b = (np.abs(m.prediction - m.labels)[:, taking_part] for m in (a, b))  # (R, n)
    rank_biserial, wilcoxon_p = _wilcoxon((error_a - error_b).mean(axis=0))
    return Paired(
        difference=float(error_a.mean() / error_b.mean() - 1),
        rank_biserial=rank_biserial,
        wilcoxon_p=wilcoxon_p,
        corrected_t_p=corrected_t((error_a - error_b), a.fold[:, taking_part]),
    )


def _wilcoxon(difference: Array) -> tuple[float, float]:
    """Rank-biserial correlation and p of paired differences (n); pairs without a difference are left out."""
    unequal = difference[difference != 0]
    if len(unequal) == 0:
        return 0.0, 1.0
    ranks = stats.rankdata(np.abs(unequal))
    return float((np.sign(unequal) * ranks).sum() / ranks.sum()), float(stats.wilcoxon(unequal).pvalue)


def corrected_t(difference: Array, fold: Array) -> float | None:
    """p of the corrected resampled t test: t = d̄ / √((1/J + n_test/n_train)·s²) over the J = R·K folds' means.

    Folds differ in size: the ratio is the folds' mean. One fold alone leaves nothing that others trained on: None.

    *Shape:* (R, n), (R, n)
    """
    if fold.max() < 1:
        return None
    means, ratios = [], []
    for error, number in zip(difference, fold, strict=True):
        for k in range(int(number.max()) + 1):
            held_out = number == k
            means.append(error[held_out].mean())
            ratios.append(held_out.sum() / (~held_out).sum())
    mean, variance, count = np.mean(means), np.var(means, ddof=1), len(means)
    if variance == 0:
        return 1.0 if mean == 0 else 0.0
    t = mean / np.sqrt((1 / count + np.mean(ratios)) * variance)
    return float(2 * stats.t.sf(abs(t), count - 1))
