from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import quiet, tiny_city
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from topt_deploy.data.city import infer_schema, read_city
from topt_deploy.data.features import features, local_position_m
from topt_deploy.errors import BadData
from topt_deploy.train.boosted_trees import boosted_trees
from topt_deploy.train.evaluation.plain_baselines import PLAIN, RIDGE_ALPHAS, nearest_mean
from topt_deploy.train.evaluation.problem import Problem
from topt_deploy.train.evaluation.protocols import PROTOCOLS
from topt_deploy.train.evaluation.splits import Splits, honest
from topt_deploy.train.loop import TrainingDevice

N = 19
CITY = tiny_city(N, prompts=("prompt_crime",))
CPU = TrainingDevice(device=torch.device("cpu"))


def problem(city=CITY):
    return Problem.of(city, None, CPU, quiet())


def training_set(seed=0, task="crime"):
    """One row of labels, five of them unknown."""
    row = CITY.labels[task].copy()
    row[np.random.default_rng(seed).choice(N, 5, replace=False)] = np.nan
    return row


class TestNearestMean:
    def oracle(self, xyz, values):
        out = np.empty_like(values)
        for i in range(len(xyz)):
            others = [j for j in range(len(xyz)) if j != i and not np.isnan(values[j]).any()]
            near = sorted(others, key=lambda j: np.linalg.norm(xyz[i] - xyz[j]))[:5]
            weights = [1 / max(np.linalg.norm(xyz[i] - xyz[j]), 1) for j in near]
            out[i] = sum(w * values[j] for w, j in zip(weights, near, strict=True)) / sum(weights)
        return out

    @pytest.mark.parametrize("known", [19, 12, 5, 2])
    def test_is_a_loop_over_the_nearest_others_with_values(self, known):
        rng = np.random.default_rng(known)
        xyz, values = rng.normal(scale=3000, size=(N, 3)), rng.normal(size=(N, 2))
        values[rng.permutation(N)[known:]] = np.nan
        distance = np.linalg.norm(xyz[:, None] - xyz, axis=2)
        np.testing.assert_allclose(nearest_mean(distance, values), self.oracle(xyz, values))

    def test_regions_at_one_place_are_a_metre_apart(self):
        distance = np.array([[0.0, 0, 4], [0, 0, 4], [4, 4, 0]])
        values = np.array([[1.0], [2], [7]])
        np.testing.assert_allclose(nearest_mean(distance, values)[:, 0], [(2 + 7 / 4) / 1.25, (1 + 7 / 4) / 1.25, 1.5])

    def test_a_regions_own_value_does_not_matter_to_it(self):
        distance = np.abs(np.subtract.outer(np.arange(9.0), np.arange(9.0)))
        values = np.arange(9.0)[:, None]
        clean = nearest_mean(distance, values)
        values[4] = 1e9
        assert nearest_mean(distance, values)[4] == clean[4]
        assert (nearest_mean(distance, values)[3] != clean[3]).all()


def test_the_registry_has_every_combination():
    assert len(PLAIN) == 1 + 3 * 2 * 3 * 2
    assert {"mean", "ridge", "extra-trees+lag", "boosting+sqrt+flow", "boosting+sqrt+flow+neighbours+lag"} <= set(PLAIN)
    for name, make in PLAIN.items():
        assert name == "mean" or make().name == name


def by_hand(sqrt=False, flow=False, neighbours=False, lag=False, row=None):
    """Features from the city itself, in any order of columns, and the target."""
    logs = [np.log1p(CITY.views["poi"]), np.log1p(CITY.views["land_use"])]
    mobility = features(CITY)["mobility"].astype(float)
    xyz = local_position_m(CITY.lonlat)
    distance = np.linalg.norm(xyz[:, None] - xyz, axis=2)
    target = np.sqrt(row) if sqrt else row
    parts = [*logs, xyz, mobility[:, -2:]]
    parts += [mobility[:, :-2]] if flow else []
    parts += [nearest_mean(distance, logs[0])] if neighbours else []
    parts += [nearest_mean(distance, target[:, None])] if lag else []
    return np.concatenate(parts, axis=1), target


