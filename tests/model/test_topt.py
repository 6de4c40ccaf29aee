from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import LAND_USE, POI, TASKS, task_config, tiny_city, tiny_city_tables, tiny_config

from topt_deploy.data.city import Schema, infer_schema, read_city
from topt_deploy.data.features import POSITION, all_widths, features
from topt_deploy.model.checkpoint import load_model, save_model
from topt_deploy.model.topt import ModelSpec, TopT, all_features, predict

PROMPT_WIDTH = 10
COLUMNS = ("prompt_crime", "prompt_calls", "prompt_none", "prompt_fires")


def schema_of(config):
    prompts = dict.fromkeys(config.prompt_columns(), PROMPT_WIDTH)
    return Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=config.mobility, prompts=prompts)


def build(config, ranks=4):
    """An untrained model with nothing left at zero."""
    torch.manual_seed(0)
    ranks = {t: ranks for t, settings in config.tasks.items() if settings.prompt_column(t)}
    model = TopT(ModelSpec(config=config, schema=schema_of(config), ranks=ranks))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("basis.basis", "hidden_out.weight", "frequencies", "coefficients")):
                tensor.normal_()
            if name.endswith("target.mean"):
                tensor.fill_(3)
            if name.endswith("length_m"):
                tensor.fill_(2000)
    return model.eval()


def inputs_of(config, n=9, seed=0):
    regions, mobility = tiny_city_tables(n, seed, prompts=COLUMNS, prompt_width=PROMPT_WIDTH)
    city = read_city(regions, mobility, schema_of(config))
    return {name: torch.from_numpy(values) for name, values in features(city).items()}


VARIANTS = {
    "full": {},
    "members": {"members": 3},
    "hidden": {"hidden": 4},
    "skip": {"skip": True, "hidden": 4},
    "without Prompt4RE": {"enabled": False},
    "without Prompt4RE, skip": {"enabled": False, "skip": True},
    "without task-relevant prompt": {"prompt": "none"},
    "without alignment": {"alignment": False},
    "own attention width": {"width": 12, "heads": 3},
}


def variant(settings, **more):
    return tiny_config({task: task_config(prompt4re=settings) for task in TASKS}, **more)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
class TestVariants:
    def test_predicts_every_task_for_every_region(self, settings):
        config = variant(settings)
        predictions = predict(build(config), inputs_of(config))
        assert list(predictions) == list(TASKS)
        for values in predictions.values():
            assert values.shape == (9,)
            assert torch.isfinite(values).all()
            assert (values >= 0).all()
            assert values.std() > 0

    def test_shuffled_regions_get_the_same_predictions(self, settings):
        config = variant(settings)
        model, inputs, order = build(config), inputs_of(config, 40), torch.randperm(40)
        shuffled = predict(model, {name: x[order] for name, x in inputs.items()})
        for task, values in predict(model, inputs).items():
            torch.testing.assert_close(shuffled[task], values[order], rtol=1e-4, atol=1e-5)

    def test_reads_the_inputs_it_names_and_no_others(self, settings):
        config = variant(settings)
        model, inputs = build(config), inputs_of(config)
        names = model.input_names()
        assert names[:4] == ["poi", "land_use", "mobility", POSITION]
        assert names[4:] == list(config.prompt_columns())
        full = predict(model, {name: inputs[name] for name in names})
        for name in names:
            changed = {key: inputs[key] for key in names}
            changed[name] = changed[name] + torch.randn_like(changed[name]) * (1e4 if name == POSITION else 1)
            assert any(not torch.equal(full[t], v) for t, v in predict(model, changed).items()), name

    def test_saved_and_loaded_it_is_the_same_model(self, settings, tmp_path):
        config = variant(settings)
        model, inputs = build(config), inputs_of(config)
        save_model(tmp_path / "model.safetensors", model)
        again = load_model(tmp_path / "model.safetensors")
        assert again.spec.config == config
        assert vars(again.spec.schema) == vars(model.spec.schema)
        assert again.spec.ranks == model.spec.ranks
        assert not again.training
        expected = predict(model, inputs)
        assert all(torch.equal(values, expected[task]) for task, values in predict(again, inputs).items())


