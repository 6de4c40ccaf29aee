"""Whole cities held out: what a method cannot see of them, the few labels that join, and the tables by city."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import quiet, tiny_city, tiny_city_tables
from sklearn.metrics import mean_absolute_error

from topt_deploy.data.cities import stack_cities
from topt_deploy.data.city import infer_schema
from topt_deploy.errors import BadData, UsageError
from topt_deploy.train.evaluation import plain_baselines
from topt_deploy.train.evaluation.literature import LITERATURE
from topt_deploy.train.evaluation.paired_tests import compare
from topt_deploy.train.evaluation.plain_baselines import PLAIN
from topt_deploy.train.evaluation.problem import Problem
from topt_deploy.train.evaluation.protocols import PROTOCOLS, transfer_with
from topt_deploy.train.evaluation.splits import HeldOut, transfer
from topt_deploy.train.evaluation.tables import order_and_level
from topt_deploy.train.evaluation.topt_variants import Topt
from topt_deploy.train.loop import TrainingDevice

SIZES = {"ash": 24, "birch": 21, "cedar": 23}
SCHEMA = infer_schema(tiny_city_tables()[0], views=("poi", "land_use"), mobility=True)
CPU = TrainingDevice(device=torch.device("cpu"))


pytestmark = pytest.mark.usefixtures("few_steps")


def cities(seed=0):
    return stack_cities({name: tiny_city(n, seed=n + seed) for name, n in SIZES.items()})


CITY = cities()
LABELS = CITY.labels["crime"]


def problem(city=CITY):
    return Problem.of(city, SCHEMA, CPU, quiet())


def predict(method, tmp_path, labels=LABELS, few=0, seeds=(0,), city=CITY):
    return transfer_with(few).predict(method, problem(city), "crime", labels, seeds, tmp_path)


METHODS_HERE = {"topt": Topt("default"), "kernels": Topt("kernels"), "srel": Topt("srel")} | {
    name: PLAIN[name]() for name in ("mean", "ridge+sqrt+flow+neighbours+lag", "extra-trees+flow", "boosting+lag")
}


@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize("name", METHODS_HERE)
def test_no_method_depends_on_a_held_out_citys_labels(name, few, tmp_path):
    clean = predict(METHODS_HERE[name], tmp_path, few=few)
    hidden = (CITY.part == 1) & (clean.fold[0] >= 0)
    poisoned = predict(METHODS_HERE[name], tmp_path, np.where(hidden, 1e9, LABELS), few=few)
    np.testing.assert_array_equal(poisoned.prediction[0, hidden], clean.prediction[0, hidden])


@pytest.mark.parametrize("name", METHODS_HERE)
def test_a_row_of_nan_for_a_city_is_the_same_as_holding_it_out(name, tmp_path):
    clean, method = predict(METHODS_HERE[name], tmp_path), METHODS_HERE[name]
    row = np.where(CITY.part == 1, np.nan, LABELS)[None]
    np.testing.assert_array_equal(
        method.predict(problem(), "crime", row, [0])[0, CITY.part == 1], clean.prediction[0, CITY.part == 1]
    )


@pytest.mark.parametrize("name", ["topt", "kernels", "srel"])
def test_not_even_features_of_a_held_out_city_are_seen(name):
    others = stack_cities({"ash": CITY.parts[0], "birch": tiny_city(21, seed=999), "cedar": CITY.parts[2]})
    row = np.where(CITY.part == 1, np.nan, LABELS)[None]
    one, other = (METHODS_HERE[name].predict(problem(city), "crime", row, [0])[0] for city in (CITY, others))
    np.testing.assert_array_equal(one[CITY.part != 1], other[CITY.part != 1])
    assert (one[CITY.part == 1] != other[CITY.part == 1]).any()


def test_a_few_labels_of_the_held_out_city_join_and_are_left_out_of_the_figures(tmp_path):
    splits = transfer(LABELS, CITY.part, seeds=[0, 1], few=4)
    assert (splits.few.sum(axis=1) == 12).all()
    assert not np.array_equal(splits.few[0], splits.few[1])
    assert ((splits.fold == -1) == splits.few).all()
    for row, (repetition, held_out) in zip(splits.training_labels(), splits.rows(), strict=True):
        mine = CITY.part == held_out
        np.testing.assert_array_equal(~np.isnan(row), ~mine | splits.few[repetition])
    without, joined = (predict(METHODS_HERE["kernels"], tmp_path, few=few) for few in (0, 4))
    assert np.isnan(joined.prediction[joined.fold < 0]).all()
    assert (without.prediction[joined.fold >= 0] != joined.prediction[joined.fold >= 0]).any()


def test_too_few_labels_or_cities_are_refused():
    with pytest.raises(BadData, match="too few labelled regions to hold any out"):
        transfer(LABELS, CITY.part, seeds=[0], few=21)
    with pytest.raises(BadData, match="too few cities with labels"):
        transfer(np.where(CITY.part == 0, LABELS, np.nan), CITY.part, seeds=[0])


def test_regions_of_different_cities_are_not_near_each_other():
    distance = problem().distance_m()
    assert (np.isinf(distance) == (CITY.part[:, None] != CITY.part)).all()
    near = plain_baselines.nearest_mean(distance, np.where(CITY.part == 1, np.nan, LABELS)[:, None])[:, 0]
    assert np.isnan(near[CITY.part == 1]).all()
    assert np.isfinite(near[CITY.part != 1]).all()


def test_methods_that_embed_one_city_are_left_out(tmp_path):
    with pytest.raises(UsageError, match="says nothing of another city"):
        PROTOCOLS["transfer"].predict(next(iter(LITERATURE.values()))(), problem(), "crime", LABELS, [0], tmp_path)


def test_one_fold_alone_has_no_resampled_t_test():
    labels = np.arange(8.0)
    one, other = (HeldOut(labels=labels, fold=np.zeros((1, 8), int), prediction=labels[None] + d) for d in (1, 2))
    assert compare(one, other).corrected_t_p is None
    assert compare(one, other).wilcoxon_p < 0.05


def test_order_and_level_tell_what_transfers():
    labels = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    predicted = np.array([[10.0, 20.0, 30.0, 40.0, 7.0], [2.0, 1.0, 3.0, 4.0, 7.0]])
    held_out = HeldOut(labels=labels, fold=np.array([[0, 0, 0, 0, -1]] * 2), prediction=predicted)
    order, level = order_and_level(held_out)
    assert order == pytest.approx((1 + 0.8) / 2)  # 1 - 6 Σd² / n(n² - 1) = 1 - 6 · 2 / 60
    assert level == pytest.approx((10 + 1) / 2)
    same = HeldOut(labels=labels, fold=held_out.fold[:1], prediction=np.full((1, 5), 5.0))
    assert order_and_level(same) == (None, pytest.approx(2.0))


@pytest.fixture
def folders(tmp_path):
    found = []
    for name, n in SIZES.items():
        regions, mobility = tiny_city_tables(n, n)
        found.append(tmp_path / name)
        found[-1].mkdir()
        pq.write_table(regions, found[-1] / "regions.parquet")
        pq.write_table(mobility, found[-1] / "mobility.parquet")
    return found


def test_the_command_writes_figures_by_city(folders, topt_deploy, tmp_path):
    options = ("--protocol", "transfer", "--tasks", "crime", "--seeds", 1, "--labels", 3, "--variants", "topt-kernels")
    out = tmp_path / "found"
    said = topt_deploy("evaluate", *reversed(folders), *options, "--baselines", "mean,ridge", "--out", out)
    assert said.code == 0, said
    record = json.loads((out / "results.json").read_text())
    assert record["few_labels"] == 3
    assert record["cities"] == SIZES
    found = {(r["method"], r["task"]): r["figures"]["mae"]["mean"] for r in record["results"]}
    assert {task for _, task in found} == {f"crime, {name}" for name in SIZES}
    city = cities()
    few = transfer(city.labels["crime"], city.part, seeds=[2024], few=3).few[0]
    for number, name in enumerate(SIZES):
        hidden = (city.part == number) & ~few
        expected = np.full(hidden.sum(), city.labels["crime"][~hidden].mean())
        mae = mean_absolute_error(city.labels["crime"][hidden], expected)
        assert found["mean", f"crime, {name}"] == pytest.approx(mae)
    assert "crime, birch" in said.out
    assert "Order / level, city by city" in said.out
    assert "| topt-kernels | 0" in said.out or "| topt-kernels | -0" in said.out
    assert "| ridge |" not in said.out.partition("Order / level")[2]


@pytest.mark.parametrize(
    ("names", "options", "part"),
    [
        (["ash"], ["--protocol", "transfer"], "several cities under transfer"),
        (["ash", "birch"], ["--protocol", "honest"], "several cities under transfer"),
        (["ash"], ["--protocol", "honest", "--labels", "5"], "--labels has a meaning under `transfer` alone"),
        (["ash", "birch"], ["--protocol", "transfer", "--coverage", "0.8"], "--coverage has no meaning"),
    ],
)
def test_what_the_command_refuses(folders, topt_deploy, tmp_path, names, options, part):
    said = topt_deploy("evaluate", *(tmp_path / name for name in names), *options, "--tasks", "crime", "--out", "x")
    assert said.code == 2, said
    assert part in said.err
