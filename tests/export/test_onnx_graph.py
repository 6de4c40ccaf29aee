"""The exported graph: what it calls its inputs and outputs, and that it says what PyTorch says for any city."""

import numpy as np
import onnx
import pytest
import torch
from builders import LAND_USE, POI, task_config, tiny_city, tiny_config
from graphs import run_graph

from topt_deploy.bundle.manifest import open_bundle
from topt_deploy.bundle.tolerances import PREDICTIONS as TOLERANCES
from topt_deploy.data.city import Schema, read_city
from topt_deploy.data.features import POSITION, features
from topt_deploy.export.golden_cities import synthetic_city
from topt_deploy.export.onnx_graph import REGIONS_AXIS, export_for_engine, export_graph
from topt_deploy.export.parity import compare, run_model
from topt_deploy.export.translate import OPSET
from topt_deploy.model import row_tiles
from topt_deploy.model.checkpoint import load_model, load_tensors
from topt_deploy.model.topt import EnsembleHead, ModelSpec, TaskHead, TopT
from topt_deploy.run_folder import INPUTS_FILE
from topt_deploy.runtime.backends.onnxruntime import Session

SIZES = [*range(2, 21), *range(25, 300, 25), 76, 77, 78, 127, 128, 129, 300]


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return open_bundle(demo_bundle)


@pytest.fixture(scope="module")
def proto(demo_bundle):
    return onnx.load(demo_bundle / "models" / "topt.onnx")


@pytest.fixture(scope="module")
def model(demo_run):
    return load_model(demo_run / "model.safetensors")


@pytest.fixture(scope="module")
def session(bundle):
    variant = bundle.manifest.variants["fp32"]
    return Session(bundle.read(variant["graph"]), bundle.read(variant["weights"]), variant["initializers"], threads=1)


@pytest.fixture(scope="module")
def position_m(demo_run):
    return load_tensors(demo_run / INPUTS_FILE)[0][POSITION].numpy()


@pytest.fixture
def arrays(model, bundle, position_m):
    def draw(regions):
        city = synthetic_city(model, bundle.manifest.ranges, position_m, regions=regions, seed=regions)
        return features(read_city(city.regions, city.mobility, model.spec.schema))

    return draw


def test_the_standards_checker_passes(demo_bundle, proto):
    onnx.checker.check_model(str(demo_bundle / "models" / "topt.onnx"), full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)]
    assert not proto.functions


def test_the_defaults_graph_has_few_nodes(default_city):
    """Each costs a prediction 30 µs and 5 kB before it is run: there were 841."""
    graph = onnx.load(default_city / "model.topt" / "models" / "topt.onnx", load_external_data=False).graph
    assert len(graph.node) <= 560


def test_inputs_outputs_and_axis_have_names(proto, bundle):
    def shape(value):
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    inputs = {value.name: shape(value) for value in proto.graph.input}
    assert inputs == {
        "poi": [REGIONS_AXIS, 12],
        "land_use": [REGIONS_AXIS, 6],
        "mobility": [REGIONS_AXIS, 38],
        "mobility_log": [REGIONS_AXIS, 36],
        "mobility_two_hops": [REGIONS_AXIS, 36],
        "trips": [REGIONS_AXIS, 11],
        "destinations": [REGIONS_AXIS, 12],
        "position": [REGIONS_AXIS, 3],
        "prompt_crime": [REGIONS_AXIS, 256],
        "prompt_check_in": [REGIONS_AXIS, 256],
        "prompt_service_call": [REGIONS_AXIS, 256],
    }
    assert tuple(inputs) == bundle.manifest.inputs
    assert REGIONS_AXIS == "regions"
    outputs = {value.name: shape(value) for value in proto.graph.output}
    assert outputs == {
        **{task: [REGIONS_AXIS] for task in ("crime", "check_in", "service_call")},
        "crime_folds": [REGIONS_AXIS, 3],  # the one that is an ensemble
        "leverage": [REGIONS_AXIS],
    }
    assert list(outputs) == bundle.manifest.outputs
    kinds = {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT}


