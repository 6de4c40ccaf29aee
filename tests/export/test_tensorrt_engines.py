"""The fused model for TensorRT: what its graphs hold and say, and that TensorRT-RTX builds them without a GPU."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from engines import UNSUPPORTED, rtx, write_graph
from graphs import run_graph
from onnx import numpy_helper

from topt_deploy.bundle.manifest import open_bundle
from topt_deploy.bundle.tolerances import PREDICTIONS as TOLERANCES
from topt_deploy.data.city import read_city
from topt_deploy.data.features import POSITION, features
from topt_deploy.errors import BadBundle, UsageError
from topt_deploy.export import onnx_graph as graph_module
from topt_deploy.export import tensorrt_engines as module
from topt_deploy.export.city_bundle import PROFILE
from topt_deploy.export.golden_cities import synthetic_city
from topt_deploy.export.onnx_graph import WEIGHTS, export_for_engine
from topt_deploy.export.parity import GateCity, compare, on_processor, parity_gate, run_model
from topt_deploy.export.quantize_weights import quantize_int4, quantize_int8
from topt_deploy.export.tensorrt_engines import EngineTarget, make_engines
from topt_deploy.hardening.onnx_operators import check_graph
from topt_deploy.model.checkpoint import load_model, load_tensors
from topt_deploy.model.half_precision import halved, in_half, never_in_few_bits
from topt_deploy.run_folder import INPUTS_FILE
from topt_deploy.tensorrt.build import build_engine
from topt_deploy.tensorrt.library import RTX, TENSORRT
from topt_deploy.tensorrt.profile import ProfileRange

pytestmark = pytest.mark.slow

PRECISIONS = ("fp16", "int8", "int4")
SIZES = (1, 2, 9, 77, 150)


@pytest.fixture(scope="module")
def model(demo_run):
    return load_model(demo_run / "model.safetensors")


@pytest.fixture(scope="module")
def inputs(demo_run):
    return load_tensors(demo_run / INPUTS_FILE)[0]


@pytest.fixture(scope="module")
def graphs(model, inputs):
    """The graph of every precision; int8 and int4 are made of one trace."""
    found = {"fp16": export_for_engine(model, inputs, precision="fp16", most=4096)}
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            graph_module, "quantise", lambda p, _, names: kept.update(data=p.SerializeToString(), names=names)
        )
        export_for_engine(model, inputs, precision="int8", most=4096)
    for precision in ("int8", "int4"):
        proto = onnx.load_model_from_string(kept["data"])
        graph_module.quantise(proto, precision, kept["names"])
        onnx.checker.check_model(proto, full_check=True)
        found[precision] = graph_module._split(proto, every_type=True)
    return found


@pytest.fixture
def place(graphs, tmp_path):
    """Write a precision's graph and weights."""

    def write(precision):
        (tmp_path / "topt.onnx").write_bytes(graphs[precision].model)
        (tmp_path / WEIGHTS).write_bytes(graphs[precision].weights)
        return tmp_path / "topt.onnx"

    return write


def types(graph):
    proto = onnx.load_model_from_string(graph.model)
    return {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in proto.graph.initializer}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_hold_standard_operators_without_bodies(graphs, precision):
    proto = onnx.load_model_from_string(graphs[precision].model)
    assert [opset.domain for opset in proto.opset_import] == [""]
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert not {"Scan", "Loop", "If"} & set(kinds)
    assert (kinds["DequantizeLinear"] > 0) == (precision != "fp16")
    check_graph(graphs[precision].model, {WEIGHTS: len(graphs[precision].weights)})
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "regions"


def test_every_product_is_in_half_but_those_that_half_would_ruin(graphs, model):
    proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(graphs["fp16"].model))
    kinds = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
    products = [node for node in proto.graph.node if node.op_type in ("MatMul", "Gemm")]
    exact = [node for node in products if kinds[node.output[0]] == onnx.TensorProto.FLOAT]
    assert len(products) - len(exact) > 40
    read = {name for node in exact for name in node.input}
    weights = {name for name in types(graphs["fp16"]) if name in read}
    # The regressions' coefficients are slices, under that operation's name. The factor is the leverage's.
    named = {name.rsplit(".", 1)[-1].rstrip("_0123456789") for name in weights}
    assert named == {"basis", "frequencies", "slice", "factor"}
    softmaxes = [node for node in proto.graph.node if node.op_type == "Softmax"]
    assert all(kinds[node.output[0]] == onnx.TensorProto.FLOAT for node in softmaxes)


