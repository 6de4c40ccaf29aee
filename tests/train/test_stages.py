import copy
import json
import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import LAND_USE, POI, SREL, replaced, task_config, tiny_city, tiny_city_tables, tiny_config, write_tables
from builders import quiet as reporter
from interruption import Interrupted, interrupt_at
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.preprocessing import StandardScaler

from topt_deploy.data.city import Schema, infer_schema, read_city
from topt_deploy.data.features import features
from topt_deploy.errors import BadConfig, BadData
from topt_deploy.model import row_tiles
from topt_deploy.model.checkpoint import load_model
from topt_deploy.model.prompt4re import ridge
from topt_deploy.model.topt import TaskHead, predict
from topt_deploy.run_folder import newest_run, open_run
from topt_deploy.train import loop as fit_module
from topt_deploy.train.boosted_trees import boosted_trees
from topt_deploy.train.loop import TrainingDevice, Workplace, fit
from topt_deploy.train.prompt4re import HeadResult, fold_of, one_label, train_head, training_sets
from topt_deploy.train.run import TaskOutcome, report, start_run, train_run
from topt_deploy.train.srel import embed, flow_target, similarity_targets, train_embedding

CPU = TrainingDevice(device=torch.device("cpu"))
SCHEMA = Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=True)
N = 24


def place(lines=None, checkpoints=None):
    return Workplace(engine=CPU, reporter=reporter(lines), identity="x", checkpoints=checkpoints)


# Stage 1


def train_srel(city, name="crime", checkpoints=None, config=None):
    inputs = {k: torch.from_numpy(v) for k, v in features(city).items()}
    config = config or tiny_config()
    srel = train_embedding(city, inputs, SCHEMA, config, name, place(checkpoints=checkpoints))
    return srel, embed(srel, inputs)


class TestStage1Targets:
    def test_similarities_match_scikit_learn(self):
        city = tiny_city(N)
        targets = similarity_targets(city)
        assert set(targets) == {"poi", "land_use"}
        for view, target in targets.items():
            np.testing.assert_allclose(target, cosine_similarity(city.views[view]), atol=1e-6)

    def test_a_region_without_anything_is_similar_to_none(self):
        city = tiny_city(6)
        poi = city.views["poi"].copy()
        poi[2] = 0
        target = similarity_targets(replace(city, views={"poi": poi}))["poi"]
        assert target[2].abs().max() == 0
        assert torch.isfinite(target).all()

    def test_flows_are_the_od_matrix_over_its_mean(self):
        city = tiny_city(N)
        dense = np.zeros((N, N))
        for origin, dest, flow in zip(city.flows.origin, city.flows.dest, city.flows.target, strict=True):
            dense[origin, dest] += flow
        np.testing.assert_allclose(flow_target(city), dense / dense.mean(), rtol=1e-6)

    def test_the_target_may_differ_from_the_input(self):
        regions, mobility = tiny_city_tables(N)
        other = np.arange(len(mobility)) + 1
        city = read_city(regions, replaced(mobility, target_flow=other), SCHEMA)
        assert flow_target(city).sum().item() == pytest.approx(N * N)
        assert not np.array_equal(city.flows.flow, city.flows.target)

    def test_without_flows_there_is_none(self):
        assert flow_target(replace(tiny_city(N), flows=None)) is None

    def test_rows_of_a_large_city_are_those_of_the_whole(self, monkeypatch):
        city = tiny_city(N)
        whole = similarity_targets(city) | {"flow": flow_target(city), "back": flow_target(city).T}
        monkeypatch.setattr(row_tiles, "ENTRIES", N * N - 1)
        rows = similarity_targets(city) | {"flow": flow_target(city), "back": flow_target(city).T}
        for name, matrix in rows.items():
            assert not isinstance(matrix, torch.Tensor)
            assert torch.equal(matrix[5:9], whole[name][5:9])
            assert torch.equal(matrix[:], whole[name])


