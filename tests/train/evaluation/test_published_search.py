"""The published search: what a trial draws, which one is taken, what is shown beside it, and who cannot reach it."""

import inspect
import json

import numpy as np
import pytest
import torch
from builders import quiet, tiny_city, tiny_city_tables, write_tables

from topt_deploy.data.city import infer_schema
from topt_deploy.errors import BadConfig, UsageError
from topt_deploy.train.evaluation import published_protocol, published_search
from topt_deploy.train.evaluation.plain_baselines import Mean
from topt_deploy.train.evaluation.problem import Problem
from topt_deploy.train.evaluation.protocols import PROTOCOLS
from topt_deploy.train.evaluation.published_protocol import looks, published_folds, selected_embedding
from topt_deploy.train.evaluation.published_search import RATES, SOFT_PROMPTS, Search, Trial, search
from topt_deploy.train.evaluation.topt_variants import Topt
from topt_deploy.train.loop import TrainingDevice, Workplace
from topt_deploy.train.metrics import metrics
from topt_deploy.train.prompt4re import train_head

N = 13
PROMPTS = ("prompt_crime", "prompt_none")
CITY = tiny_city(N, prompts=PROMPTS)
LABELS = CITY.labels["crime"]
SCHEMA = infer_schema(
    tiny_city_tables(N, prompts=PROMPTS)[0], views=("poi", "land_use"), mobility=True, prompts=PROMPTS
)
PAPER = Topt(
    "paper", "srel.width=8", "srel.heads=2", "srel.layers=1", "srel.epochs=31", "srel.lr=3e-3", "prompt4re.epochs=41",
    "prompt4re.folds=3", "prompt4re.value_width=4",
)  # fmt: skip
SETTINGS = PAPER.config("crime", 0).tasks["crime"]
SEEDS = (7, 8)


@pytest.fixture(scope="module")
def problem():
    return Problem.of(CITY, SCHEMA, TrainingDevice(device=torch.device("cpu")), quiet())


@pytest.fixture
def run(problem, tmp_path):
    """The search's page and, for machines, its results and the figures of every trial and run."""

    def call(trials, methods=None):
        page = search(
            problem, {"crime": LABELS}, {}, methods or {"paper": PAPER}, trials=trials, seeds=SEEDS, out=tmp_path
        )
        (found,) = json.loads((tmp_path / "results.json").read_text())["results"]
        files = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "crime" / "paper").iterdir()}
        return page, found, files

    return call


@pytest.fixture
def trained(monkeypatch):
    """The seeds of all heads that are trained from here on."""
    seeds, whole = [], published_search.predict_folds
    monkeypatch.setattr(published_search, "predict_folds", lambda *a: (seeds.append(a[-1]), whole(*a))[1])
    return seeds


def test_a_trial_is_the_same_whatever_the_number_of_trials():
    assert Trial.draw(5, SETTINGS, SEEDS) == Trial.draw(5, SETTINGS, SEEDS)
    first = Trial.draw(0, SETTINGS, SEEDS)
    assert first.settings(SETTINGS) == SETTINGS
    assert (first.embedding_seed, first.seed, first.every) == (7, 7, 30)


def test_rates_are_log_uniform_and_everything_that_can_be_drawn_is():
    many = [Trial.draw(number, SETTINGS, SEEDS) for number in range(1, 801)]
    share = (np.log([trial.lr for trial in many]) - np.log(RATES[0])) / np.log(RATES[1] / RATES[0])
    np.testing.assert_allclose(np.quantile(share, [0, 0.25, 0.5, 0.75, 1]), [0, 0.25, 0.5, 0.75, 1], atol=0.05)
    assert {trial.soft_prompt for trial in many} == set(SOFT_PROMPTS)
    assert {trial.embedding_seed for trial in many} == set(SEEDS)
    assert {trial.every for trial in many} == {10, 30}
    assert {trial.epochs for trial in many} == {41}, "no more epochs than the preset has"
    assert len({trial.seed for trial in many}) == len(many)
    long = Topt("paper").config("crime", 0).tasks["crime"]
    assert {Trial.draw(number, long, SEEDS).epochs for number in range(1, 50)} == {1000, 2000, 3000}


def test_the_best_trial_is_taken_and_run_with_every_seed(run, trained):
    page, found, files = run(4)
    scores = {name: own["selected"]["r2"] for name, own in files.items() if name.startswith("trial")}
    assert len(scores) == 4
    best = max(scores, key=scores.__getitem__)
    assert found["best"]["selected"]["r2"] == scores[best]
    drawn = files[best]["trial"]
    assert found["best"]["trial"] == drawn
    runs = [own["trial"] for name, own in files.items() if name.startswith("run")]
    assert sorted(own["seed"] for own in runs) == list(SEEDS)
    assert all(own | {"seed": 0, "embedding_seed": 0} == drawn | {"seed": 0, "embedding_seed": 0} for own in runs)
    assert f"| crime | paper | 4 | {found['best']['selected']['mae']:.1f} / " in page
    assert "best of 4 random trials" in page
    for figures in ("selected", "last"):
        mae = [own[figures]["mae"] for own in found["runs"]]
        assert f"{np.mean(mae):.1f} ± {np.std(mae, ddof=1):.1f}" in page
    assert len(trained) == 4 + 2 * len(SEEDS)


