import math

import numpy as np
import pytest
from scipy import stats

from topt_deploy.train.evaluation.paired_tests import compare, corrected_t
from topt_deploy.train.evaluation.splits import HeldOut, honest

LABELS = np.random.default_rng(0).gamma(2, 50, 31)
LABELS[[3, 8]] = np.nan
KNOWN = ~np.isnan(LABELS)
FOLD = honest(LABELS, seeds=(0, 1, 2), folds=4).fold


def held_out(seed, scale, fold=FOLD):
    noise = np.random.default_rng(seed).normal(scale=scale, size=fold.shape)
    return HeldOut(labels=LABELS, fold=fold, prediction=np.where(fold >= 0, np.maximum(LABELS + noise, 0), np.nan))


def test_ranks_are_scipys_over_regions_with_errors_averaged_over_repetitions():
    a, b = held_out(1, 10), held_out(2, 30)
    found = compare(a, b)
    error_a, error_b = (
        [np.mean(np.abs(m.prediction[:, n] - LABELS[n])) for n in range(31) if KNOWN[n]] for m in (a, b)
    )
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(error_a, error_b).pvalue)
    assert found.difference == pytest.approx(np.mean(error_a) / np.mean(error_b) - 1)
    assert found.significant


def test_rank_biserial_is_the_share_of_ranks_lost_less_that_won():
    a, b = held_out(1, 10), held_out(2, 30)
    d = (np.abs(a.prediction - LABELS) - np.abs(b.prediction - LABELS)).mean(axis=0)[KNOWN]
    lost = stats.wilcoxon(d, alternative="greater").statistic  # the sum of positive ranks
    total = len(d) * (len(d) + 1) / 2
    assert compare(a, b).rank_biserial == pytest.approx((lost - (total - lost)) / total)
    assert compare(b, a).rank_biserial == pytest.approx(-compare(a, b).rank_biserial)


def test_repetitions_do_not_make_regions():
    a, b = held_out(1, 10), held_out(2, 14)
    again = [
        HeldOut(labels=LABELS, fold=np.tile(m.fold, (7, 1)), prediction=np.tile(m.prediction, (7, 1))) for m in (a, b)
    ]
    assert compare(*again).wilcoxon_p == pytest.approx(compare(a, b).wilcoxon_p)


def test_the_corrected_t_of_a_case_worked_by_hand():
    # Five regions, two repetitions of two folds, of 2 and 3 regions. Fold means: 1, 3, 2, 6; mean 3, variance 14/3.
    difference = np.array([[0.0, 2, 3, 3, 3], [2, 2, 5, 6, 7]])
    fold = np.array([[0, 0, 1, 1, 1]] * 2)
    ratio = (2 / 3 + 3 / 2) / 2
    t = 3 / math.sqrt((1 / 4 + ratio) * 14 / 3)
    tail = 0.5 - math.atan(t / math.sqrt(3)) / math.pi - math.sqrt(3) * t / (math.pi * (3 + t * t))  # Student, 3 d.o.f.
    assert corrected_t(difference, fold) == pytest.approx(2 * tail)


def test_the_correction_widens_the_plain_paired_t_test():
    a, b = held_out(1, 10), held_out(2, 14)
    means = [
        (np.abs(a.prediction - LABELS) - np.abs(b.prediction - LABELS))[r, FOLD[r] == k].mean()
        for r in range(3)
        for k in range(4)
    ]
    plain = stats.ttest_1samp(means, 0)
    ratio = np.mean([(FOLD[r] == k).sum() / (KNOWN.sum() - (FOLD[r] == k).sum()) for r in range(3) for k in range(4)])
    t = plain.statistic / math.sqrt(1 + 12 * ratio)
    assert compare(a, b).corrected_t_p == pytest.approx(2 * stats.t.sf(abs(t), 11))


def test_no_difference_is_not_significant():
    found = compare(held_out(1, 10), held_out(1, 10))
    assert (found.difference, found.rank_biserial, found.wilcoxon_p, found.corrected_t_p) == (0, 0, 1, 1)
    assert not found.significant


def test_a_lower_mean_with_higher_ranks_is_not_significant():
    """The first is a little worse nearly everywhere and much better in one region."""
    n = int(KNOWN.sum())
    error = np.full(n, 1.1), np.full(n, 1.0)
    error[1][0] = 50.0
    a, b = (HeldOut(labels=np.zeros(n), fold=np.arange(n)[None] % 4, prediction=e[None]) for e in error)
    found = compare(a, b)
    assert found.difference < 0 < found.rank_biserial
    assert found.wilcoxon_p < 0.05
    assert not found.significant


def test_other_folds_or_labels_cannot_be_compared():
    with pytest.raises(ValueError, match="same labels and folds"):
        compare(held_out(1, 10), held_out(2, 10, fold=FOLD[::-1]))
    other = HeldOut(labels=LABELS + 1, fold=FOLD, prediction=held_out(2, 10).prediction)
    with pytest.raises(ValueError, match="same labels and folds"):
        compare(held_out(1, 10), other)