def test_few_bits_are_few_bits(graphs, model):
    kept = never_in_few_bits(graph_module._Whole(model, True))
    assert len(kept) == 3, "the embedding's last map, and two of the crime head's networks"
    for precision, expected in (("int8", {"INT8"}), ("int4", {"INT4", "INT8"})):
        found = types(graphs[precision])
        codes = {kind for name, kind in found.items() if name.endswith(f".{precision}")}
        assert codes == expected
        assert {found[name] for name in kept} == {"FLOAT16"}
        assert not any(f"{name}.{precision}" in found for name in kept)
    sizes = {precision: len(graph.weights) for precision, graph in graphs.items()}
    assert sizes["int4"] < sizes["int8"] < 0.75 * sizes["fp16"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_says_what_pytorch_says_within_its_tolerance(graphs, model, inputs, demo_bundle, precision):
    manifest = open_bundle(demo_bundle).manifest
    position_m = inputs[POSITION].numpy()
    worst = []
    for regions in SIZES:
        city = synthetic_city(model, manifest.ranges, position_m, regions=regions, seed=regions)
        arrays = features(read_city(city.regions, city.mobility, model.spec.schema), model.input_names())
        parity = compare(run_model(model, arrays), run_graph(graphs[precision], arrays), "x", precision)
        assert parity.swapped == 0
        worst.append(parity.worst)
    assert max(worst) <= TOLERANCES[precision]
    assert max(worst) > {"fp16": 1e-5, "int8": 1e-3, "int4": 1e-2}[precision], "it is computed in fewer bits indeed"


def test_the_gate_refuses_what_is_another_precisions(place, model, inputs):
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    cities, coarse = [GateCity(model=model, name="training city", inputs=arrays)], on_processor(place("int4"))
    assert len(parity_gate(cities, coarse, "int4")) == 1
    with pytest.raises(BadBundle, match=r"parity gate failed on training city \(77 regions, fp16\)") as refused:
        parity_gate(cities, coarse, "fp16")
    assert refused.value.fix == "export with a higher --precision"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_rtx_builds_it_for_two_capabilities(place, precision):
    rtx()
    target = EngineTarget(flavour=RTX, precision=precision, capabilities=("8.0", "8.9"))
    made = make_engines(target, place(precision), PROFILE)
    assert {name: path.name for name, path in made.engines.items()} == {
        "8.0": "topt.sm80.engine", "8.9": "topt.sm89.engine",
    }  # fmt: skip
    assert all(path.stat().st_size > 100_000 for path in made.engines.values())
    assert made.checked == ("onnx.checker", f"{made.library}'s parser")
    assert "for 8.0, 8.9" in made.told


def test_a_wrong_profile_names_the_dimension(place):
    library = rtx()
    with pytest.raises(UsageError, match="no sizes for dimension 'regions' of input 'poi'"):
        build_engine(library, place("fp16"), {}, capability="8.0")
    with pytest.raises(UsageError, match="has sizes for 'tokens'"):
        build_engine(library, place("fp16"), {**PROFILE, "tokens": ProfileRange(min=1, opt=2, max=3)}, capability="8.0")


def test_an_unsupported_operator_is_named(tmp_path):
    rtx()
    path = write_graph(tmp_path / "dynamic.onnx", UNSUPPORTED)
    with pytest.raises(BadBundle) as refused:
        make_engines(EngineTarget(flavour=TENSORRT, precision="int8"), path, PROFILE)
    assert "DynamicQuantizeLinear (node dynamic)" in refused.value.found


def test_where_tensorrt_is_not_the_target_builds(place, monkeypatch):
    """And where its sibling is not either, the standard's checker alone has looked."""
    monkeypatch.setattr(module, "_installed", lambda flavour: None)
    made = make_engines(EngineTarget(flavour=TENSORRT, precision="fp16"), place("fp16"), PROFILE)
    assert made.engines == {}
    assert made.library is None
    assert made.checked == ("onnx.checker",)
    assert "the target builds it at first use" in made.told


def test_the_command_makes_a_bundle_with_engines(demo_run, demo_bundle, topt_deploy, topt_run, desk, tmp_path):
    """One more variant beside the portable one, sealed with it; predictions come from the portable one as before."""
    rtx()
    out = tmp_path / "city.topt"
    made = ("--format", "trt", "--flavour", "rtx", "--precision", "int8", "--capability", "8.9")
    said = topt_deploy("export", demo_run, "--out", out, *made, "--profile", "1,77,300")
    assert said.code == 0, said.err
    assert "rtx-int8: checked by onnx.checker and TensorRT-RTX" in said.err
    manifest = open_bundle(out).manifest
    assert set(manifest.variants) == {"fp32", "rtx-int8"}
    assert manifest.files["models/topt.weights"] == open_bundle(demo_bundle).manifest.files["models/topt.weights"]
    variant = manifest.variants["rtx-int8"]
    folder = "models/rtx-int8"
    assert variant["engines"] == {"8.9": f"{folder}/topt.sm89.engine"}
    assert {variant["graph"], variant["weights"], *variant["engines"].values()} <= set(manifest.files)
    assert (variant["flavour"], variant["precision"]) == ("rtx", "int8")
    assert variant["profile"] == {"regions": [1, 77, 300]}
    assert variant["library"].startswith("TensorRT-RTX 1.")
    assert variant["tolerance"] == TOLERANCES["int8"]
    assert [p["city"] for p in variant["parity"]] == ["training city", "golden-7", "golden-31", "synthetic-203"]
    assert all(0 < p["worst"] <= TOLERANCES["int8"] and p["swapped"] == 0 for p in variant["parity"])
    said = topt_run("info", out)
    assert f"rtx-int8: {variant['graph']}, tolerance 0.1, engines for 8.9 by TensorRT-RTX 1." in said.out
    assert topt_run("predict", desk.regions, "--bundle", out).code == 0
    (out / variant["engines"]["8.9"]).write_bytes(b"another")
    assert topt_run("info", out).code == 76


def test_what_the_command_asks_for_is_refused_before_the_work(demo_run, topt_deploy, tmp_path):
    for arguments, part in (
        (("--profile", "1,2,3"), "--format trt"),
        (("--precision", "int8"), "--format trt"),
        (("--format", "onnx", "--flavour", "rtx"), "--format trt"),
        (("--format", "trt", "--profile", "5,2,3"), "no profile of regions"),
        (("--format", "trt", "--profile", "tokens=1,2,3"), "no such dimension"),
        (("--format", "trt", "--capability", "8.9"), "builds for the GPU that it runs on"),
        (("--format", "trt", "--flavour", "rtx"), "is to be told what for"),
    ):
        said = topt_deploy("export", demo_run, "--out", tmp_path / "city.topt", *arguments)
        assert said.code == 2
        assert part in said.err
        assert "exporting" not in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda variant: variant.pop("precision"),
        lambda variant: variant.update(profile={}),
        lambda variant: variant.update(profile={"regions": [9, 2, 3]}),
        lambda variant: variant.update(engines={"8.9": "models/topt.weights"}),
        lambda variant: variant.update(engines={"8.9": "models/nowhere.engine"}),
        lambda variant: variant.update(flavour="trt"),
        lambda variant: variant.update(checked=[1]),
    ],
    ids=["no precision", "no profile", "wrong profile", "no engine's name", "no file", "flavour", "checked"],
)
def test_a_manifest_that_is_not_of_that_form(desk, reseal, change):
    own = {
        "flavour": "rtx", "precision": "fp16", "profile": {"regions": [1, 2, 3]}, "library": "x", "engines": {},
        "checked": ["onnx.checker"],
    }  # fmt: skip
    reseal(desk.bundle, lambda record: record["variants"].update(more=record["variants"]["fp32"] | own))
    assert set(open_bundle(desk.bundle).manifest.variants) == {"fp32", "more"}
    reseal(desk.bundle, lambda record: change(record["variants"]["more"]))
    with pytest.raises(BadBundle, match=r"variants is not of the right form|no profile of regions"):
        open_bundle(desk.bundle)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (EngineTarget(flavour=RTX, precision="fp16"), "is to be told what for"),
        (EngineTarget(flavour=TENSORRT, precision="fp16", capabilities=("8.0",)), "builds for the GPU that it runs on"),
        (EngineTarget(flavour=RTX, precision="fp16", capabilities=("8.0", "9.0")), "does not build for this compute"),
    ],
)
def test_what_does_not_go_together_is_refused_first(target, message):
    rtx()
    with pytest.raises(UsageError, match=message):
        target.check()


