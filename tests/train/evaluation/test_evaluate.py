"""The whole path from labels to files: what it cannot see, how it goes on, what it refuses."""

import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import quiet, replaced, tiny_city, tiny_city_tables, write_tables
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from topt_deploy.data.city import infer_schema
from topt_deploy.errors import BadConfig, BadData
from topt_deploy.train import boosted_trees
from topt_deploy.train.cli import evaluate as command
from topt_deploy.train.evaluation.evaluate import Evaluation
from topt_deploy.train.evaluation.literature.embedding import TrainingRecipe
from topt_deploy.train.evaluation.plain_baselines import Mean
from topt_deploy.train.evaluation.problem import Problem
from topt_deploy.train.evaluation.protocols import PROTOCOLS, Protocol, fit_and_hold_out
from topt_deploy.train.evaluation.registry import METHODS, Entry
from topt_deploy.train.evaluation.results import Store, differing
from topt_deploy.train.evaluation.splits import Splits
from topt_deploy.train.loop import TrainingDevice

N = 14
CITY = tiny_city(N, prompts=("prompt_crime", "prompt_none"))
CPU = TrainingDevice(device=torch.device("cpu"))
SCHEMA = infer_schema(
    tiny_city_tables(N, prompts=("prompt_crime", "prompt_none"))[0],
    views=("poi", "land_use"),
    mobility=True,
    prompts=("prompt_crime", "prompt_none"),
)
FACTS = {"protocol": "honest", "seeds": [0, 1]}


@pytest.fixture(autouse=True)
def few_epochs(few_steps, monkeypatch):
    """The literature's methods at a hundredth of their cost, too."""
    monkeypatch.setattr(
        TrainingRecipe, "epochs", property(lambda recipe: 3, lambda recipe, epochs: None), raising=False
    )


def evaluation(folder, labels=None, protocol=PROTOCOLS["honest"], facts=FACTS, **more):
    return Evaluation(
        problem=Problem.of(CITY, SCHEMA, CPU, quiet()),
        labels=labels or CITY.labels,
        protocol=protocol,
        seeds=facts["seeds"],
        store=Store.open(folder, CITY.region_id, facts),
        **more,
    )


def entries(**methods):
    return {
        name: Entry(group="plain", make=lambda method=method: method, settings=repr(method))
        for name, method in methods.items()
    }


def results(folder, methods):
    store = Store.open(folder, CITY.region_id, json.loads((folder / "evaluation.json").read_text()))
    return {(r.method, r.task): r for r in store.load(methods)}


# What the honest path cannot see

HELD_OUT = np.array([1, 5, 6, 12])
FOLD = np.array([[0 if n in HELD_OUT else 1 + n % 2 for n in range(N)]])
FIXED = Protocol(
    meaning="These folds, whatever the labels are.",
    predict=lambda method, problem, task, labels, seeds, _: fit_and_hold_out(
        method, problem, task, Splits(labels=labels, fold=FOLD, seeds=tuple(seeds[:1]))
    ),
)


def leaks(tmp_path, entry):
    """Whether poisoning the labels of one fold changes a bit of what is predicted for it."""
    predictions = []
    for number, poison in enumerate((None, np.nan, 1e9)):
        labels = CITY.labels["crime"].copy()
        if poison is not None:
            labels[HELD_OUT] = poison
        folder = tmp_path / str(number)
        evaluation(folder, {"crime": labels}, FIXED).run({"it": entry})
        result = results(folder, {"it": entry})["it", "crime"]
        assert result.reason is None
        predictions.append(result.held_out.prediction[0, HELD_OUT])
    return not all(np.array_equal(predictions[0], poisoned) for poisoned in predictions[1:])


NEVER_RUN = {"mgfn", "regiondcl", "paper-rows"}
"""Under the honest protocols: what they read is not there, or their weights fit one city."""


@pytest.mark.parametrize("name", sorted(METHODS.keys() - NEVER_RUN))
def test_no_method_depends_on_a_held_out_label(tmp_path, name):
    assert not leaks(tmp_path, METHODS[name])