def test_which_prompt_column_is_read():
    assert variant({}).prompt_columns() == ("prompt_crime", "prompt_calls")
    assert variant({"prompt": "none"}).prompt_columns() == ("prompt_none",)
    assert variant({"enabled": False}).prompt_columns() == ()
    mixed = tiny_config({"crime": task_config(), "calls": task_config(prompt4re={"prompt": "none"})})
    assert mixed.prompt_columns() == ("prompt_crime", "prompt_none")


def test_a_task_reads_its_own_prompts():
    config = variant({})
    model, inputs = build(config), inputs_of(config)
    changed = inputs | {"prompt_calls": inputs["prompt_calls"] + torch.randn(9, PROMPT_WIDTH)}
    before, after = predict(model, inputs), predict(model, changed)
    assert torch.equal(before["crime"], after["crime"])
    assert not torch.equal(before["calls"], after["calls"])


def test_tasks_with_equal_stage_1_share_it_and_others_do_not():
    shared, own = task_config(), task_config(srel={"layers": 3})
    config = tiny_config({"crime": shared, "calls": own, "fires": replace(shared, target=own.target)})
    assert list(config.embeddings()) == ["crime", "calls"]
    assert [config.embedding_of(task) for task in config.tasks] == ["crime", "calls", "crime"]
    model = build(config)
    assert set(model.srel) == {"crime", "calls"}
    inputs = inputs_of(config)
    before = predict(model, inputs)
    with torch.no_grad():
        model.srel["crime"].mlp[0].weight.mul_(1.5)
    after = predict(model, inputs)
    assert [torch.equal(before[t], after[t]) for t in config.tasks] == [False, True, False]


def test_the_prediction_is_the_mean_of_the_members():
    config = variant({"members": 3})
    model, inputs = build(config), inputs_of(config)
    task, head = "crime", model.heads["crime"]
    embedding = model.srel["crime"](inputs, model.srel["crime"].adjacency(inputs[POSITION]))
    members = head(embedding, all_features(inputs, model.spec.schema), inputs["prompt_crime"])
    assert members.shape == (3, 9)
    assert members.std(dim=0).min() > 0
    torch.testing.assert_close(predict(model, inputs)[task], members.mean(dim=0))


@pytest.mark.parametrize("n", [2, 3, 77, 200])
def test_one_model_predicts_cities_of_every_size(n):
    config = variant({"skip": True, "hidden": 4})
    values = predict(build(config), inputs_of(config, n))["crime"]
    assert values.shape == (n,)
    assert torch.isfinite(values).all()


def test_without_mobility():
    config = variant({}, mobility=False)
    model, inputs = build(config), inputs_of(config)
    assert "mobility" not in inputs
    assert "mobility" not in model.input_names()
    assert torch.isfinite(predict(model, inputs)["crime"]).all()


def test_shuffled_tables_give_bit_identical_predictions():
    config = variant({})
    regions, mobility = tiny_city_tables(30, prompts=COLUMNS)
    schema = infer_schema(regions, views=config.views, mobility=True, prompts=config.prompt_columns())
    model = build(config)
    rng = np.random.default_rng(0)
    results = []
    for shuffle in (False, True):
        r = regions.take(rng.permutation(len(regions))) if shuffle else regions
        m = mobility.take(rng.permutation(len(mobility))) if shuffle else mobility
        city = read_city(r.select(r.column_names[::-1] if shuffle else r.column_names), m, schema)
        results.append(predict(model, {k: torch.from_numpy(v) for k, v in features(city).items()}))
    assert all(torch.equal(results[0][task], results[1][task]) for task in TASKS)


@pytest.mark.parametrize("name", ["pop", "train", "values", "type", "half"])
def test_a_task_may_have_any_name(name):
    config = tiny_config({name: task_config(prompt4re={"enabled": False})})
    assert set(predict(build(config), inputs_of(config))) == {name}


@pytest.mark.parametrize("name", ["pop", "keys", "items"])
def test_a_view_may_have_any_name(name):
    config = tiny_config({"crime": task_config(prompt4re={"enabled": False})}, views=(name,))
    schema = Schema(views={name: ("a", "b")}, mobility=False)
    model = TopT(ModelSpec(config=config, schema=schema, ranks={}))
    out = predict(model, {name: torch.rand(4, 2), POSITION: torch.rand(4, 3)})
    assert out["crime"].shape == (4,)