class TestStage1:
    def test_learns(self, tmp_path):
        config = tiny_config({"crime": task_config(srel={"epochs": 100, "lr": 5e-3, "dropout": 0.0})})
        city, lines = tiny_city(N), tmp_path / "metrics.jsonl"
        inputs = {k: torch.from_numpy(v) for k, v in features(city).items()}
        train_embedding(city, inputs, SCHEMA, config, "crime", place(lines))
        losses = [json.loads(line)["loss"] for line in lines.read_text().splitlines()]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.9 * losses[0]

    def test_a_large_city_is_trained_as_a_small_one(self, monkeypatch):
        config = tiny_config({"crime": task_config(srel={"dropout": 0.0})})
        srel, expected = train_srel(tiny_city(N), config=config)
        monkeypatch.setattr(row_tiles, "ENTRIES", 1)
        monkeypatch.setattr(row_tiles, "LEAST", 5)
        tiled, found = train_srel(tiny_city(N), config=config)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert tiled.adjacency.length_m == srel.adjacency.length_m

    def test_sees_no_label(self):
        city = tiny_city(N)
        poisoned = replace(city, labels={task: -1e9 * values for task, values in city.labels.items()})
        assert torch.equal(train_srel(city)[1], train_srel(poisoned)[1])

    def test_same_seed_same_embedding_and_other_seed_another(self):
        city = tiny_city(N)
        first = train_srel(city)[1]
        torch.rand(17)
        assert torch.equal(train_srel(city)[1], first)
        assert not torch.equal(train_srel(city, config=tiny_config(seed=1))[1], first)

    def test_ends_in_evaluation_mode_with_the_citys_statistics(self):
        city = tiny_city(N)
        srel, embedding = train_srel(city)
        assert not srel.training
        assert embedding.shape == (N, SREL.width)
        scaler = StandardScaler().fit(features(city)["poi"])
        np.testing.assert_allclose(srel.encoders["poi"].standardize.mean, scaler.mean_, rtol=1e-5)
        np.testing.assert_allclose(srel.encoders["poi"].standardize.scale, scaler.scale_, rtol=1e-5)
        assert srel.adjacency.length_m > 100

    def test_a_checkpoint_of_other_settings_is_refused(self, tmp_path):
        train_srel(tiny_city(N), checkpoints=tmp_path)
        other = tiny_config({"crime": task_config(srel={"lr": 5e-3})})
        with pytest.raises(BadConfig, match="other data or another configuration"):
            train_srel(tiny_city(N), checkpoints=tmp_path, config=other)


# Stage 2


class TestFolds:
    LABELS = np.array([3, np.nan, 0, 5, 8, 0, 2, np.nan, 9, 4, 1, 6.0])

    @pytest.mark.parametrize("seed", [0, 2024])
    @pytest.mark.parametrize("drop_zeros", [False, True])
    def test_are_those_of_kfold_over_the_labelled_regions(self, seed, drop_zeros):
        fold = fold_of(self.LABELS, folds=4, seed=seed, drop_zeros=drop_zeros)
        regions = np.flatnonzero(~np.isnan(self.LABELS) & ~(drop_zeros & (self.LABELS == 0)))
        for number, (_, held_out) in enumerate(KFold(4, shuffle=True, random_state=seed).split(regions)):
            assert set(np.flatnonzero(fold == number)) == set(regions[held_out])
        assert (fold >= 0).sum() == len(regions)
        assert (fold[np.isnan(self.LABELS)] == -1).all()

    def test_with_fewer_regions_than_folds_each_is_one(self):
        fold = fold_of(np.array([1, np.nan, 2, 3.0]), folds=10, seed=0, drop_zeros=False)
        assert sorted(fold) == [-1, 0, 1, 2]

    @pytest.mark.parametrize(("labels", "drop_zeros"), [([1, 2, np.nan], False), ([1, 2, 0, 0], True)])
    def test_too_few_labels(self, labels, drop_zeros):
        with pytest.raises(BadData, match="too few labelled regions") as caught:
            fold_of(np.array(labels, dtype=float), folds=10, seed=0, drop_zeros=drop_zeros)
        assert (caught.value.expected, caught.value.found) == ("at least 3", "2")