@pytest.mark.parametrize("parts", [(), ("sqrt",), ("flow",), ("sqrt", "flow", "neighbours"), ("lag",), ("sqrt", "lag")])
def test_ridge_is_scikit_learns_with_alpha_by_leave_one_out(parts):
    row = training_set()
    x, target = by_hand(row=row, **dict.fromkeys(parts, True))
    known = ~np.isnan(row)

    def scaled_once(alpha):
        """α is chosen on features that are standardised once, over the whole row."""
        z = StandardScaler().fit(x[known]).transform(x[known])
        return cross_val_score(
            Ridge(alpha), z, target[known], cv=LeaveOneOut(), scoring="neg_mean_squared_error"
        ).mean()

    best = max(RIDGE_ALPHAS, key=scaled_once)
    model = make_pipeline(StandardScaler(), Ridge(best)).fit(x[known], target[known])
    expected = np.maximum(model.predict(x), 0)
    found = PLAIN["+".join(["ridge", *parts])]().predict(problem(), "crime", row[None], [0])
    np.testing.assert_allclose(found[0], expected**2 if "sqrt" in parts else expected, rtol=1e-4)  # features: float32


def test_the_mean_is_of_the_rows_own_labels():
    rows = np.stack([training_set(0), training_set(1)])
    found = PLAIN["mean"]().predict(problem(), "crime", rows, [0, 0])
    assert found.shape == rows.shape
    for row, prediction in zip(rows, found, strict=True):
        assert (prediction == np.mean([v for v in row if not np.isnan(v)])).all()


def test_boosting_on_root_counts_with_flows_is_the_baseline_of_every_run():
    fold = honest(CITY.labels["crime"], seeds=(0,), folds=3).fold
    splits = Splits(labels=CITY.labels["crime"], fold=fold, seeds=(0,))
    method = PLAIN["boosting+sqrt+flow"]()
    found = splits.held_out(method.predict(problem(), "crime", splits.training_labels(), splits.row_seeds()))
    np.testing.assert_array_equal(found[0], boosted_trees(features(CITY), CITY.labels["crime"], fold[0]))


@pytest.mark.parametrize("name", ["ridge+lag", "extra-trees+flow+lag", "boosting+sqrt+flow"])
def test_rows_do_not_depend_on_each_other(name):
    rows = np.stack([training_set(0), training_set(1), training_set(2)])
    together = PLAIN[name]().predict(problem(), "crime", rows, [5, 6, 7])
    assert together.shape == rows.shape
    assert (together >= 0).all()
    alone = PLAIN[name]().predict(problem(), "crime", rows[1:2], [6])
    np.testing.assert_array_equal(together[1:2], alone)


def test_prompts_are_not_read():
    row = training_set()[None]
    other = replace(CITY, prompts={"prompt_crime": CITY.prompts["prompt_crime"] * 3})
    found = [PLAIN["ridge+flow"]().predict(problem(city), "crime", row, [0]) for city in (CITY, other)]
    np.testing.assert_array_equal(*found)


def test_a_city_without_flows_has_no_flow_context():
    city = replace(CITY, flows=None)
    with pytest.raises(BadData, match=r"(?s)ridge\+flow: .*expected: mobility"):
        PLAIN["ridge+flow"]().predict(problem(city), "crime", training_set()[None], [0])
    assert PLAIN["ridge+lag"]().predict(problem(city), "crime", training_set()[None], [0]).shape == (1, N)


def test_a_city_without_poi_has_no_neighbours_poi():
    city = replace(CITY, views={"land_use": CITY.views["land_use"]})
    with pytest.raises(BadData, match="poi"):
        PLAIN["ridge+flow+neighbours"]().predict(problem(city), "crime", training_set()[None], [0])


def test_on_chicago_the_trees_are_as_strong_as_is_known(chicago, tmp_path):
    """Service calls, boosting on √count with flow context and neighbours' POI, untuned, 2 seeds: MAE 132.9."""
    schema = infer_schema(chicago / "regions.parquet", views=("poi", "land_use"), mobility=True)
    city = read_city(chicago / "regions.parquet", chicago / "mobility.parquet", schema, labels=("service_call",))
    labels, method = city.labels["service_call"], PLAIN["boosting+sqrt+flow+neighbours+lag"]()
    (prediction,) = PROTOCOLS["honest"].predict(method, problem(city), "service_call", labels, [0], tmp_path).prediction
    assert mean_absolute_error(labels, prediction) < 132.9
