"""Intervals from held-out errors: the quantile against its definition, and how often they hold."""

import math

import numpy as np
import pytest

from topt_deploy.errors import UsageError
from topt_deploy.intervals import (
    FACTORS,
    FURTHEST,
    SHRINKAGE,
    SizeTrend,
    coverage_by_size,
    cv_plus,
    fold_scores,
    interval,
    nonconformity_scores,
    stretch,
)

FLAT = SizeTrend()


def test_scores_are_sorted_errors_of_roots_and_leave_out_what_took_no_part() -> None:
    found = nonconformity_scores(np.array([8.0, 27.0, np.nan, 0.0]), np.array([1.0, np.nan, 5.0, 64.0]))
    np.testing.assert_allclose(found, [1.0, 4.0])


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
def test_ends_are_the_counts_with_the_ranked_score(coverage: float) -> None:
    score = sorted(np.random.default_rng(0).exponential(size=19).tolist())
    lower, upper = interval(np.array([1000.0, 0.0]), score, coverage)
    width = score[math.ceil(20 * coverage) - 1]
    np.testing.assert_allclose([lower[0], upper[0]], [max(10 - width, 0) ** 3, (10 + width) ** 3])
    np.testing.assert_allclose([lower[1], upper[1]], [0, width**3])


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_a_new_region_falls_inside_as_often_as_promised(coverage: float) -> None:
    rng = np.random.default_rng(1)
    inside, trials, n = 0, 4000, 60
    for _ in range(trials):
        truth = rng.gamma(2.0, 50.0, n + 1)
        predicted = (np.cbrt(truth) + rng.normal(scale=0.5, size=n + 1)) ** 3
        lower, upper = interval(predicted[-1:], nonconformity_scores(truth[:-1], predicted[:-1]), coverage)
        inside += bool(lower[0] <= truth[-1] <= upper[0])
    nominal = math.ceil((n + 1) * coverage) / (n + 1)  # exact for exchangeable regions
    assert inside / trials == pytest.approx(nominal, abs=4 * math.sqrt(nominal * (1 - nominal) / trials))


@pytest.mark.parametrize("coverage", [0.0, -0.1, 0.96, 1.0, 1.5, math.nan])
def test_a_coverage_that_the_labels_cannot_carry_is_refused(coverage: float) -> None:
    with pytest.raises(UsageError, match=r"at most 0\.950, with 19 labelled regions"):
        interval(np.ones(3), [1.0] * 19, coverage)


class TestCvPlus:
    @pytest.mark.parametrize("slope", [0.0, 0.3, -0.2, 5.0])
    def test_ends_are_the_quantiles_of_its_definition(self, slope: float) -> None:
        rng = np.random.default_rng(2)
        labels, fold = rng.gamma(2, 50, 19), np.arange(19) % 4
        held_out, leverage = rng.gamma(2, 50, 19), rng.random(19)
        trend = SizeTrend(mean=4.0, deviation=1.5, slope=slope)
        score = fold_scores(labels, held_out, fold, leverage, trend)
        folds, new = rng.gamma(2, 50, (5, 4)), rng.random(5)
        lower, upper = cv_plus(np.median(folds, axis=1), folds, score, new, trend, 0.8)

        def factor(prediction):
            return np.clip(1 + slope * np.clip((np.cbrt(prediction) - 4) / 1.5, -FURTHEST, FURTHEST), *FACTORS)

        residual = np.abs(np.cbrt(labels) - np.cbrt(held_out)) / np.sqrt(1 + leverage) / factor(held_out)
        for x in range(5):
            reach = np.sqrt(1 + new[x]) * factor(folds[x, fold]) * residual
            ends = np.cbrt(folds[x, fold]) + reach
            starts = np.cbrt(folds[x, fold]) - reach
            rank = math.ceil(20 * 0.8)
            np.testing.assert_allclose(upper[x], np.sort(ends)[rank - 1] ** 3)
            np.testing.assert_allclose(lower[x], max(np.sort(starts)[19 - rank], 0) ** 3)

    def test_scores_keep_no_order_of_the_regions_within_a_fold(self) -> None:
        labels, fold = np.array([8.0, 27.0, 1.0, np.nan]), np.array([0, 0, 1, -1])
        found = fold_scores(labels, np.array([1.0, 27.0, 8.0, np.nan]), fold, np.zeros(4), FLAT)
        assert found == [[0.0, pytest.approx(1)], [pytest.approx(1)]]

    def test_far_from_the_labelled_regions_intervals_are_wider(self) -> None:
        folds = np.full((2, 3), 1000.0)
        lower, upper = cv_plus(folds[:, 0], folds, [[0.1, 0.2], [0.3], [0.4, 0.5]], np.array([0.1, 8.0]), FLAT, 0.8)
        assert lower[1] < lower[0] < 1000 < upper[0] < upper[1]
        np.testing.assert_allclose(stretch(folds[:1], np.array([8.0]), FLAT), 3)

    def test_holds_as_often_as_promised_on_new_regions(self) -> None:
        rng, inside, trials, n, folds = np.random.default_rng(3), 0, 300, 40, 5
        for _ in range(trials):
            x = rng.normal(size=(n + 1, 3))
            y = (5 + x @ [0.5, 0.3, 0.0] + rng.normal(scale=0.5, size=n + 1)).clip(0) ** 3
            fold = np.arange(n) % folds
            fits = [np.linalg.lstsq(np.c_[np.ones((fold != k).sum()), x[:n][fold != k]], np.cbrt(y[:n][fold != k]),
                                    rcond=None)[0] for k in range(folds)]  # fmt: skip
            said = np.stack([(np.c_[np.ones(n + 1), x] @ fit).clip(0) ** 3 for fit in fits], axis=1)
            trend = SizeTrend.fit(y[:n], said[np.arange(n), fold], np.zeros(n))
            score = fold_scores(y[:n], said[np.arange(n), fold], fold, np.zeros(n), trend)
            lower, upper = cv_plus(said[n:].mean(axis=1), said[n:], score, np.zeros(1), trend, 0.9)
            inside += bool(lower[0] <= y[n] <= upper[0])
        assert inside / trials > 0.9 - 3 * math.sqrt(0.09 / trials)
        assert inside / trials < 0.97

    def test_the_final_prediction_is_never_outside(self) -> None:
        lower, upper = cv_plus(np.array([8.0, 5000.0]), np.full((2, 2), 1000.0), [[0.1], [0.1]], np.zeros(2), FLAT, 0.5)
        assert lower[0] == 8 < upper[0]
        assert lower[1] < upper[1] == 5000

    def test_too_few_labels_are_refused(self) -> None:
        with pytest.raises(UsageError, match="with 3 labelled regions"):
            cv_plus(np.ones(1), np.ones((1, 2)), [[0.1], [0.2, 0.3]], np.zeros(1), FLAT, 0.9)