def test_the_manifest_places_every_large_weight(demo_bundle, bundle, proto):
    variant = bundle.manifest.variants["fp32"]
    flat = np.frombuffer((demo_bundle / variant["weights"]).read_bytes(), dtype=np.float32)
    loaded = {t.name: onnx.numpy_helper.to_array(t, str(demo_bundle / "models")) for t in proto.graph.initializer}
    for name, (offset, shape) in variant["initializers"].items():
        start = offset // 4
        np.testing.assert_array_equal(flat[start : start + np.prod(shape)].reshape(shape), loaded[name])
    raw = onnx.load(demo_bundle / "models" / "topt.onnx", load_external_data=False)
    external = {t.name for t in raw.graph.initializer if t.external_data}
    assert external == set(variant["initializers"])
    assert {e.value for t in raw.graph.initializer for e in t.external_data if e.key == "location"} == {"topt.weights"}


def test_shared_embeddings_are_computed_once(proto, model):
    """Two tasks with the same stage-1 settings share one SREL: its weights are in the graph once."""
    assert set(model.srel) == {"check_in"}
    graph_numbers = sum(int(np.prod(t.dims)) for t in proto.graph.initializer)
    model_numbers = sum(t.numel() for t in model.state_dict().values())
    assert graph_numbers < 1.2 * model_numbers


@pytest.mark.parametrize("regions", SIZES)
def test_any_number_of_regions_gives_what_pytorch_gives(regions, model, session, arrays):
    inputs = arrays(regions)
    assert len(inputs["poi"]) == regions
    expected = run_model(model, inputs)
    found = session.run(inputs, session.outputs)
    assert list(found) == list(expected)
    for task, values in expected.items():
        assert found[task].shape == values.shape
        assert len(values) == regions
        worst = (np.abs(found[task] - values) / np.maximum(np.abs(values), 1.0)).max()
        assert worst <= TOLERANCES["fp32"], f"{task}: {worst}"
        assert regions < 3 or np.unique(values).size > 1, "a constant would prove nothing"


@pytest.fixture(scope="module")
def attentive():
    """A model with every kind of attention, weights at random, whose task is called as values inside of tiles are."""
    return made(srel={"layers": 1, "bias": 0.8})


def made(*, of=None, **settings):
    """A model of the settings, weights at random; ``of`` is more of its ModelSpec."""
    torch.manual_seed(0)
    config = tiny_config({"sqrt": task_config(**settings)})
    schema = Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=False, prompts={"prompt_sqrt": 10})
    model = TopT(ModelSpec(config=config, schema=schema, ranks={"sqrt": 10}, **(of or {}))).eval()
    model.srel["sqrt"].fit_statistics(inputs := tensors(12), inputs[POSITION])
    head = model.heads["sqrt"]
    head.basis.basis.normal_()
    head.target.mean.fill_(50.0)
    head.target.scale.fill_(10.0)
    return model


def tensors(regions):
    return {
        name: torch.from_numpy(array) for name, array in features(tiny_city(regions, prompts=["prompt_sqrt"])).items()
    }