class TestTrainingSets:
    LABELS = np.array([3, np.nan, 0, 5, 8, 0.5])
    FOLD = np.array([1, -1, -1, 0, 1, 0])  # region 2 has a label and takes no part

    def test_are_the_folds_complements_and_then_everything(self):
        nan = np.nan
        expected = [[3, nan, nan, nan, 8, nan], [nan, nan, nan, 5, nan, 0.5], [3, nan, nan, 5, 8, 0.5]]
        np.testing.assert_array_equal(training_sets(self.LABELS, self.FOLD), expected)

    def test_every_label_of_them_is_found_once(self):
        np.testing.assert_array_equal(one_label(training_sets(self.LABELS, self.FOLD)), [3, 0, 0, 5, 8, 0.5])

    def test_a_held_out_prediction_is_the_one_of_the_fold_that_did_not_see_the_region(self):
        predicted = np.arange(18.0).reshape(3, 6)
        outcome = TaskOutcome.of(HeadResult(head=None, predicted=predicted), self.FOLD)
        np.testing.assert_array_equal(outcome.held_out, [6, np.nan, np.nan, 3, 10, 5])
        np.testing.assert_array_equal(outcome.in_sample, predicted[2])


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(n=N, seed=0, prompted=True, dtype=torch.float32):
    """Embedding, features, prompts and labels that depend on them."""
    rng = np.random.default_rng(seed)
    embedding, extra, prompts = rng.normal(size=(n, 8)), rng.normal(size=(n, 5)), rng.normal(size=(n, 30))
    labels = np.exp(3 + 0.5 * embedding[:, 0] + 0.3 * prompts[:, 0] + 0.1 * rng.normal(size=n)).round()
    tensors = [torch.from_numpy(x).to(dtype) for x in (embedding, extra, prompts)]
    return (*(tensors if prompted else (*tensors[:2], None)), labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained(TaskOutcome):
    """A head trained on a run's training sets, and what it says of its own city."""

    head: TaskHead


def head(inputs, labels=None, config=None, checkpoints=None, **settings):
    embedding, extra, prompts, own = inputs
    config = config or tiny_config({"crime": task_config(**settings)})
    labels = own if labels is None else labels
    fold = fold_of(labels, folds=3, seed=2024, drop_zeros=config.tasks["crime"].target.drop_zeros)
    result = train_head(
        embedding,
        extra,
        prompts,
        training_sets(labels, fold),
        config,
        "crime",
        place(checkpoints=checkpoints),
    )
    return Trained(head=result.head, **vars(TaskOutcome.of(result, fold)))


def adjusted(**prompt4re):
    return {"prompt4re": {"epochs": 12, "dropout": 0.2, **prompt4re}}


VARIANTS = {
    "paper": adjusted(),
    "members": adjusted(members=3),
    "hidden and skip": adjusted(hidden=4, skip=True, ridge_penalty=True),
    "alpha by leave-one-out": adjusted(ridge_alpha=0.0, ridge_penalty=True, skip=True, decoupled=True),
    "without alignment": adjusted(alignment=False, schedule="cosine", weight_decay=0.01),
    "auto": adjusted() | {"target": {"transform": "auto"}},
    "sqrt": adjusted() | {"target": {"transform": "sqrt"}},
    "log1p": adjusted() | {"target": {"transform": "log1p"}},
    "poisson": adjusted() | {"target": {"likelihood": "poisson"}},
    "negative binomial": adjusted(members=2) | {"target": {"likelihood": "negative_binomial"}},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
class TestStage2:
    @pytest.mark.parametrize("k", [0, 2])
    def test_held_out_labels_do_not_reach_their_own_prediction(self, settings, k):
        inputs = problem()
        labels = inputs[-1]
        clean = head(inputs, **settings)
        held_out = clean.fold == k
        poisoned = np.where(held_out, 1e6 + np.arange(N) ** 2, labels)
        changed = head(inputs, poisoned, **settings)
        np.testing.assert_array_equal(changed.held_out[held_out], clean.held_out[held_out])
        # What the other folds and the final fit trained on did change.
        assert (changed.held_out[~held_out] != clean.held_out[~held_out]).all()
        assert (changed.in_sample != clean.in_sample).any()

    def test_every_member_trains_as_if_it_were_alone(self, settings, monkeypatch, double_precision):
        """The folds and the final fit are one batch; one member taken out of it must end up the same."""
        # Float64, because Adam's first steps amplify the rounding of gradients that are nearly zero.
        inputs = problem(dtype=torch.float64)
        settings = copy.deepcopy(settings)
        settings["prompt4re"]["dropout"] = 0.0  # members draw different masks, and nothing else at random
        started, trained = [], []

        def spy(model, *arguments, **more):
            started.append(copy.deepcopy(model))
            fit(model, *arguments, **more)
            trained.append(model)

        monkeypatch.setattr(fit_module, "fit", spy)
        result = head(inputs, **settings)
        (start,), (batch,) = started, trained
        embedding, extra, prompts, labels = inputs
        config, coordinates = task_config(**settings), result.head.coordinates(prompts)
        members = len(start.target.mean)
        folds, repeat = 3, config.prompt4re.members
        assert members == (folds + 1) * repeat
        for member in {0, members - 1}:
            fold = member // repeat
            region_weights = torch.tensor(result.fold != fold).float()[None]
            alone = TaskHead(
                members=1,
                features=extra.shape[1],
                rank=coordinates.shape[1],
                settings=config,
            )
            alone.load_state_dict(
                {
                    name: tensor[member : member + 1] if name.startswith(("head.", "target.")) else tensor
                    for name, tensor in start.state_dict().items()
                }
            )
            counts = torch.from_numpy(labels)
            seen = alone.see(embedding, extra, coordinates).detach()
            alphas = ridge(
                seen, alone.target.fit(counts, region_weights), region_weights, config.prompt4re.ridge_alpha
            ).alphas

            def loss(alone=alone, seen=seen, coordinates=coordinates, region_weights=region_weights, alphas=alphas):
                output = alone.head(seen, coordinates)
                total = alone.target.loss(output, torch.from_numpy(labels), region_weights).sum()
                if config.prompt4re.ridge_penalty:
                    squares = alone.head.linear.weight.square().sum()
                    total = total + alphas.float().sum() / region_weights.sum() * squares
                return {"fit": total}

            fit(alone, loss, config.prompt4re, stage="alone", identity="", engine=CPU, reporter=reporter())
            for name, tensor in alone.head.named_parameters():
                together = batch.head.state_dict()[name][member : member + 1]
                torch.testing.assert_close(tensor.detach(), together, rtol=1e-4, atol=1e-6, msg=name)
            expected = alone.eval().head(seen, coordinates)[0]
            torch.testing.assert_close(batch.eval().head(seen, coordinates)[member], expected, rtol=1e-5, atol=1e-5)

    def test_the_deployed_head_gives_the_in_sample_predictions(self, settings):
        inputs = problem()
        result = head(inputs, **settings)
        embedding, extra, prompts, labels = inputs
        members = task_config(**settings).prompt4re.members
        out = result.head(embedding, extra, prompts)
        assert out.shape == (members, N)
        np.testing.assert_allclose(out.mean(dim=0).detach(), result.in_sample, rtol=1e-5)
        assert not result.head.training
        assert np.isfinite(result.held_out).all()
        assert r2_score(labels, result.in_sample) > 0.5

    def test_regions_without_a_label_are_predicted(self, settings):
        inputs = problem()
        missing = np.isin(np.arange(N), [1, 5, 20])
        labels = np.where(missing, np.nan, inputs[-1])
        result = head(inputs, labels, **settings)
        assert (result.fold[missing] == -1).all()
        assert np.isnan(result.held_out[missing]).all()
        assert np.isfinite(result.held_out[~missing]).all()
        assert np.isfinite(result.in_sample).all()

    def test_resumed_it_is_the_same_head(self, settings, tmp_path, monkeypatch):
        inputs = problem()
        config = tiny_config({"crime": task_config(**settings)}, checkpoint_every=5)
        whole = head(inputs, config=config)
        with monkeypatch.context() as patch:
            interrupt_at(patch, epoch=8)
            with pytest.raises(Interrupted):
                head(inputs, config=config, checkpoints=tmp_path)
        assert (tmp_path / "prompt4re-crime.safetensors").exists()
        resumed = head(inputs, config=config, checkpoints=tmp_path)
        np.testing.assert_array_equal(resumed.held_out, whole.held_out)
        np.testing.assert_array_equal(resumed.in_sample, whole.in_sample)
        expected = whole.head.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.head.state_dict().items())


@pytest.mark.parametrize("transform", ["none", "sqrt"])
@pytest.mark.parametrize("prompted", [True, False])
def test_before_the_first_epoch_it_is_scikit_learns_ridge(transform, prompted):
    inputs = problem(prompted=prompted)
    result = head(
        inputs,
        prompt4re={"epochs": 0, "ridge_alpha": 2.0, "ridge_penalty": True, "enabled": prompted},
        target={"transform": transform},
    )
    forward, back = (np.sqrt, np.square) if transform == "sqrt" else (np.asarray, np.asarray)
    x, y = inputs[0].double().numpy(), forward(inputs[-1])
    folds = KFold(3, shuffle=True, random_state=2024)
    expected = back(cross_val_predict(Ridge(alpha=2.0), x, y, cv=folds).clip(min=0))
    np.testing.assert_allclose(result.held_out, expected, rtol=1e-4)
    np.testing.assert_allclose(result.in_sample, back(Ridge(alpha=2.0).fit(x, y).predict(x)), rtol=1e-4)


def test_of_a_large_city_some_regions_are_trained_on_each_epoch():
    """No region that is held out has a part in it, nor whether it has a label."""
    inputs = problem()
    whole, some = head(inputs, **adjusted()), head(inputs, **adjusted(regions=9))
    assert (some.held_out != whole.held_out).all()
    assert np.isfinite(some.held_out).all()
    held_out = some.fold == 1
    poisoned = np.where(held_out & (np.arange(N) % 2 == 0), 1e6, inputs[-1])
    changed = head(inputs, poisoned, **adjusted(regions=9))
    np.testing.assert_array_equal(changed.held_out[held_out], some.held_out[held_out])
    torch.testing.assert_close(head(inputs, **adjusted(regions=N)).held_out, whole.held_out)


def test_an_epoch_without_a_label_is_no_fault():
    inputs = problem()
    few = np.where(np.arange(N) < 4, inputs[-1], np.nan)
    assert np.isfinite(head(inputs, few, **adjusted(regions=3)).in_sample[:4]).all()


def test_members_differ_and_are_averaged():
    inputs = problem()
    result = head(inputs, prompt4re={"members": 3, "epochs": 10})
    members = result.head(*inputs[:3]).detach()
    assert members.std(dim=0).min() > 0
    np.testing.assert_allclose(result.in_sample, members.double().mean(dim=0), rtol=1e-5)


def test_dropped_zeros_take_no_part_and_still_get_a_prediction():
    inputs = problem()
    labels = inputs[-1].copy()
    labels[[0, 7]] = 0
    dropped = head(inputs, labels, target={"drop_zeros": True})
    unknown = head(inputs, np.where(labels == 0, np.nan, labels))
    assert (dropped.fold[[0, 7]] == -1).all()
    assert np.isnan(dropped.held_out[[0, 7]]).all()
    np.testing.assert_array_equal(dropped.in_sample, unknown.in_sample)
    assert head(inputs, labels).fold[0] >= 0


def test_prompts_that_carry_the_label_are_learnt_from():
    inputs = problem(n=60)
    settings = {"prompt4re": {"epochs": 300, "lr": 5e-3, "dropout": 0.0}, "target": {"transform": "sqrt"}}
    with_prompts = head(inputs, **settings)
    without = head(
        (*inputs[:2], None, inputs[3]), prompt4re=settings["prompt4re"] | {"enabled": False}, target=settings["target"]
    )
    assert r2_score(inputs[3], with_prompts.in_sample) > r2_score(inputs[3], without.in_sample) + 0.05


def test_the_report_matches_scikit_learn():
    inputs = problem()
    labels = np.where(np.arange(N) == 4, np.nan, inputs[-1])
    result = head(inputs, labels)
    found, known = report(labels, result, result.held_out + 1), ~np.isnan(labels)
    assert found.held_out.r2 == pytest.approx(r2_score(labels[known], result.held_out[known]))
    assert found.in_sample.r2 == pytest.approx(r2_score(labels[known], result.in_sample[known]))
    means = np.empty(N)
    for k in range(3):
        means[result.fold == k] = labels[known & (result.fold != k)].mean()
    assert found.mean.mae == pytest.approx(np.abs(means - labels)[known].mean())
    assert found.mean.regions == N - 1
    assert found.trees.r2 == pytest.approx(r2_score(labels[known], result.held_out[known] + 1))


def test_the_trees_see_no_held_out_label_and_nothing_of_the_models_own_views():
    inputs, labels = {"poi": problem()[0].numpy()}, problem()[-1]
    fold = fold_of(np.where(np.arange(N) == 4, np.nan, labels), folds=3, seed=0, drop_zeros=False)
    clean = boosted_trees(inputs, labels, fold)
    assert np.isnan(clean).tolist() == (fold < 0).tolist()
    changed = boosted_trees(inputs, np.where(fold == 1, 1e6, labels), fold)
    np.testing.assert_array_equal(changed[fold == 1], clean[fold == 1])
    assert (changed[fold == 0] != clean[fold == 0]).all()
    for own in ("prompt_crime", "mobility_log", "mobility_two_hops", "trips", "destinations"):
        more = boosted_trees(inputs | {own: labels[:, None] * 1.0}, labels, fold)
        np.testing.assert_array_equal(more, clean, err_msg=own)
    assert r2_score(labels[fold >= 0], clean[fold >= 0]) > 0


# The whole run


def city_folder(path, **columns):
    tasks = ("crime", "calls", "fires")
    regions, mobility = tiny_city_tables(N, tasks=tasks, prompts=[f"prompt_{task}" for task in tasks])
    write_tables(path, replaced(regions, **columns), mobility)
    return {"regions": path / "regions.parquet", "mobility": path / "mobility.parquet"}


def run_config():
    second = task_config(srel={"layers": 1}, prompt4re={"members": 2}, target={"transform": "sqrt"})
    third = task_config(ensemble={"enabled": True}, target={"transform": "cbrt"})
    return tiny_config({"crime": task_config(), "calls": second, "fires": third}, checkpoint_every=4)


def run(out, files, config=None):
    started = start_run(out, files["regions"].parent, config or run_config(), **files)
    return train_run(started, **files, engine=CPU, reporter=reporter(out / "metrics.jsonl"))


@pytest.mark.usefixtures("few_trees")
class TestRun:
    # Five stages of six epochs each, with a checkpoint after the fourth and the last.
    @pytest.mark.parametrize("epoch", [2, 5, 6, 9, 14, 19, 23, 26, 29])
    def test_interrupted_anywhere_and_resumed_it_gives_the_same_files(self, tmp_path, monkeypatch, epoch):
        files = city_folder(tmp_path / "city")
        run(tmp_path / "whole", files)
        with monkeypatch.context() as patch:
            interrupt_at(patch, epoch)
            with pytest.raises(Interrupted):
                run(tmp_path / "cut", files)
        assert not open_run(tmp_path / "cut").finished
        torch.manual_seed(epoch)
        again = open_run(tmp_path / "cut")
        train_run(again, **files, engine=CPU, reporter=reporter(tmp_path / "cut" / "metrics.jsonl"))
        for name in ("model.safetensors", "held_out.parquet", "metrics.jsonl"):
            assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        whole, resumed = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut"))
        assert resumed["reports"] == whole["reports"]

    def test_row_order_changes_nothing(self, tmp_path):
        files = city_folder(tmp_path / "city")
        tables = {name: pq.read_table(path) for name, path in files.items()}
        rng = np.random.default_rng(0)
        shuffled = {name: table.take(rng.permutation(len(table))) for name, table in tables.items()}
        write_tables(tmp_path / "shuffled", **shuffled)
        others = {name: tmp_path / "shuffled" / path.name for name, path in files.items()}
        reports = run(tmp_path / "a", files), run(tmp_path / "b", others)
        assert reports[0] == reports[1]
        first, second = (load_model(tmp_path / name / "model.safetensors").state_dict() for name in "ab")
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    def test_the_saved_model_gives_the_recorded_predictions(self, tmp_path):
        files = city_folder(tmp_path / "city")
        reports = run(tmp_path / "run", files)
        model = load_model(tmp_path / "run" / "model.safetensors")
        config = open_run(tmp_path / "run").config
        assert config == run_config()
        schema = infer_schema(files["regions"], views=config.views, mobility=True, prompts=config.prompt_columns())
        city = read_city(files["regions"], files["mobility"], schema, labels=config.tasks)
        predictions = predict(model, {k: torch.from_numpy(v) for k, v in features(city).items()})
        rows = pq.read_table(tmp_path / "run" / "held_out.parquet").to_pylist()
        assert len(rows) == 3 * N
        for task in config.tasks:
            values = predictions[task]
            mine = {row["region_id"]: row for row in rows if row["task"] == task}
            recorded = [mine[region]["in_sample"] for region in city.region_id]
            np.testing.assert_allclose(values, recorded, rtol=1e-4)
            held_out = [mine[region]["held_out"] for region in city.region_id]
            assert reports[task].held_out.r2 == pytest.approx(r2_score(city.labels[task], held_out))
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["finished"]
        assert record["reports"]["crime"]["held_out"] == asdict(reports["crime"].held_out)

    def test_a_task_with_too_few_labels_for_trees_has_none(self, tmp_path):
        files = city_folder(tmp_path / "city", calls=[None] * 4 + [*range(4, N)])
        smallest = N - math.ceil(N / task_config().prompt4re.folds)
        settings = task_config(
            ensemble={"enabled": True, "trees": 3, "trees_labels": smallest}, prompt4re={"enabled": False}
        )
        run(tmp_path / "run", files, tiny_config({"fires": settings, "calls": settings}))
        done = open_run(tmp_path / "run")
        assert done.config.tasks["calls"].ensemble.trees == 3
        has_trees = {task: "randomised trees" in parts for task, parts in done.facts["parts"].items()}
        assert has_trees == {"fires": True, "calls": False}
        heads = load_model(tmp_path / "run" / "model.safetensors").heads
        assert heads["fires"].trees is not None
        assert heads["calls"].trees is None

    def test_null_labels_stay_null_in_the_record(self, tmp_path):
        labels = [None, *range(1, N)]
        files = city_folder(tmp_path / "city", crime=labels)
        run(tmp_path / "run", files)
        first = pq.read_table(files["regions"])["region_id"][0].as_py()
        rows = pq.read_table(tmp_path / "run" / "held_out.parquet").to_pylist()
        (row,) = [r for r in rows if r["region_id"] == first and r["task"] == "crime"]
        assert (row["label"], row["held_out"], row["fold"]) == (None, None, -1)
        assert row["in_sample"] >= 0

    def test_changed_tables_are_refused(self, tmp_path):
        files = city_folder(tmp_path / "city")
        started = start_run(tmp_path / "run", tmp_path / "city", run_config(), **files)
        city_folder(tmp_path / "city", crime=np.arange(N) + 100)
        with pytest.raises(BadConfig, match="has changed since this run was started") as caught:
            train_run(started, **files, engine=CPU, reporter=reporter())
        assert caught.value.file == str(files["regions"])

    def test_labels_that_do_not_vary_still_make_a_run(self, tmp_path):
        files = city_folder(tmp_path / "city", crime=np.full(N, 7.0))
        run(tmp_path / "run", files)
        assert open_run(tmp_path / "run").finished
        assert json.loads((tmp_path / "run" / "run.json").read_text())["reports"]["crime"]["held_out"]["r2"] is None

    def test_an_unfinished_run_is_found_to_resume(self, tmp_path):
        files = city_folder(tmp_path / "city")
        start_run(tmp_path / "city" / "runs" / "a", tmp_path / "city", run_config(), **files)
        run(tmp_path / "city" / "runs" / "b", files)
        assert newest_run(tmp_path / "city", finished=False).path.name == "a"
        assert newest_run(tmp_path / "city", finished=True).path.name == "b"