class TestSizeTrend:
    def test_is_the_least_squares_line_drawn_towards_none(self) -> None:
        rng = np.random.default_rng(4)
        root, leverage = rng.uniform(2, 12, 50), rng.random(50)
        labels = (root + rng.normal(size=50) * root / 10) ** 3
        found = SizeTrend.fit(
            np.append(labels, [np.nan, 8.0]), np.append(root**3, [8.0, np.nan]), np.append(leverage, [0, 0])
        )
        z = (root - root.mean()) / root.std()
        assert np.abs(z).max() < FURTHEST
        error = np.abs(np.cbrt(labels) - root) / np.sqrt(1 + leverage)
        drawn = np.linalg.solve(np.diag([50, z @ z + SHRINKAGE]), np.c_[np.ones(50), z].T @ error)  # ridge on the slope
        np.testing.assert_allclose([found.mean, found.deviation], [root.mean(), root.std()])
        assert found.slope == pytest.approx(drawn[1] / drawn[0])
        assert found.slope > 0.1

    @pytest.mark.parametrize(
        ("labels", "held_out"),
        [([1.0, 8.0], [8.0, 1.0]), ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]), ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])],
        ids=["two regions", "one prediction", "no error"],
    )
    def test_there_is_none_without_anything_to_tell_it_by(self, labels: list[float], held_out: list[float]) -> None:
        assert SizeTrend.fit(np.array(labels), np.array(held_out), np.zeros(len(labels))) == FLAT

    def test_no_interval_is_more_than_twice_or_less_than_half_as_wide(self) -> None:
        steep = SizeTrend(mean=5.0, deviation=2.0, slope=0.9)
        np.testing.assert_allclose(steep.factor(np.array([0.0, 5.0, 6.0, 1e6])), [0.5, 1, 1.45, 2])

    def test_intervals_hold_as_often_for_small_as_for_large_predictions(self) -> None:
        """Errors grow threefold from the smallest to the largest: without it large ones fall short by 10 points."""
        rng, n = np.random.default_rng(5), 4000
        root = rng.uniform(4, 12, n)
        labels = np.maximum(root + rng.normal(size=n) * root / 12, 0) ** 3
        fold, none = np.arange(n) % 10, np.zeros(n)
        found = coverage_by_size(labels, root**3, fold, none, 0.9)
        assert all(abs(found[size] - 0.9) < 0.03 for size in ("all", "small", "medium", "large"))
        error = np.abs(np.cbrt(labels) - root)
        large = root > np.quantile(root, 2 / 3)
        assert (error[large] <= np.quantile(error, 0.9)).mean() < 0.8


def test_coverage_by_size_uses_the_other_regions_scores() -> None:
    labels = np.arange(1.0, 31) ** 3
    held_out = (np.cbrt(labels) + 0.01 * np.arange(30)) ** 3
    found = coverage_by_size(labels, held_out, np.zeros(30, int), np.zeros(30), 0.9)
    assert set(found) == {"all", "small", "medium", "large"}
    assert found["small"] == found["medium"] == 1
    inside = []
    for i in range(30):
        others = np.sort(np.delete(0.01 * np.arange(30), i))
        inside.append(0.01 * i <= others[math.ceil(30 * 0.9) - 1] + 1e-9)
    assert found["all"] == pytest.approx(np.mean(inside))
    assert coverage_by_size(labels[:5], held_out[:5], np.zeros(5, int), np.zeros(5), 0.9) == {}