def filled(labels):
    """Rows of labels with each row's mean where it has none."""
    return np.where(np.isnan(labels), np.nanmean(labels, axis=1, keepdims=True), labels)


@dataclass(frozen=True)
class Echo:
    """Returns the label where it was given one."""

    def predict(self, problem, task, labels, seeds):
        return filled(labels)


@dataclass(frozen=True)
class Copier:
    """Has the label among its features, as far as it was given one."""

    def predict(self, problem, task, labels, seeds):
        poi = problem.inputs["poi"].double().numpy()
        return np.stack(
            [
                boosted_trees.fit_predict(boosted_trees.boosting(0), np.concatenate([poi, own[:, None]], axis=1), row)
                for row, own in zip(labels, filled(labels), strict=True)
            ]
        )


@dataclass(frozen=True)
class Selector:
    """Keeps the constant that scores best: on the row's own labels, or on all that it has seen in any row."""

    everywhere: bool

    def predict(self, problem, task, labels, seeds):
        constants = np.linspace(0, 60, 601)
        seen = [labels if self.everywhere else row for row in labels]
        scores = [[np.nanmedian(np.abs(truth - c)) for c in constants] for truth in seen]
        return np.repeat(constants[np.argmin(scores, axis=1)][:, None], N, axis=1)


@dataclass(frozen=True)
class Peeper:
    """Takes a label that its own row lacks from a row that has it."""

    def predict(self, problem, task, labels, seeds):
        with np.errstate(all="ignore"):
            elsewhere = np.nan_to_num(labels).max(axis=0)
        return np.where(np.isnan(labels), elsewhere, labels)


@pytest.mark.parametrize("method", [Echo(), Copier(), Selector(everywhere=False)], ids=repr)
def test_a_method_that_uses_all_of_its_own_row_is_none_the_wiser(tmp_path, method):
    assert not leaks(tmp_path, entries(it=method)["it"])


@pytest.mark.parametrize("method", [Peeper(), Selector(everywhere=True)], ids=repr)
def test_a_method_that_looks_into_other_rows_is_caught(tmp_path, method):
    """The test itself can fail: this is what a planted leak looks like."""
    assert leaks(tmp_path, entries(it=method)["it"])


@pytest.mark.parametrize("protocol", ["honest", "spatial"])
def test_copying_labels_is_no_better_than_their_mean(tmp_path, protocol):
    methods = entries(echo=Echo(), mean=Mean())
    evaluation(tmp_path, protocol=PROTOCOLS[protocol]).run(methods)
    found = results(tmp_path, methods)
    for task in CITY.labels:
        assert found["echo", task].held_out.metrics() == found["mean", task].held_out.metrics()


@pytest.mark.parametrize("protocol", ["honest", "spatial"])
def test_absurd_labels_change_nothing_where_they_are_held_out(tmp_path, protocol):
    """Through the real folds: one region at a time, which every repetition holds out once."""
    methods = {name: METHODS[name] for name in ("ridge+sqrt+flow+neighbours+lag", "boosting+sqrt+flow")}
    runs = []
    for value in (CITY.labels["crime"][3], 1e7):
        labels = CITY.labels["crime"].copy()
        labels[3] = value
        evaluation(tmp_path / str(value), {"crime": labels}, PROTOCOLS[protocol]).run(methods)
        runs.append(results(tmp_path / str(value), methods))
    for key in runs[0]:
        clean, poisoned = (run[key].held_out.prediction for run in runs)
        np.testing.assert_array_equal(clean[:, 3], poisoned[:, 3])
        assert (clean != poisoned).any()


def test_a_method_is_given_no_label_but_the_rows():
    assert Problem.of(CITY, SCHEMA, CPU, quiet()).city.labels == {}


# Files, and going on

CALLS: Counter[str] = Counter()


@dataclass(frozen=True)
class Constant:
    value: float
    error: type[BaseException] | None = field(default=None, repr=False)  # so that it has the same settings without

    def predict(self, problem, task, labels, seeds):
        CALLS[f"{self.value} {task}"] += 1
        if self.error is not None and task == "calls":
            raise self.error("it does not work here")
        return np.full(labels.shape, self.value)


