"""Intervals from held-out errors: the quantile against its definition, and how often they hold."""

import math

import numpy as np
import pytest

from topt_deploy.errors import UsageError
from topt_deploy.intervals import interval, scores


def test_scores_are_sorted_errors_of_roots_and_leave_out_what_took_no_part() -> None:
    found = scores(np.array([8.0, 27.0, np.nan, 0.0]), np.array([1.0, np.nan, 5.0, 64.0]))
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
        lower, upper = interval(predicted[-1:], scores(truth[:-1], predicted[:-1]), coverage)
        inside += bool(lower[0] <= truth[-1] <= upper[0])
    nominal = math.ceil((n + 1) * coverage) / (n + 1)  # exact for exchangeable regions
    assert inside / trials == pytest.approx(nominal, abs=4 * math.sqrt(nominal * (1 - nominal) / trials))


@pytest.mark.parametrize("coverage", [0.0, -0.1, 0.96, 1.0, 1.5, math.nan])
def test_a_coverage_that_the_labels_cannot_carry_is_refused(coverage: float) -> None:
    with pytest.raises(UsageError, match=r"at most 0\.950, with 19 labelled regions"):
        interval(np.ones(3), [1.0] * 19, coverage)
