"""The published protocol: what it selects, that it selects on held-out labels, and that nothing else does."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import quiet, task_config, tiny_city, tiny_city_tables
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold

from topt_deploy.config.settings import Config
from topt_deploy.data.city import infer_schema
from topt_deploy.errors import BadConfig, BadData, UsageError
from topt_deploy.model.prompt4re import Prompt4Re, PromptBasis
from topt_deploy.train.evaluation import published_protocol
from topt_deploy.train.evaluation.plain_baselines import Mean
from topt_deploy.train.evaluation.problem import Problem
from topt_deploy.train.evaluation.protocols import PROTOCOLS
from topt_deploy.train.evaluation.published_protocol import best_look, hold_out, looks, selected_embedding
from topt_deploy.train.evaluation.topt_variants import VARIANTS, Topt
from topt_deploy.train.loop import TrainingDevice, Workplace
from topt_deploy.train.prompt4re import fold_of
from topt_deploy.train.srel import embed, train_embedding

N = 14
PROMPTS = ("prompt_crime", "prompt_none")
CITY = tiny_city(N, prompts=PROMPTS)
LABELS = CITY.labels["crime"]
SCHEMA = infer_schema(
    tiny_city_tables(N, prompts=PROMPTS)[0], views=("poi", "land_use"), mobility=True, prompts=PROMPTS
)
SOURCES = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def problem():
    return Problem.of(CITY, SCHEMA, TrainingDevice(device=torch.device("cpu")), quiet())


def settings(srel=None, prompt4re=None, target=None):
    return task_config(srel, {"dropout": 0.0, "fold_seed": 2024, **(prompt4re or {})}, target)


def embedding_of(problem, labels, own, *, seed, cache):
    return selected_embedding(looks(problem, own.srel, seed=seed, cache=cache), labels, own)


def squared_errors(held_out, labels=LABELS):
    """Per fold, of the first repetition."""
    fold, error = held_out.fold[0], np.square(held_out.prediction[0] - labels)
    return np.array([error[fold == k].sum() for k in range(fold.max() + 1)])


# Stage 2


def slow_head(start, k, embedding, coordinates, labels, trains, *, heads, lr, epochs):
    """One fold's head, written down once more with nothing batched: predictions after epochs 1, 21, 41 …"""
    weight = {name: tensor[k].clone() for name, tensor in start.items()}
    y = labels[trains]
    mean, scale = y.mean(), y.std()
    ridge = Ridge(alpha=1.0).fit(embedding[trains].double().numpy(), (y - mean) / scale)
    weight["linear.weight"][: embedding.shape[1], 0] = torch.tensor(ridge.coef_)
    weight["linear.bias"][0, 0] = float(ridge.intercept_)
    for tensor in weight.values():
        tensor.requires_grad_()
    adam = torch.optim.Adam(weight.values(), lr=lr)

    def linear(name, x):
        return x @ weight[f"{name}.weight"] + weight[f"{name}.bias"]

    def forward():
        q, key, v = (
            linear("alignment.query", embedding),
            *(linear(f"alignment.{name}", coordinates) for name in ("key", "value")),
        )
        mixed = []
        for h in range(heads):
            own = slice(h * q.shape[1] // heads, (h + 1) * q.shape[1] // heads)
            scores = q[:, own] @ key[:, own].T / np.sqrt(q.shape[1] // heads)
            mixed.append(torch.softmax(scores, dim=1) @ v[:, own])
        aligned = torch.cat(mixed, dim=1) + linear("alignment.residual", embedding)
        aligned = torch.nn.functional.layer_norm(
            aligned, aligned.shape[1:], weight["alignment.norm.weight"][0], weight["alignment.norm.bias"][0]
        )
        return linear("linear", torch.cat([embedding, linear("soft_prompt", aligned)], dim=1))[:, 0]

    snapshots = []
    for epoch in range(epochs):
        adam.zero_grad()
        loss = (forward()[trains] - torch.tensor((y - mean) / scale).float()).square().mean()
        loss.backward()
        adam.step()
        if epoch % 20 == 0:
            snapshots.append(np.maximum(forward().detach().double().numpy() * scale + mean, 0))
    return snapshots


@pytest.mark.parametrize("drop_zeros", [False, True])
def test_each_fold_keeps_its_own_best_epoch_as_a_loop_over_folds_does(problem, tmp_path, drop_zeros):
    labels = LABELS.copy()
    labels[[2, 9]] = 0
    labels[5] = np.nan
    own = settings(prompt4re={"epochs": 62, "lr": 0.03}, target={"drop_zeros": drop_zeros})
    held_out = hold_out(problem, "crime", labels, own, seeds=[3], cache=tmp_path)

    regions = np.flatnonzero((labels > 0) if drop_zeros else ~np.isnan(labels))
    embedding = embedding_of(problem, labels, own, seed=3, cache=tmp_path)[regions]
    prompts = problem.inputs["prompt_crime"][regions]
    problem.engine.seed(3, "prompt4re/crime")
    coordinates = PromptBasis.fit(prompts)(prompts)
    start = Prompt4Re(members=3, inputs=8, width=8, rank=coordinates.shape[1], config=own.prompt4re).state_dict()
    expected, chosen = np.full(N, np.nan), []
    for k, (trains, tests) in enumerate(KFold(3, shuffle=True, random_state=2024).split(regions)):
        y = labels[regions]
        snapshots = slow_head(start, k, embedding, coordinates, y, trains, heads=2, lr=0.03, epochs=62)
        chosen.append(int(np.argmax([r2_score(y[tests], snapshot[tests]) for snapshot in snapshots])))
        expected[regions[tests]] = snapshots[chosen[-1]][tests]
    assert len(set(chosen)) > 1, "no test of choosing: every fold takes the same epoch"
    np.testing.assert_allclose(held_out.prediction[0], expected, rtol=2e-3)
    np.testing.assert_array_equal(held_out.fold[0] >= 0, ~np.isnan(expected))


def test_choosing_by_the_held_out_labels_helps_where_there_is_nothing_to_learn(problem, tmp_path):
    """No weight moves: all that differs between epochs is the dropout's noise, and still the error falls."""
    frozen = {"lr": 0.0, "dropout": 0.6}
    once, often = (
        hold_out(problem, "crime", LABELS, settings(prompt4re=frozen | {"epochs": e}), seeds=[0], cache=tmp_path)
        for e in (1, 401)
    )
    assert (squared_errors(often) <= squared_errors(once)).all()
    assert squared_errors(often).sum() < 0.9 * squared_errors(once).sum()
    undisturbed = settings(prompt4re=frozen | {"epochs": 401, "dropout": 0.0})
    still = hold_out(problem, "crime", LABELS, undisturbed, seeds=[0], cache=tmp_path)
    assert not np.allclose(once.prediction, still.prediction), "dropout is not active when the fold is predicted"


def test_runs_differ_in_initialisation_and_not_in_folds(problem, tmp_path):
    held_out = hold_out(problem, "crime", LABELS, settings(), seeds=[0, 1], cache=tmp_path)
    fold = fold_of(LABELS, folds=3, seed=2024, drop_zeros=False)
    np.testing.assert_array_equal(held_out.fold, [fold, fold])
    assert held_out.prediction.shape == (2, N)
    assert not np.allclose(*held_out.prediction)
    assert (held_out.prediction >= 0).all()


# Stage 1


def test_the_embedding_is_the_epoch_that_a_ridge_predicts_best_from(problem, tmp_path, monkeypatch):
    offered = []

    def keep(embedding, *arguments, **more):
        offered.append(embedding.clone())
        return ridge_predictions(embedding, *arguments, **more)

    ridge_predictions = published_protocol.ridge_predictions
    monkeypatch.setattr(published_protocol, "ridge_predictions", keep)
    own = settings(srel={"epochs": 185, "lr": 3e-3}, target={"drop_zeros": True})
    labels = LABELS.copy()
    labels[[0, 7]] = 0
    seen = looks(problem, own.srel, seed=1, cache=tmp_path)
    assert len(seen.embeddings) == 19  # epochs 1, 11, … 181
    embedding = selected_embedding(seen, labels, own)
    assert len(offered) == 7  # epochs 1, 31, … 181

    regions = np.flatnonzero(labels)
    scores = []
    for e in offered:
        predicted, x = np.zeros(len(regions)), e.double().numpy()[regions]
        for trains, tests in KFold(len(regions), shuffle=True, random_state=2024).split(regions):  # fewer than 25
            predicted[tests] = Ridge(alpha=1.0).fit(x[trains], labels[regions[trains]]).predict(x[tests])
        scores.append(r2_score(labels[regions], np.maximum(predicted, 0)))
    best = int(np.argmax(scores))
    assert best < 6, "no test of choosing: the last epoch is the best"
    torch.testing.assert_close(embedding, offered[best])
    monkeypatch.undo()
    assert best_look(seen.embeddings, labels, own) == 3 * best
    finer = best_look(seen.embeddings, labels, own, every=10)
    torch.testing.assert_close(selected_embedding(seen, labels, own, every=10), seen.embeddings[finer])


def test_looking_at_the_embedding_leaves_its_training_as_it_is(problem, tmp_path):
    """After the last epoch the embedding is the one that ``topt-deploy train`` would have."""
    config = Config(seed=1, tasks={"paper": settings(srel={"epochs": 61, "dropout": 0.3})})
    place = Workplace(engine=problem.engine, reporter=quiet())
    trained = train_embedding(CITY, problem.inputs, SCHEMA, config, "paper", place)
    seen = looks(problem, config.tasks["paper"].srel, seed=1, cache=tmp_path)
    torch.testing.assert_close(seen.last, embed(trained, problem.inputs), rtol=0, atol=0)


def test_the_embedding_is_looked_at_with_dropout_active(problem, tmp_path):
    """No weight moves, so that without dropout all looks are alike."""
    undisturbed, disturbed = (
        looks(
            problem,
            settings(srel={"epochs": 21, "lr": 0.0, "weight_decay": 0.0, "dropout": d}).srel,
            seed=0,
            cache=tmp_path,
        )
        for d in (0.0, 0.3)
    )
    torch.testing.assert_close(undisturbed.embeddings, undisturbed.last.expand(3, -1, -1))
    torch.testing.assert_close(disturbed.last, undisturbed.last)
    assert (disturbed.embeddings - disturbed.last).abs().amax(dim=(1, 2)).min() > 1e-3


def test_raw_rows_are_the_counts_and_the_flows_as_they_are(problem, tmp_path, monkeypatch):
    given = []
    train = published_protocol.train_embedding
    monkeypatch.setattr(published_protocol, "train_embedding", lambda *a, **k: (given.append(a[1]), train(*a, **k))[1])
    seen = looks(problem, settings(srel={"inputs": "rows", "width": 6}).srel, seed=0, cache=tmp_path)
    (inputs,) = given
    np.testing.assert_array_equal(inputs["poi"], CITY.views["poi"])
    expected = np.zeros((N, N), np.float32)
    for origin, destination, flow in zip(CITY.flows.origin, CITY.flows.dest, CITY.flows.flow, strict=True):
        expected[origin, destination] = flow
    np.testing.assert_array_equal(inputs["mobility"], expected)
    assert seen.last.shape == (N, 6)
    config = Config(tasks={"crime": settings(srel={"inputs": "rows"})})
    with pytest.raises(BadConfig, match="fit one city"):
        train_embedding(
            CITY, problem.inputs, SCHEMA, config, "crime", Workplace(engine=problem.engine, reporter=quiet())
        )


def test_without_prompt4re_the_prediction_is_the_ridge_on_the_embedding(problem, tmp_path):
    own = settings(prompt4re={"enabled": False})
    held_out = hold_out(problem, "crime", LABELS, own, seeds=[2], cache=tmp_path)
    x = embedding_of(problem, LABELS, own, seed=2, cache=tmp_path).double().numpy()
    for trains, tests in KFold(3, shuffle=True, random_state=2024).split(x):
        expected = Ridge(alpha=1.0).fit(x[trains], LABELS[trains]).predict(x[tests])
        np.testing.assert_allclose(held_out.prediction[0, tests], expected, rtol=1e-6)


def test_a_ridge_that_falls_below_zero_predicts_zero():
    x = np.arange(12.0)
    predicted = published_protocol.ridge_predictions(
        torch.tensor(x[:, None]), np.maximum(x - 9, 0), x.astype(int) % 3, alpha=1.0
    )
    assert (predicted[:3] == 0).all()
    assert predicted[11] > 0


# The cache


def test_an_interrupted_run_goes_on_with_the_embeddings_that_are_there(problem, tmp_path, monkeypatch):
    whole = hold_out(problem, "crime", LABELS, settings(), seeds=[0, 1], cache=tmp_path / "whole")
    cut = tmp_path / "cut"
    hold_out(problem, "crime", LABELS, settings(), seeds=[0], cache=cut)
    trained = []
    train = published_protocol.train_embedding
    monkeypatch.setattr(
        published_protocol, "train_embedding", lambda *a, **k: (trained.append(a[3].seed), train(*a, **k))[1]
    )
    resumed = hold_out(problem, "crime", LABELS, settings(), seeds=[0, 1], cache=cut)
    assert trained == [1]
    np.testing.assert_array_equal(resumed.prediction, whole.prediction)

    trained.clear()
    no_alignment = settings(prompt4re={"alignment": False})
    hold_out(problem, "crime", LABELS, no_alignment, seeds=[0, 1], cache=cut)
    assert trained == [], "a variant of stage 2 alone trains stage 1 again"


@pytest.mark.parametrize("changed", ["seed", "settings", "features"])
def test_an_embedding_of_other_settings_or_data_is_not_taken(problem, tmp_path, changed):
    before = looks(problem, settings().srel, seed=0, cache=tmp_path)
    other, own, seed = problem, settings(), 0
    if changed == "seed":
        seed = 1
    elif changed == "settings":
        own = settings(srel={"bias": 0.2})
    else:
        other = replace(problem, inputs=dict(problem.inputs) | {"poi": problem.inputs["poi"] + 1})
    looks(other, own.srel, seed=seed, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    again = looks(problem, settings().srel, seed=0, cache=tmp_path)
    assert torch.equal(again.embeddings, before.embeddings)
    assert torch.equal(again.last, before.last)
    assert len(list(tmp_path.iterdir())) == 2


# What it is allowed to see, and who may use it


def test_held_out_labels_choose_and_do_not_train(problem, tmp_path):
    """A fold's labels, altered, leave what is offered for it as it was, and take another epoch of it."""
    own = settings(prompt4re={"epochs": 62, "lr": 0.03})
    fold = fold_of(LABELS, folds=3, seed=2024, drop_zeros=False)
    embedding = embedding_of(problem, LABELS, own, seed=0, cache=tmp_path)

    def predictions(labels, epochs):
        config = replace(own, prompt4re=replace(own.prompt4re, epochs=epochs))
        prompts = problem.inputs["prompt_crime"]
        found = published_protocol.head_predictions(problem, "crime", embedding, prompts, labels, fold, config, 0)
        return found.selected[fold == 0]

    poisoned = np.where(fold == 0, LABELS.max() - LABELS + 1, LABELS)
    np.testing.assert_allclose(predictions(poisoned, 1), predictions(LABELS, 1))  # one epoch: nothing to choose
    assert not np.allclose(predictions(poisoned, 62), predictions(LABELS, 62))


@pytest.mark.parametrize(
    ("module", "allowed"), [("published_protocol", "train/evaluation"), ("published_search", "train/cli")]
)
def test_only_the_evaluation_may_import_it(module, allowed):
    """Not one module that trains, exports or runs a model."""
    importers = {
        str(file.relative_to(SOURCES))
        for folder in ("topt_deploy", "train", "export", "runtime")
        for file in (SOURCES / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and module in [(node.module or "").split(".")[-1], *(alias.name for alias in node.names)]
    }
    assert {Path(name).parent.as_posix() for name in importers} == {allowed}


def test_prompts_that_the_city_lacks_are_named(problem, tmp_path):
    with pytest.raises(BadData, match="prompt_calls"):
        hold_out(problem, "calls", CITY.labels["calls"], settings(), seeds=[0], cache=tmp_path)


def test_only_the_papers_own_models_run_under_it(problem, tmp_path):
    for method in (Topt("default"), Mean()):
        with pytest.raises(UsageError, match="the paper's own models"):
            PROTOCOLS["paper"].predict(method, problem, "crime", LABELS, [0], tmp_path)


def test_its_settings_are_the_published_ones():
    settings = VARIANTS["paper"].config("check_in", 0).tasks["check_in"]
    assert (settings.srel.epochs, settings.srel.lr, settings.srel.layers, settings.srel.bias) == (4000, 2e-4, 5, 0.4)
    assert (settings.prompt4re.epochs, settings.prompt4re.lr, settings.target.drop_zeros) == (3000, 5e-4, True)


def test_the_protocol_is_the_selection_on_a_variants_own_settings(problem, tmp_path):
    method = Topt("paper", "srel.epochs=31", "srel.width=8", "srel.heads=2", "prompt4re.epochs=21", "prompt4re.folds=4")
    found = PROTOCOLS["paper"].predict(method, problem, "crime", LABELS, [5, 6], tmp_path)
    own = method.config("crime", 5).tasks["crime"]
    expected = hold_out(problem, "crime", LABELS, own, seeds=[5, 6], cache=tmp_path / "other")
    np.testing.assert_array_equal(found.prediction, expected.prediction)
    assert found.fold.shape == (2, N)
    assert len(list((tmp_path / "embeddings").iterdir())) == 2
