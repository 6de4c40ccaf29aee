"""Graphs that do what no exported model does, in bundles that were sealed again: a seal is no signature."""

import json
import os
import resource
import struct

import numpy as np
import onnx
import pytest
from commands import shell
from encoders_exported import EXPORTED
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
from topt_deploy.bundle.manifest import open_bundle
from topt_deploy.errors import BadBundle
from topt_deploy.hardening.onnx_operators import check_graph

BAD_BUNDLE = 76
GRAPH = "models/topt.onnx"


def after(model, *nodes, **constants):
    """Have ``nodes`` make the first output of ``inner``, what it was before."""
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["inner" if output == name else output for output in node.output]
    for constant, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), constant))
    for node in nodes:
        node.output[:] = [name if output == "out" else output for output in node.output]
        model.graph.node.append(node)


def node(kind, *inputs, domain="", outputs=("out",), **attributes):
    return helper.make_node(kind, list(inputs), list(outputs), domain=domain, **attributes)


def body(name="body"):
    flag = helper.make_tensor_value_info("go", TensorProto.BOOL, [])
    step = helper.make_tensor_value_info("step", TensorProto.INT64, [])
    on = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
    return helper.make_graph([helper.make_node("Identity", ["go"], ["on"])], name, [step, flag], [on])


def an_endless_loop(model):
    """A loop without a count whose condition stays true: the command would never end."""
    after(
        model,
        helper.make_node("Loop", ["", "true"], [], body=body()),
        node("Identity", "inner"),
        true=True,
    )


def a_branch(model):
    """A graph that does one thing on the day it is tested and another one afterwards."""
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["x"])], "b", [], [helper.make_tensor_value_info("x", 1, None)]
    )
    after(model, node("If", "true", then_branch=branch, else_branch=branch), true=True)


def an_operator_of_a_library(model):
    """A custom operator, whose library someone would then be asked to load."""
    model.opset_import.append(helper.make_opsetid("evil", 1))
    after(model, node("Steal", "inner", domain="evil"))


def an_operator_that_opens_a_file(model):
    """ONNX Runtime's own node for engines made elsewhere names a file to be loaded, by any path."""
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    more = {"ep_cache_context": "../../../tmp/evil.so", "embed_mode": 0, "main_context": 1}
    after(model, node("EPContext", "inner", domain="com.microsoft", **more))


def an_unknown_operator(model):
    """An operator of a standard that is not there yet, or never will be."""
    after(model, node("Frobnicate", "inner"))


def random_predictions(model):
    """Predictions that no receipt's hashes can explain."""
    after(model, node("RandomNormalLike", "inner", dtype=1))


def a_function(model):
    """An operator of an allowed name whose body the model itself brings."""
    function = helper.make_function(
        "", "Relu", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], [helper.make_opsetid("", 20)]
    )
    model.functions.append(function)


def sparse_weights(model):
    """A sparse tensor of one number and a dense size of 4 TB."""
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    places = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [1 << 40]))


def outside(location):
    def attack(model):
        """Weights that are read from a file which is none of the bundle's."""
        tensor = next(t for t in model.graph.initializer if t.external_data)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        tensor.raw_data = b""
        set_external_data(tensor, location, int(entries["offset"]), int(entries["length"]))
        tensor.ClearField("raw_data")

    attack.__name__ = f"weights_in_{location}"
    return attack


def weights_beyond_the_end(model):
    """Weights that begin where the file has ended: whatever lies there in memory."""
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "offset").value = str(1 << 40)


LOCATIONS = [
    "../regions.parquet",
    "/etc/hostname",
    "file:///etc/hostname",
    "https://example.org/w",
    "..",
    "",
    "/dev/zero",
]
REFUSED = [
    an_endless_loop,
    a_branch,
    an_operator_of_a_library,
    an_operator_that_opens_a_file,
    an_unknown_operator,
    random_predictions,
    a_function,
    sparse_weights,
    weights_beyond_the_end,
    *map(outside, LOCATIONS),
]


def hostile(bundle, attack, reseal, graph=GRAPH):
    path = bundle / graph
    model = onnx.load(path, load_external_data=False)
    attack(model)
    path.write_bytes(model.SerializeToString())
    reseal(bundle, lambda record: None)


@pytest.mark.parametrize("attack", REFUSED, ids=lambda attack: attack.__name__)
def test_no_runtime_is_given_it(attack, desk, refused, reseal):
    hostile(desk.bundle, attack, reseal)
    refused(BAD_BUNDLE, f"{GRAPH} is refused")