def test_features_feed_the_model_in_its_order():
    city = tiny_city(6)
    arrays = {k: torch.from_numpy(v) for k, v in features(city).items()}
    config = tiny_config()
    joined = all_features(arrays, Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=True))
    assert joined.shape == (6, len(POI) + len(LAND_USE) + arrays["mobility"].shape[1])
    torch.testing.assert_close(joined[:, : len(POI)], arrays["poi"])
    assert config.views == ("poi", "land_use")


ENSEMBLES = {
    "both": {},
    "kernel only": {"network": False},
    "network only": {"kernel": False},
    "every view linear": {"not_linear": (), "lengths": (1.0,)},
}


def with_ensemble(settings, **more):
    """Crime by an ensemble, calls by the paper's head."""
    own = task_config(ensemble={"enabled": True, **settings}, target={"transform": "cbrt"}, **more)
    return tiny_config({"crime": own, "calls": task_config()})


def build_ensemble(config):
    """The model with an ensemble, its statistics taken from a city."""
    model, inputs = build(config), inputs_of(config, 30, seed=5)
    head = model.heads["crime"]
    with torch.no_grad():
        views = head.views(inputs, inputs.get(config.tasks["crime"].prompt_column("crime")))
        if head.kernel is not None:
            head.kernel.fit_features(views, seed=0)
            head.kernel.coefficients.mul_(0.1)
        if head.network is not None:
            head.network.standardize.fit(head.side_by_side(views))
    return model


@pytest.mark.parametrize("settings", ENSEMBLES.values(), ids=ENSEMBLES)
class TestEnsemble:
    def test_stands_beside_a_head_with_an_embedding(self, settings):
        config = with_ensemble(settings)
        model = build_ensemble(config)
        assert set(model.srel) == {"calls"}
        for n in (2, 9, 77):
            predictions = predict(model, inputs_of(config, n))
            assert list(predictions) == ["crime", "calls"]
            for values in predictions.values():
                assert values.shape == (n,)
                assert torch.isfinite(values).all()
                assert (values >= 0).all()
                assert values.std() > 0

    def test_shuffled_regions_get_the_same_predictions(self, settings):
        config = with_ensemble(settings)
        model, inputs, order = build_ensemble(config), inputs_of(config, 40), torch.randperm(40)
        shuffled = predict(model, {name: x[order] for name, x in inputs.items()})
        for task, values in predict(model, inputs).items():
            torch.testing.assert_close(shuffled[task], values[order], rtol=1e-4, atol=1e-4)

    def test_reads_all_views_its_own_prompts_and_nothing_else(self, settings):
        config = with_ensemble(settings)
        model, inputs = build_ensemble(config), inputs_of(config)
        names = model.input_names()
        assert names == [*all_widths(model.spec.schema), "prompt_crime", "prompt_calls"]
        full = predict(model, {name: inputs[name] for name in names})["crime"]
        for name in names:
            changed = {key: inputs[key] for key in names}
            changed[name] = changed[name] + torch.randn_like(changed[name]) * inputs[name].std()
            reads = name != "prompt_calls" and (name != "prompt_crime" or settings.get("kernel", True))
            assert torch.equal(full, predict(model, changed)["crime"]) != reads, name

    def test_saved_and_loaded_it_is_the_same_model(self, settings, tmp_path):
        config = with_ensemble(settings)
        model, inputs = build_ensemble(config), inputs_of(config)
        save_model(tmp_path / "model.safetensors", model)
        again = load_model(tmp_path / "model.safetensors")
        assert again.spec.config == config
        expected = predict(model, inputs)
        assert all(torch.equal(values, expected[task]) for task, values in predict(again, inputs).items())


@pytest.mark.parametrize(("prompt4re", "columns"), [({"enabled": False}, 1), ({"prompt": "none"}, 2)])
def test_an_ensembles_prompts_are_chosen_as_another_heads(prompt4re, columns):
    config = with_ensemble({}, prompt4re=prompt4re)
    model = build_ensemble(config)
    assert len(config.prompt_columns()) == columns
    assert (model.heads["crime"].basis is None) == (columns == 1)
    assert torch.isfinite(predict(model, inputs_of(config))["crime"]).all()
