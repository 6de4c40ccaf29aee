from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from builders import quiet, tiny_city
from mapie.regression import CrossConformalRegressor, SplitConformalRegressor
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold

from topt_deploy.errors import UsageError
from topt_deploy.intervals import interval, nonconformity_scores
from topt_deploy.train.evaluation.coverage import measure, nested_intervals
from topt_deploy.train.evaluation.problem import Problem
from topt_deploy.train.evaluation.protocols import PROTOCOLS, fit_and_hold_out
from topt_deploy.train.evaluation.splits import honest
from topt_deploy.train.loop import TrainingDevice

N = 41
CITY = tiny_city(N)
PROBLEM = Problem.of(CITY, None, TrainingDevice(device=torch.device("cpu")), quiet())
LABELS = np.where(np.isin(np.arange(N), [6, 30]), np.nan, CITY.labels["crime"])
X = PROBLEM.inputs["poi"].double().numpy()


class Given(RegressorMixin, BaseEstimator):
    """Predicts its only feature."""

    def fit(self, x, y):
        self.fitted_ = True
        return self

    def predict(self, x):
        return x[:, 0]


@pytest.mark.parametrize("n", [21, 40, 69])
@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95])
def test_scores_and_interval_are_mapies_on_the_root_scale(n, coverage):
    rng = np.random.default_rng(n)
    predicted, new = rng.gamma(2, 40, n), rng.gamma(2, 40, 15)
    labels = np.maximum(np.cbrt(predicted) + rng.normal(scale=1, size=n), 0) ** 3
    mapie = SplitConformalRegressor(Given().fit(None, None), coverage, conformity_score="absolute", prefit=True)
    mapie.conformalize(np.cbrt(predicted)[:, None], np.cbrt(labels))
    _, ends = mapie.predict_interval(np.cbrt(new)[:, None])
    lower, upper = interval(new, nonconformity_scores(labels, predicted), coverage)
    np.testing.assert_allclose(lower, np.maximum(ends[:, 0, 0], 0) ** 3)
    np.testing.assert_allclose(upper, ends[:, 1, 0] ** 3)


@dataclass(frozen=True)
class Linear:
    """Least squares on ∛count, which MAPIE can have too."""

    def predict(self, problem, task, labels, seeds):
        known = ~np.isnan(labels)
        fits = [LinearRegression().fit(X[k], np.cbrt(row[k])) for k, row in zip(known, labels, strict=True)]
        return np.stack([np.maximum(fit.predict(X), 0) ** 3 for fit in fits])


@pytest.fixture(scope="module")
def held_out():
    return fit_and_hold_out(Linear(), PROBLEM, "crime", honest(LABELS, seeds=(3, 4)))


@pytest.mark.parametrize("nominal", [0.6, 0.9])
def test_nested_intervals_are_mapies_inside_every_outer_training_set(held_out, nominal):
    lower, upper = nested_intervals(Linear(), PROBLEM, "crime", held_out, seed=3, nominal=nominal)
    fold = held_out.fold[0]
    assert np.isnan(lower[fold < 0]).all()
    for k in range(10):
        train, test = (fold >= 0) & (fold != k), fold == k
        mapie = CrossConformalRegressor(
            LinearRegression(), nominal, method="base", cv=KFold(10, shuffle=True, random_state=3)
        )
        mapie.fit_conformalize(X[train], np.cbrt(LABELS[train]))
        _, ends = mapie.predict_interval(X[test])
        np.testing.assert_allclose(lower[test], np.maximum(ends[:, 0, 0], 0) ** 3, atol=1e-9)
        np.testing.assert_allclose(upper[test], ends[:, 1, 0] ** 3)


def test_an_interval_knows_nothing_of_its_own_label(held_out):
    clean = nested_intervals(Linear(), PROBLEM, "crime", held_out, seed=3, nominal=0.8)
    held = np.flatnonzero(held_out.fold[0] == 2)
    for poison in (1e9, 0.0):
        labels = LABELS.copy()
        labels[held] = poison
        found = nested_intervals(Linear(), PROBLEM, "crime", replace(held_out, labels=labels), seed=3, nominal=0.8)
        for end, expected in zip(found, clean, strict=True):
            np.testing.assert_array_equal(end[held], expected[held])
            assert (end[held_out.fold[0] == 1] != expected[held_out.fold[0] == 1]).all()


def test_the_method_is_called_once_with_all_inner_training_sets(held_out):
    calls = []

    class Counted:
        def predict(self, problem, task, labels, seeds):
            calls.append((labels.shape, set(seeds)))
            return Linear().predict(problem, task, labels, seeds)

    nested_intervals(Counted(), PROBLEM, "crime", held_out, seed=3, nominal=0.8)
    assert calls == [((100, N), {3})]


def test_strata_are_shares_of_the_regions_they_name(held_out):
    found = measure(Linear(), PROBLEM, "crime", held_out, seed=3, nominal=0.8)
    lower, upper = nested_intervals(Linear(), PROBLEM, "crime", held_out, seed=3, nominal=0.8)
    known = np.flatnonzero(~np.isnan(LABELS))
    inside = [bool(lower[n] <= LABELS[n] <= upper[n]) for n in known]
    assert found.nominal == 0.8
    assert found.all.regions == 39
    assert found.all.coverage == pytest.approx(np.mean(inside))
    assert found.all.width == pytest.approx(np.mean([upper[n] - lower[n] for n in known]))
    ranked = sorted(known, key=lambda n: held_out.prediction[0, n])
    for third, name in enumerate(("small", "medium", "large")):
        regions = ranked[13 * third : 13 * third + 13]
        assert found.by_size[name].regions == 13
        assert found.by_size[name].coverage == pytest.approx(np.mean([inside[list(known).index(n)] for n in regions]))
        assert found.by_size[name].width == pytest.approx(np.mean([upper[n] - lower[n] for n in regions]))
    assert sum(block.regions for block in found.by_block) == 39
    whole = sum(block.regions * block.coverage for block in found.by_block)
    assert whole / 39 == pytest.approx(found.all.coverage)


def test_intervals_hold_about_as_often_as_they_say(tmp_path):
    rng, inside, regions = np.random.default_rng(5), 0.0, 0
    for seed in range(12):
        labels = np.square(np.maximum(5 + X @ rng.uniform(0.5, 2, X.shape[1]) + rng.normal(size=N), 0))
        held_out = PROTOCOLS["honest"].predict(Linear(), PROBLEM, "crime", labels, [seed], tmp_path)
        found = measure(Linear(), PROBLEM, "crime", held_out, seed=seed, nominal=0.8).all
        inside, regions = inside + found.coverage * found.regions, regions + found.regions
    assert inside / regions == pytest.approx(0.81, abs=0.06)


def test_a_coverage_that_the_training_sets_cannot_carry_is_refused(held_out):
    with pytest.raises(UsageError, match="with 35 labelled regions"):
        nested_intervals(Linear(), PROBLEM, "crime", held_out, seed=3, nominal=0.98)