@pytest.mark.parametrize("attack", REFUSED[-len(LOCATIONS) :], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("form", ["onnxruntime", "standard"])
def test_nor_for_an_encoder(attack, form, prompted, tmp_path, reseal):
    """Its weights are mapped by the runtime itself, which opens what the graph names."""
    bundle = tmp_path / "encoder.topt"
    shell(f"cp -r {prompted / 'encoder.topt'} {bundle}", tmp_path)
    hostile(bundle, attack, reseal, f"decoder.{form}.onnx")
    with pytest.raises(BadBundle, match=rf"decoder\.{form}\.onnx is refused"):
        open_encoder_bundle(bundle).verify()


@pytest.mark.parametrize("command", ["predict", "encode", "selftest", "info"])
def test_an_encoder_inside_a_citys_bundle(command, prompted, tmp_path, reseal, topt_run):
    """Refused by whatever would run it."""
    shell(f"cp -r {prompted} {tmp_path / 'city'}", tmp_path)
    bundle = tmp_path / "city/model.topt"
    hostile(bundle / "encoder", outside("/etc/hostname"), reseal, "decoder.onnxruntime.onnx")
    digest = (bundle / "encoder/manifest.json.sha256").read_text().split()[0]
    reseal(bundle, lambda record: record["encoder"].update(sha256=digest))
    arguments = {
        "predict": [tmp_path / "city/bare.parquet", "--bundle", bundle],
        "encode": [tmp_path / "city/bare.parquet", "--bundle", bundle],
        "selftest": [bundle],
        "info": [bundle],
    }[command]
    said = topt_run(command, *arguments)
    assert said.code == BAD_BUNDLE, said
    assert "onnx is refused" in said.err


def a_terabyte(model):
    """A constant that takes a terabyte once it is made."""
    nodes = [
        node("ConstantOfShape", "shape", outputs=["big"]),
        node("ReduceSum", "big", outputs=["sum"], keepdims=0),
    ]
    after(model, *nodes, node("Add", "inner", "sum"), shape=[1 << 38])


def a_size_beyond_all_numbers(model):
    """A size whose product overflows, so that less is asked for than is written."""
    nodes = [
        node("ConstantOfShape", "shape", outputs=["big"]),
        node("ReduceSum", "big", outputs=["sum"], keepdims=0),
    ]
    after(model, *nodes, node("Add", "inner", "sum"), shape=[1 << 62, 1 << 10])


def a_place_that_is_not_there(model):
    """What lies far behind a tensor."""
    after(model, node("Gather", "inner", "place"), place=[10**9])


def one_number_for_all(model):
    """Fewer predictions than regions."""
    after(model, node("ReduceSum", "inner", keepdims=0))


@pytest.mark.parametrize(
    "attack", [a_terabyte, a_size_beyond_all_numbers, a_place_that_is_not_there, one_number_for_all]
)
def test_what_allowed_operators_can_do_ends_as_a_bad_bundle(attack, desk, reseal):
    """Memory that arithmetic asks for is known when it asks: within the process's limits, exit 76."""
    hostile(desk.bundle, attack, reseal)

    def little_memory():
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    before = desk.state()
    said = shell("topt-run predict regions.parquet", desk.folder, little_memory, OPENBLAS_NUM_THREADS="1")
    assert said.code == BAD_BUNDLE, said
    assert "Traceback" not in said.err
    assert desk.state() == before


class TestPolyglots:
    def test_onnx_runtimes_own_format(self, desk, refused, reseal):
        """Four bytes in the right place, and ONNX Runtime reads the file as something that the walk has not seen."""
        path = desk.bundle / GRAPH
        data = path.read_bytes()
        path.write_bytes(b"\x32\x06xxORTM" + data)  # a documentation, which says ORTM
        assert len(onnx.load_from_string(path.read_bytes()).graph.node) > 100, "a sound ONNX file all the same"
        reseal(desk.bundle, lambda record: None)
        refused(BAD_BUNDLE, "ONNX Runtime's own format")

    def test_a_graph_of_another_suffix(self, desk, refused, reseal):
        """A graph that is not called one would not be looked through."""
        os.rename(desk.bundle / GRAPH, desk.bundle / "models/topt.bin")

        def change(record):
            record["files"]["models/topt.bin"] = record["files"].pop(GRAPH)
            record["variants"]["fp32"]["graph"] = "models/topt.bin"

        record = json.loads((desk.bundle / "manifest.json").read_text())
        change(record)
        (desk.bundle / "manifest.json").write_text(json.dumps(record))
        reseal(desk.bundle, lambda record: None)
        refused(BAD_BUNDLE, "variants is not of the right form")

    @pytest.mark.parametrize("field", [4, 7])
    def test_a_node_with_two_kinds(self, field, desk):
        """Protobuf takes the last value of a field; whoever took the first would see another operator."""
        kind = bytes([field << 3 | 2, 4]) + b"Relu"
        one = bytes([0x22, 4]) + b"Relu"
        body = bytes([0x0A, len(kind + kind + one)]) + kind + kind + one
        with pytest.raises(ValueError, match="which no exporter writes"):
            check_graph(bytes([0x3A, len(body)]) + body, {})

    def test_two_graphs_are_merged_by_protobuf(self, desk):
        data = (desk.bundle / GRAPH).read_bytes()
        beside = {"topt.weights": 1 << 40}
        check_graph(data, beside)
        with pytest.raises(ValueError, match="2 graphs"):
            check_graph(data + data, beside)

    def test_any_damage_is_a_value_error_or_harmless(self, desk):
        """The walk itself: no other exception and no endless loop, whatever the bytes."""
        data = (desk.bundle / GRAPH).read_bytes()[:3000]
        rng = np.random.default_rng(0)
        for _ in range(500):
            damaged = bytearray(data)
            for place in rng.integers(len(data), size=3):
                damaged[place] = rng.integers(256)
            try:
                check_graph(bytes(damaged), {"topt.weights": 1 << 30})
            except ValueError:
                continue


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPORTED)
def test_what_the_exporters_write_is_allowed(family, encoders):
    for precision in EXPORTED[family]:
        open_encoder_bundle(encoders(family, precision)).verify()


