"""The methods whole, on tiny cities: what they predict, what they share, what they may not see, what they refuse."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import TASKS, quiet, tiny_city, tiny_city_tables
from sklearn.linear_model import RidgeCV
from torch import nn

from topt_deploy.data.city import City, Schema, infer_schema, read_city
from topt_deploy.errors import BadConfig, BadData
from topt_deploy.model.prompt4re import ALPHAS
from topt_deploy.train.evaluation.literature import LITERATURE
from topt_deploy.train.evaluation.literature.embedding import EmbeddingMethod, Learner, TrainingRecipe, minimise
from topt_deploy.train.evaluation.literature.flexireg import FlexiRegStyle
from topt_deploy.train.evaluation.literature.hafusion import HaFusion
from topt_deploy.train.evaluation.literature.hrep import Hrep
from topt_deploy.train.evaluation.literature.mgfn import Mgfn
from topt_deploy.train.evaluation.literature.mvure import Mvure
from topt_deploy.train.evaluation.literature.recp import Recp
from topt_deploy.train.evaluation.literature.regiondcl import RegionDcl
from topt_deploy.train.evaluation.problem import Method, Problem
from topt_deploy.train.loop import TrainingDevice

SHORT = TrainingRecipe(epochs=3, lr=1e-3)
METHODS: Mapping[str, Callable[[], EmbeddingMethod]] = {
    "mvure": lambda: Mvure(SHORT),
    "hrep": lambda: Hrep(SHORT, prompt=SHORT),
    "recp": lambda: Recp(SHORT),
    "hafusion": lambda: HaFusion(SHORT),
    "flexireg-style": lambda: FlexiRegStyle(SHORT),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def problem_of(city: City) -> Problem:
    schema = Schema(
        views={view: tuple(map(str, range(x.shape[1]))) for view, x in city.views.items()},
        mobility=city.flows is not None,
        prompts={column: x.shape[1] for column, x in city.prompts.items()},
    )
    return Problem.of(city, schema, TrainingDevice(device=torch.device("cpu")), quiet())


@pytest.fixture(scope="module")
def city() -> City:
    return tiny_city(14, seed=1, prompts=("prompt_none",))


@pytest.fixture(scope="module")
def problem(city: City) -> Problem:
    return problem_of(city)


def folds(labels: np.ndarray, count: int = 3) -> np.ndarray:
    """Rows of labels, each without every count-th."""
    rows = np.tile(labels, (count, 1))
    for k in range(count):
        rows[k, k::count] = np.nan
    return rows


@EACH
def test_predicts_counts_of_every_region(method: Callable[[], Method], city: City, problem: Problem) -> None:
    rows = folds(city.labels["crime"])
    predicted = method().predict(problem, "crime", rows, [0, 0, 0])
    assert predicted.shape == rows.shape
    assert predicted.dtype == np.float64
    assert (predicted >= 0).all()
    assert np.isfinite(predicted).all()
    again = method().predict(problem_of(city), "crime", rows, [0, 0, 0])
    np.testing.assert_array_equal(again, predicted)


@EACH
def test_a_row_does_not_see_other_rows(method: Callable[[], Method], city: City, problem: Problem) -> None:
    """What one row holds out is known to the others; poisoned there, the row's predictions stay."""
    rows = folds(city.labels["crime"])
    clean = method().predict(problem, "crime", rows, [0, 0, 0])
    poisoned = rows.copy()
    poisoned[1:, np.isnan(rows[0])] = 1e6
    got = method().predict(problem, "crime", poisoned, [0, 0, 0])
    np.testing.assert_allclose(got[0], clean[0], rtol=1e-5)
    assert not np.allclose(got[1], clean[1])


@EACH
def test_an_embedding_sees_no_label(method: Callable[[], EmbeddingMethod], city: City) -> None:
    poisoned = replace(city, labels={task: np.full(len(city), np.nan) for task in TASKS})
    torch.testing.assert_close(
        method().embedding(problem_of(city), 3), method().embedding(problem_of(poisoned), 3), rtol=0, atol=0
    )


@EACH
def test_rows_of_the_tables_mean_nothing(method: Callable[[], Method]) -> None:
    regions, mobility = tiny_city_tables(10, seed=5, prompts=("prompt_none",))
    rng = np.random.default_rng(0)
    cities = []
    for tables in ((regions, mobility), (shuffled(regions, rng), shuffled(mobility, rng))):
        schema = infer_schema(tables[0], views=("poi", "land_use"), mobility=True, prompts=("prompt_none",))
        cities.append(read_city(*tables, schema, labels=TASKS))
    first, second = (
        method().predict(problem_of(city), "crime", folds(city.labels["crime"]), [0, 0, 1]) for city in cities
    )
    np.testing.assert_array_equal(first, second)