@pytest.fixture(scope="module")
def tiled(attentive):
    """Its graph, in tiles of no more than 36 pairs of regions, or of three rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_tiles, "ENTRIES", 36)
        patch.setattr(row_tiles, "LEAST", 3)
        return export_graph(attentive, tensors(12))


@pytest.mark.parametrize("regions", [2, 3, 4, 6, 7, 12, 13, 40])
def test_tiles_give_what_the_whole_gives(regions, tiled, attentive):
    """One tile, several, and a last one that is not full."""
    inputs = {name: array.numpy() for name, array in tensors(regions).items()}
    whole = run_model(attentive, inputs)
    parity = compare(whole, run_graph(tiled, inputs), "tiled")
    assert parity.worst <= TOLERANCES["fp32"]
    assert parity.swapped == 0
    assert np.unique(whole["sqrt"]).size > 1, "a constant would prove nothing"


def scans(graph):
    return [node for node in graph.node if node.op_type == "Scan"]


def test_tiles_are_of_the_standards_operators(tiled):
    proto = onnx.ModelProto.FromString(tiled.model)
    outer = scans(proto.graph)
    assert len(outer) == 5, "centrality, two views, a Graphormer layer, an alignment"
    inner = [scan for one in outer for scan in scans(one.attribute[0].g)]
    assert len(inner) == 1, "an alignment's fits, one after the other"
    assert len(inner[0].input) == 3, "queries, keys, values"
    assert all(not node.domain for scan in outer + inner for node in scan.attribute[0].g.node)
    assert [o.domain for o in proto.opset_import] == [""]
    assert b"/work/" not in tiled.model, "no path of the exporting machine"


VARIANTS = {
    "exponential": {"srel": {"layers": 1, "bias": 0.8, "centrality": True, "decay": "exponential"}},
    "gaussian": {"srel": {"layers": 1, "bias": 0.8, "decay": "gaussian", "deep_fc": True}},
    "inverse": {"srel": {"layers": 1, "bias": 0.8, "decay": "inverse"}, "prompt4re": {"hidden": 4, "skip": True}},
    "counts": {"prompt4re": {"alignment": False}, "target": {"likelihood": "negative_binomial"}},
    "logarithms": {"prompt4re": {"value_width": 4}, "target": {"transform": "log1p"}},
    "ensemble": {
        "ensemble": {"enabled": True, "radial": True, "topt": True, "clip": 4.0},
        "prompt4re": {"skip": True},
        "target": {"transform": "cbrt"},
        "of": {"rows": {"sqrt": 3}, "leverage": 4},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_traced_once(variant, monkeypatch):
    """torch.onnx.export traces a program a second time where it takes it apart, which doubles what an export costs."""

    def refuse(self, *args, **options):
        raise AssertionError("this model is taken apart")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
    model = made(**VARIANTS[variant])
    assert export_graph(model, tensors(12)).model
    assert export_for_engine(model, tensors(12), precision="fp32", most=64).model


def test_both_kinds_of_head_are_in_the_bundle(model):
    """Else half of what is tested of bundles here would be tested of none."""
    kinds = {task: type(model.heads[task]) for task in model.heads}
    assert kinds == {"crime": EnsembleHead, "check_in": TaskHead, "service_call": TaskHead}


def test_a_synthetic_city_is_as_dense_as_the_training_city(model, bundle):
    """Points of a square, 40 km wide with 400 regions: 100 regions get a square 20 km wide."""
    position_m = np.pad(np.random.default_rng(0).uniform(-20e3, 20e3, (400, 2)), ((0, 0), (0, 1)))
    city = synthetic_city(model, bundle.manifest.ranges, position_m, regions=100, seed=1)
    lon, lat = (city.regions.column(axis).to_numpy() for axis in ("lon", "lat"))
    for degrees in (np.ptp(lon), np.ptp(lat)):
        assert 0.93 * 20 < degrees * 111 < 1.07 * 20


@pytest.mark.parametrize(("task", "depends"), [("check_in", True), ("crime", False)])
def test_what_depends_on_the_other_regions_of_a_graph(task, depends, session, arrays):
    """Attention runs over the city: the same region among fewer others is another prediction, and slicing is wrong.

    An ensemble head sees a region's own row of the features alone.
    """
    inputs = arrays(20)
    whole = session.run(inputs, [task])[task]
    sliced = session.run({name: values[:10] for name, values in inputs.items()}, [task])[task]
    if depends:
        assert np.abs(whole[:10] - sliced).max() > 1e-3
    else:
        np.testing.assert_allclose(whole[:10], sliced, rtol=1e-5, atol=1e-4)
