import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from topt_deploy.train.metrics import metrics

COUNTS = arrays(float, st.integers(2, 30), elements=st.floats(0, 1e5, allow_subnormal=False))


@settings(max_examples=50, derandomize=True, deadline=None)
@given(COUNTS, st.randoms(use_true_random=False))
def test_match_scikit_learn(truth, random):
    prediction = np.array([random.uniform(0, 1e5) for _ in truth])
    found = metrics(truth, prediction)
    assert found.mae == pytest.approx(mean_absolute_error(truth, prediction))
    assert found.rmse == pytest.approx(root_mean_squared_error(truth, prediction))
    if np.ptp(truth) > 1e-3:
        assert found.r2 == pytest.approx(r2_score(truth, prediction), rel=1e-6, abs=1e-6)
    assert found.regions == len(truth)


def test_regions_without_truth_are_left_out():
    truth, prediction = np.array([1.0, np.nan, 5.0, 9.0]), np.array([2.0, 1e9, 5.0, np.nan])
    prediction[3] = 6
    chosen = [0, 2, 3]
    found = metrics(truth, prediction)
    assert found.regions == 3
    assert found.mae == pytest.approx(mean_absolute_error(truth[chosen], prediction[chosen]))
    assert found.r2 == pytest.approx(r2_score(truth[chosen], prediction[chosen]))


def test_predicting_the_mean_has_no_r2():
    truth = np.array([1.0, 2.0, 6.0])
    assert metrics(truth, np.full(3, 3.0)).r2 == pytest.approx(0)


def test_labels_that_do_not_vary_have_no_r2():
    found = metrics(np.full(4, 2.0), np.array([2.0, 3.0, 2.0, 1.0]))
    assert found.r2 is None
    assert found.mae == 0.5


def test_single_precision_is_widened_before_squaring():
    truth = np.array([1e-3, 2e-3, 3e-3], dtype=np.float32) + np.float32(1e4)
    assert metrics(truth, truth).r2 == 1