def test_the_files_hold_every_prediction_and_scikit_learns_figures(tmp_path):
    labels = {"crime": np.where(np.arange(N) == 4, np.nan, CITY.labels["crime"])}
    evaluation(tmp_path, labels).run({"ridge": METHODS["ridge"]})
    table = pq.read_table(tmp_path / "crime" / "ridge.parquet").to_pandas()
    assert table["region_id"].tolist() == 2 * CITY.region_id.tolist()
    record = json.loads((tmp_path / "crime" / "ridge.json").read_text())
    for repetition, figures in enumerate(record["metrics"]):
        rows = table[table["repetition"] == repetition]
        assert rows["prediction"].isna().tolist() == (np.arange(N) == 4).tolist()
        rows = rows[rows["fold"] >= 0]
        truth, prediction = rows["label"], rows["prediction"]
        assert len(rows) == figures["regions"] == N - 1
        assert figures["mae"] == pytest.approx(mean_absolute_error(truth, prediction))
        assert figures["rmse"] == pytest.approx(root_mean_squared_error(truth, prediction))
        assert figures["r2"] == pytest.approx(r2_score(truth, prediction))


def test_stopped_and_called_again_it_goes_on(tmp_path):
    CALLS.clear()
    methods = entries(a=Constant(1), b=Constant(2), c=Constant(3))
    stopping = methods | entries(b=Constant(2, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path / "cut").run(stopping)
    done = sorted(str(path.relative_to(tmp_path / "cut")) for path in (tmp_path / "cut").rglob("*.json"))
    assert done == ["calls/a.json", "crime/a.json", "crime/b.json", "evaluation.json"]
    CALLS.clear()
    evaluation(tmp_path / "cut").run(methods)
    assert CALLS == {"2 calls": 1, "3 crime": 1, "3 calls": 1}
    evaluation(tmp_path / "whole").run(methods)
    for path in (tmp_path / "whole").rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()
    cut, whole = (results(tmp_path / name, methods) for name in ("cut", "whole"))
    assert list(cut) == list(whole) == [(m, t) for t in ("calls", "crime") for m in "abc"]


def test_other_facts_are_refused_by_name(tmp_path):
    evaluation(tmp_path).run(entries(a=Constant(1)))
    with pytest.raises(
        BadConfig, match=r"(?s)another evaluation.*expected: seeds \[0, 1, 2\]\n *found: *seeds \[0, 1\]\n.*--out"
    ):
        evaluation(tmp_path, facts=FACTS | {"seeds": [0, 1, 2]})
    with pytest.raises(BadConfig, match="mobility_sha256"):
        evaluation(tmp_path, facts=FACTS | {"mobility_sha256": "x"})


def test_other_settings_of_a_method_are_refused(tmp_path):
    evaluation(tmp_path).run(entries(a=Constant(1)))
    with pytest.raises(BadConfig, match=r"(?s)'a' are of other settings.*expected: .*value=2.*found: .*value=1"):
        evaluation(tmp_path).run(entries(a=Constant(2)))


def test_of_other_settings_the_error_names_those_alone():
    first = {"seed": 1, "tasks": {"any": {"target": {"transform": "cbrt"}, "ensemble": {"trees": 64}}}}
    second = {"seed": 1, "tasks": {"any": {"target": {"transform": "cbrt"}, "ensemble": {"trees": 0, "clip": [4.0]}}}}
    assert differing(json.dumps(first), json.dumps(second)) == (
        "tasks.any.ensemble.trees 64, tasks.any.ensemble.clip null",
        "tasks.any.ensemble.trees 0, tasks.any.ensemble.clip [4.0]",
    )
    assert differing("value=1", "value=2") == ("value=1", "value=2")


def test_a_method_that_cannot_run_is_listed_and_tried_again(tmp_path):
    methods = entries(a=Constant(1, BadData), b=Constant(2))
    for _ in range(2):
        CALLS.clear()
        evaluation(tmp_path).run(methods)
        found = results(tmp_path, methods)
        assert found["a", "calls"].reason == "it does not work here"
        assert found["a", "calls"].held_out is None
        assert found["a", "crime"].reason is None
        assert found["b", "calls"].reason is None
        assert CALLS["1 calls"] == 1
    evaluation(tmp_path).run(entries(a=Constant(1)))
    assert results(tmp_path, methods)["a", "calls"].reason is None


def test_a_bug_is_not_swallowed(tmp_path):
    with pytest.raises(ZeroDivisionError):
        evaluation(tmp_path).run(entries(a=Constant(1, ZeroDivisionError)))
    with pytest.raises(ValueError, match="must be counts"):
        evaluation(tmp_path).run(entries(b=Constant(-1)))


def test_one_instance_serves_all_tasks(tmp_path):
    made = []
    entry = Entry(group="plain", make=lambda: made.append(Constant(1)) or made[-1])
    evaluation(tmp_path).run({"a": entry})
    assert len(made) == 1


# The command


def test_the_command_offers_every_protocol():
    assert set(command.PROTOCOLS) == PROTOCOLS.keys()


@pytest.fixture
def folder(tmp_path):
    regions, mobility = tiny_city_tables(18)
    labels = [None if n == 3 else v for n, v in enumerate(regions["crime"].to_pylist())]
    write_tables(tmp_path / "city", replaced(regions, crime=labels), mobility)
    return tmp_path


def test_the_command_writes_a_page_and_adds_to_it(folder, topt_deploy):
    out, chosen = folder / "out", ("evaluate", folder / "city", "--seeds", 2, "--variants", "none")
    said = topt_deploy(*chosen, "--tasks", "crime", "--baselines", "mean,ridge+s*", "--coverage", 0.5, "--out", out)
    assert said.code == 0, said.err
    page = (out / "results.md").read_text()
    assert page in said.out
    assert "Protocol `honest`" in page
    assert "KFold(10, shuffled)" in page
    found = json.loads((out / "results.json").read_text())
    assert found["seeds"] == [command.FIRST_SEED, command.FIRST_SEED + 1]
    assert {r["method"] for r in found["results"]} == {"mean"} | {n for n in METHODS if n.startswith("ridge+sqrt")}
    assert all(r["coverage"]["nominal"] == 0.5 for r in found["results"])
    said = topt_deploy(*chosen, "--tasks", "calls", "--baselines", "mean", "--out", out)
    assert said.code == 0, said.err
    assert {r["task"] for r in json.loads((out / "results.json").read_text())["results"]} == {"crime", "calls"}


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--baselines", "bosting"), 2, "'bosting'"),
        (("--variants", "mean"), 2, "--variants: no such method"),
        (("--tasks", "check_in"), 65, "'check_in'"),
        (("--coverage", 0.99, "--baselines", "mean", "--tasks", "crime"), 2, "no interval can be given"),
        (("--protocol", "kind"), 2, "'kind' is not one of"),
    ],
)
def test_what_the_command_refuses(folder, topt_deploy, arguments, code, part):
    said = topt_deploy("evaluate", folder / "city", "--seeds", 1, "--out", folder / "out", *arguments)
    assert said.code == code, said
    assert part in said.err


def test_another_city_cannot_go_into_the_folder(folder, topt_deploy):
    command = ("evaluate", folder / "city", "--tasks", "crime", "--baselines", "mean", "--out", folder / "out")
    assert topt_deploy(*command).code == 0
    regions, mobility = tiny_city_tables(18, seed=5)
    write_tables(folder / "city", regions, mobility)
    said = topt_deploy(*command)
    assert said.code == 78
    assert "regions_sha256" in said.err


def test_coverage_is_refused_under_the_published_protocol(folder, topt_deploy):
    said = topt_deploy("evaluate", folder / "city", "--protocol", "paper", "--coverage", 0.9, "--out", folder / "out")
    assert said.code == 2
    assert "--coverage" in said.err