def test_half_is_but_a_copy(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = halved(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.float16 in {p.dtype for p in copy.parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_products_are_half_and_others_are_not():
    a, b = torch.full((2, 2), 1.0 + 2**-12), torch.eye(2)
    with in_half():
        assert torch.equal(a @ b, torch.ones(2, 2)), "2⁻¹² is beyond half"
        assert (a @ b).dtype == torch.float32
        assert torch.equal(torch.nn.functional.linear(a, b), torch.ones(2, 2))
        assert torch.equal(torch.mm(a, b), a)
        assert torch.equal(a * 1.0, a)
    assert torch.equal(a @ b, a)


@pytest.mark.parametrize("scale_type", [np.float32, np.float16])
def test_codes_of_8_and_4_bits(scale_type):
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(5, 64)) * np.exp(rng.normal(size=(5, 1)))).astype(np.float32)
    weight[2] = 0
    weight[3] *= 1e-7  # whose scale in half is next to nothing
    codes, scale = quantize_int8(weight, scale_type)
    assert (codes.dtype, scale.dtype) == (np.int8, scale_type)
    off = np.abs(codes * scale.astype(np.float32)[:, None] - weight).max(axis=1)
    assert (off <= np.maximum(0.51 * scale.astype(np.float32), 1e-12) + (scale_type is np.float16) * 1e-6).all()
    codes, scale = quantize_int4(weight, scale_type)
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert scale.shape == (5, 2)
    assert (codes[2] == 0).all()
    put_together = codes.reshape(5, 2, 32) * scale.astype(np.float32)[..., None]
    off = np.abs(put_together.reshape(5, 64) - weight)
    assert (off <= 1.01 * np.abs(scale.astype(np.float32)).repeat(32, axis=1) + 1e-6).all()


def test_few_bits_of_several_members_do_not_meet():
    """Blocks of 32 inputs of each member's own, and a transposed weight put straight."""
    from topt_deploy.export.quantize_graph import quantise

    rng = np.random.default_rng(1)
    three = rng.normal(size=(2, 64, 16)).astype(np.float16)
    turned = rng.normal(size=(24, 64)).astype(np.float16)
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float16[2, n, 64] x, float16[n, 64] z, float16[2, 64, 16] three, float16[24, 64] turned)
        => (float16[2, n, 16] y, float16[n, 24] u) { y = MatMul(x, three) u = Gemm <transB = 1>(z, turned) }"""
    )
    del proto.graph.input[2:]
    proto.graph.initializer.extend([numpy_helper.from_array(three, "three"), numpy_helper.from_array(turned, "turned")])
    quantise(proto, "int4", ())
    onnx.checker.check_model(proto, full_check=True)
    held = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert set(held) == {"three.int4", "three.int4_scale", "turned.int4", "turned.int4_scale"}
    for name, weight in (("three", three), ("turned", turned.T)):
        codes = held[f"{name}.int4"].astype(np.float32)
        scale = held[f"{name}.int4_scale"].astype(np.float32).repeat(32, axis=-2)
        assert codes.shape == weight.shape
        assert np.abs(codes * scale - weight).max() <= np.abs(scale).max()
        assert np.corrcoef((codes * scale).ravel(), weight.ravel().astype(np.float32))[0, 1] > 0.99