def shuffled(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    return table.take(pa.array(rng.permutation(len(table))))


class Counted(EmbeddingMethod):
    """Random embeddings, counted."""

    name = "counted"
    paper = TrainingRecipe(epochs=0, lr=1.0)
    calls = 0

    def build(self, problem: Problem) -> Learner:
        self.calls += 1
        return Learner(
            module=Point(), loss=lambda _: torch.zeros(()), embed=lambda: torch.randn(len(problem.city), 5) * 40
        )


def test_one_embedding_per_problem_and_seed_whatever_the_task(city: City, problem: Problem) -> None:
    method = Counted()
    for task in TASKS:
        rows = np.tile(city.labels[task], (4, 1))
        predicted = method.predict(problem, task, rows, [7, 8, 7, 8])
        # But for the last bit, which linear algebra rounds by a row's place among others on some processors.
        np.testing.assert_allclose(predicted[:2], predicted[2:], rtol=4e-15, atol=0)
        assert not np.allclose(predicted[0], predicted[1])
    assert method.calls == 2
    method.predict(problem_of(city), "crime", rows, [7, 7, 7, 7])
    assert method.calls == 3


def test_flexireg_style_stands_on_hafusions_own_embedding(problem: Problem) -> None:
    assert FlexiRegStyle(SHORT).embedding(problem, 4) is HaFusion(SHORT).embedding(problem, 4)
    longer = replace(SHORT, epochs=4)
    assert not torch.equal(HaFusion(longer).embedding(problem, 4), HaFusion(SHORT).embedding(problem, 4))


def test_the_regression_is_ridge_with_leave_one_out_on_the_scaled_embedding(city: City, problem: Problem) -> None:
    method, rows = Counted(), folds(city.labels["crime"] - 30)  # so that some predictions are clipped
    predicted = method.predict(problem, "crime", rows, [0, 0, 0])
    embedding = method.embedding(problem, 0).double().numpy()
    x = embedding - embedding.mean(axis=0)
    x /= np.sqrt((x**2).mean())
    for row, got in zip(rows, predicted, strict=True):
        known = ~np.isnan(row)
        expected = RidgeCV(alphas=ALPHAS).fit(x[known], row[known]).predict(x)
        np.testing.assert_allclose(got, np.maximum(expected, 0), rtol=1e-6, atol=1e-6)
    assert (predicted == 0).any()


def test_seeds_give_different_embeddings(problem: Problem) -> None:
    method = Mvure(SHORT)
    assert not torch.allclose(method.embedding(problem, 0), method.embedding(problem, 1))
    assert method.embedding(problem, 0).shape == (14, 144)


def test_a_recipe_lowers_the_rate_in_steps() -> None:
    recipe = TrainingRecipe(epochs=10, lr=1.0, step=4, decay=0.5)
    assert [recipe.rate(epoch) for epoch in (0, 3, 4, 9)] == [1, 1, 0.5, 0.25]


class Point(nn.Module):
    """Two numbers to be moved."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(2))


def test_minimise_reaches_a_known_minimum_and_refuses_what_is_not_finite(problem: Problem) -> None:
    point, goal = Point(), torch.tensor([0.5, -1.5])
    minimise(
        point,
        lambda _: (point.at - goal).square().sum(),
        TrainingRecipe(epochs=400, lr=0.05),
        stage="point",
        problem=problem,
    )
    torch.testing.assert_close(point.at.detach(), goal, rtol=0, atol=1e-3)
    assert not point.training
    with pytest.raises(BadConfig, match="not finite at epoch 1"):
        minimise(point, lambda _: point.at.sum() / 0, TrainingRecipe(epochs=1, lr=1.0), stage="point", problem=problem)


@EACH
def test_refuses_a_city_without_flows(method: Callable[[], Method], city: City) -> None:
    still = problem_of(replace(city, flows=None))
    with pytest.raises(BadData, match="this city has none"):
        method().predict(still, "crime", folds(city.labels["crime"]), [0, 0, 0])


@EACH
def test_refuses_too_few_labels(method: Callable[[], Method], city: City, problem: Problem) -> None:
    rows = folds(city.labels["crime"])
    rows[1, 2:] = np.nan
    with pytest.raises(BadData, match="too few labels of 'crime'"):
        method().predict(problem, "crime", rows, [0, 0, 0])


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (Hrep, {"views": "land_use"}, "HREP needs POI counts"),
        (Hrep, {"regions": 4}, "HREP needs regions that are not neighbours"),
        (FlexiRegStyle, {"prompts": {}}, "needs prompts without a task"),
        (Mgfn, {}, "one per hour"),
        (RegionDcl, {}, "shapes of buildings"),
    ],
)
def test_refuses_what_the_data_does_not_carry(
    method: Callable[[], Method], change: dict[str, Any], message: str, city: City
) -> None:
    if "regions" in change:
        city = tiny_city(change["regions"], seed=2, prompts=("prompt_none",))
    if "views" in change:
        city = replace(city, views={change["views"]: city.views[change["views"]]})
    if "prompts" in change:
        city = replace(city, prompts=change["prompts"])
    with pytest.raises(BadData, match=message) as refusal:
        method().predict(problem_of(city), "crime", city.labels["crime"][None], [0])
    assert refusal.value.expected
    assert refusal.value.fix


def test_the_literature_is_whole() -> None:
    assert set(LITERATURE) == METHODS.keys() | {"mgfn", "regiondcl"}
    for make in LITERATURE.values():
        assert callable(make().predict)