def test_it_goes_on_from_what_is_there(run, trained):
    first, *_ = run(2)
    trained.clear()
    again, *_ = run(2)
    assert again == first
    assert trained == []
    _, found, files = run(3)
    assert sum(name.startswith("trial") for name in files) == found["trials"] == 3
    assert trained[0] == 2
    assert len(trained) in (1, 1 + 2 * len(SEEDS))  # the runs again, if the third trial is the best


def test_results_of_other_settings_are_not_taken(run):
    run(1)
    with pytest.raises(BadConfig, match=r"of other settings(?s:.)*settings.srel.bias 0.3"):
        run(1, {"paper": Topt("paper", *PAPER.overrides, "srel.bias=0.3")})


def test_a_trials_figures_are_the_protocols_with_its_settings(problem, tmp_path):
    one = Search(
        problem=problem, task="crime", labels=LABELS, settings=SETTINGS, seeds=SEEDS, folder=tmp_path / "own",
        cache=tmp_path,
    )  # fmt: skip
    for outcome in one.trials(3):
        drawn = outcome.trial
        own = drawn.settings(SETTINGS)
        assert (own.prompt4re.lr, own.prompt4re.soft_prompt) == (drawn.lr, drawn.soft_prompt)
        offered = looks(problem, SETTINGS.srel, seed=drawn.embedding_seed, cache=tmp_path)
        embedding = selected_embedding(offered, LABELS, own, every=drawn.every)
        fold = published_folds(LABELS, own)
        found = published_protocol.predict_folds(problem, "crime", embedding, LABELS, fold, own, drawn.seed)
        assert outcome.selected == metrics(LABELS, found.selected)
        assert outcome.last is None


def test_beside_it_stand_both_stages_last_epochs_without_dropout(problem, tmp_path):
    """By the road of ``topt-deploy train``, which selects nothing, under the same folds."""
    one = Search(
        problem=problem, task="crime", labels=LABELS, settings=SETTINGS, seeds=SEEDS, folder=tmp_path / "own",
        cache=tmp_path,
    )  # fmt: skip
    trial = Trial.draw(1, SETTINGS, SEEDS)
    config = PAPER.config(
        "crime", 8, f"prompt4re.lr={trial.lr}", f"prompt4re.soft_prompt={trial.soft_prompt}", "prompt4re.epochs=41"
    )
    last = looks(problem, SETTINGS.srel, seed=8, cache=tmp_path).last
    fold = published_folds(LABELS, SETTINGS)
    rows = np.where(fold != np.arange(3)[:, None], LABELS, np.nan)
    place = Workplace(engine=problem.engine, reporter=quiet())
    trained = train_head(last, torch.zeros(N, 1), problem.inputs["prompt_crime"], rows, config, "crime", place)
    expected = metrics(LABELS, trained.predicted[fold, np.arange(N)])
    found = next(outcome for outcome in one.runs(trial) if outcome.trial.seed == 8).last
    np.testing.assert_allclose([found.mae, found.rmse, found.r2], [expected.mae, expected.rmse, expected.r2], rtol=1e-3)


def test_other_variants_run_the_settings_that_were_found_for_the_first(problem, tmp_path, trained):
    methods = {"paper": PAPER, "paper-no-alignment": Topt("paper", *PAPER.overrides, "prompt4re.alignment=false")}
    page = search(problem, {"crime": LABELS}, {}, methods, trials=3, seeds=SEEDS, out=tmp_path)
    whole, ablation = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (whole["trials"], ablation["trials"]) == (3, 0)
    assert [own["trial"] for own in ablation["runs"]] == [own["trial"] for own in whole["runs"]]
    assert ablation["runs"] != whole["runs"]
    assert ablation["best"] in ablation["runs"]
    assert ablation["best"]["selected"]["r2"] == max(own["selected"]["r2"] for own in ablation["runs"])
    assert "| crime | paper-no-alignment | – |" in page
    assert len(trained) == 3 + 4 * len(SEEDS)


def test_only_the_papers_own_models_are_searched(run):
    for method in (Topt("default"), Mean()):
        with pytest.raises(UsageError, match="the paper's own models"):
            run(1, {"other": method})


# Who cannot reach it


def test_nothing_of_it_is_reached_from_the_honest_protocols(problem, tmp_path, monkeypatch):
    def reached(*_, **__):
        raise AssertionError("the published protocol was reached")

    for module in (published_protocol, published_search):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                monkeypatch.setattr(module, name, reached)
    with pytest.raises(AssertionError, match="was reached"):
        PROTOCOLS["paper"].predict(PAPER, problem, "crime", LABELS, [0], tmp_path)
    for protocol in ("honest", "spatial"):
        found = PROTOCOLS[protocol].predict(PAPER, problem, "crime", LABELS, [0], tmp_path)
        assert (found.prediction >= 0).all()
    assert list(tmp_path.iterdir()) == [], "an embedding that labels chose might be found there"


def test_the_command_searches_under_the_published_protocol_alone(topt_deploy, tmp_path, few_steps):
    city = write_tables(tmp_path / "city", *tiny_city_tables(N, prompts=PROMPTS))
    command = ("evaluate", city, "--tasks", "crime", "--out", tmp_path / "out")
    for protocol in ("honest", "spatial"):
        said = topt_deploy(*command, "--protocol", protocol, "--search", 2)
        assert said.code == 2
        assert "--search" in said.err
        assert not (tmp_path / "out").exists()
    said = topt_deploy(*command, "--protocol", "paper", "--search", 1, "--runs", 1)
    assert said.code == 0, said.err
    assert "| crime | paper | 1 |" in said.out
    assert "min left" in said.err