def test_what_the_city_exporter_writes_is_allowed(demo_bundle, prompted):
    for bundle in (demo_bundle, prompted / "model.topt"):
        open_bundle(bundle).verify()


def test_the_walk_reads_what_onnx_reads(demo_bundle):
    """Field numbers are protobuf's: struct-packed by hand here, and by onnx in every test above."""
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], struct.pack("<f", 1.0), raw=True)
    graph = helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "g", [], [])
    model = helper.make_model(graph)
    check_graph(model.SerializeToString(), {})
    set_external_data(model.graph.node[0].attribute[0].t, "elsewhere", 0, 4)
    with pytest.raises(ValueError, match="'elsewhere', which is not a file beside it"):
        check_graph(model.SerializeToString(), {})


def with_an_attribute(kind, **attributes):
    def attack(model):
        after(model, node(kind, "inner", **attributes))

    return attack


@pytest.mark.parametrize(
    "attack",
    [
        with_an_attribute("Split", axis=0, num_outputs=0),
        with_an_attribute("Transpose", perm=[0, 1 << 40]),
        with_an_attribute("Softmax", axis=-(1 << 63)),
        with_an_attribute("Conv", group=0),
        with_an_attribute("Conv", strides=[0, 1]),
        with_an_attribute("GroupNormalization", num_groups=0),
        with_an_attribute("Attention", q_num_heads=1 << 40, kv_num_heads=1),
        with_an_attribute("DepthToSpace", blocksize=0),
        with_an_attribute("Mod"),
    ],
)
def test_numbers_that_kernels_divide_by(attack, demo_bundle):
    """ONNX Runtime's kernels end the process by SIGFPE, or ask for all the memory that there is."""
    model = onnx.load(demo_bundle / GRAPH, load_external_data=False)
    sizes = {"topt.weights": (demo_bundle / "models/topt.weights").stat().st_size}
    check_graph(model.SerializeToString(), sizes)
    attack(model)
    with pytest.raises(ValueError, match="no exporter writes"):
        check_graph(model.SerializeToString(), sizes)


def a_division_of_the_least_number(model):
    """What the process would end by: SIGFPE."""
    nodes = [
        node("Shape", "inner", outputs=["shape"]),
        node("Mul", "shape", "least", outputs=["low"]),
        node("Neg", "shape", outputs=["minus"]),
        node("Div", "low", "minus", outputs=["gone"]),
        node("ReduceSum", "gone", outputs=["sum"], keepdims=0),
        node("Cast", "sum", outputs=["number"], to=TensorProto.FLOAT),
    ]
    after(model, *nodes, node("Add", "inner", "number"), least=np.int64(-(1 << 63)))


def test_a_process_does_not_get_there(desk, refused, reseal):
    """With one city there is no worker whose end could be told from that of the command."""
    hostile(desk.bundle, a_division_of_the_least_number, reseal)
    refused(BAD_BUNDLE, f"{GRAPH} is refused")


def test_fractions_may_be_divided_by_anything(demo_bundle):
    """The city's own graph does so dozens of times; here by 0, which is no trap."""
    model = onnx.load(demo_bundle / GRAPH, load_external_data=False)
    after(model, node("Div", "inner", "nothing"), nothing=np.float32(0))
    check_graph(model.SerializeToString(), {"topt.weights": 1 << 30})
