"""What linear maps and attention become, run on ONNX Runtime, against restatements in numpy."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from rounding import in_8_bits, weight_in_8_bits
from torch import nn

from topt_deploy.export.prompts.assemble import assemble
from topt_deploy.export.prompts.graph_builder import MICROSOFT, UINT4, Weights
from topt_deploy.export.prompts.lower import FORMS, PRECISIONS, TENSORRT
from topt_deploy.export.prompts.pieces import Network, Piece, Spec, Use
from topt_deploy.export.prompts.traced_operators import attention
from topt_deploy.runtime.backends.onnxruntime import MappedSession

OUT = 48
FLOAT, BOOL = torch.float32, torch.bool


class Map(nn.Module):
    """One linear map."""

    def __init__(self, width, bias):
        super().__init__()
        self.map = nn.Linear(width, OUT, bias=bias)

    def forward(self, x):
        return (self.map(x),)


def one_map(width, rank, bias):
    dims = ("B", "S", width)[-rank:] if rank == 2 else ("B", "S", width)
    piece = Piece(
        name="map", build=lambda: Map(width, bias), inputs={"x": Spec(dtype=FLOAT, dims=dims)}, outputs=("y",)
    )
    return Network(name="net", inputs=piece.inputs, outputs=("y",), uses=(Use(piece=piece, weights="w."),))


def weights(width, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(OUT, width)).astype(np.float32) * np.exp(rng.normal(size=(OUT, 1))).astype(np.float32)
    weight[3] = 0
    weight[5, :32] = 0  # a block without any number
    return {"w.map.weight": weight, "w.map.bias": rng.normal(size=OUT).astype(np.float32)}


def in_4_bits(weight):
    """Each 32 of a row to -8 … 7 steps, whose sign is such that the largest magnitude is -8 of them."""
    out = np.zeros_like(weight)
    for i, row in enumerate(weight):
        for start in range(0, len(row), 32):
            block = row[start : start + 32]
            largest = block[np.abs(block).argmax()]
            if largest:
                step = largest / -8
                out[i, start : start + 32] = np.clip(np.round(block / step), -8, 7) * step
    return out


def restated(x, weight, precision, form):
    flat = x.reshape(-1, x.shape[-1])
    if precision == "fp16":
        weight = weight.astype(np.float16).astype(np.float32)
    elif precision == "int8":
        weight = weight_in_8_bits(weight)
        flat = in_8_bits(flat) if form == "onnxruntime" else flat
    elif precision == "int4":
        weight = in_4_bits(weight)
    return (flat.astype(np.float64) @ weight.astype(np.float64).T).reshape(*x.shape[:-1], OUT)


def run(network, tensors, precision, form, folder, inputs):
    done = assemble(network, lambda name: torch.tensor(tensors[name]), {}, precision, folder)
    return MappedSession(done.graphs[form]).run(inputs, ["y"])["y"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rank", "bias"), [(2, False), (3, True)])
def test_a_linear_map(tmp_path, precision, form, rank, bias):
    tensors = weights(64)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 9, 64)[3 - rank :]).astype(np.float32) * rng.lognormal(size=(9, 1)).astype(np.float32)
    x[..., 4, :] = 0
    found = run(one_map(64, rank, bias), tensors, precision, form, tmp_path, {"x": x})
    expected = restated(x, tensors["w.map.weight"], precision, form) + (tensors["w.map.bias"] if bias else 0)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    exact = x @ tensors["w.map.weight"].T + (tensors["w.map.bias"] if bias else 0)
    off = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    low, high = {"fp32": (0, 1e-6), "fp16": (1e-5, 1e-3), "int8": (1e-3, 0.03), "int4": (0.02, 0.2)}[precision]
    assert low <= off < high


@pytest.mark.parametrize("form", FORMS)
def test_a_map_whose_inputs_are_no_whole_blocks_gets_8_bits(tmp_path, form):
    tensors = weights(40)
    x = np.random.default_rng(1).normal(size=(9, 40)).astype(np.float32)
    found = run(one_map(40, 2, False), tensors, "int4", form, tmp_path, {"x": x})
    expected = restated(x, tensors["w.map.weight"], "int8", form)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_what_forms_are_made_of(tmp_path):
    found = {}
    for precision in PRECISIONS:
        (tmp_path / precision).mkdir()
        done = assemble(
            one_map(64, 2, True), lambda name: torch.tensor(weights(64)[name]), {}, precision, tmp_path / precision
        )
        for form in FORMS:
            graph = onnx.load(done.graphs[form], load_external_data=False)
            onnx.checker.check_model(str(done.graphs[form]))
            found[precision, form] = Counter(f"{node.domain}:{node.op_type}" for node in graph.graph.node)
            if form == "standard":
                assert {opset.domain for opset in graph.opset_import} == {""}
    assert found["fp32", "standard"] == found["fp32", "onnxruntime"] == {":MatMul": 1, ":Add": 1}
    assert found["int8", "standard"] == {":DequantizeLinear": 1, ":MatMul": 1, ":Add": 1}
    assert found["int4", "standard"] == {":DequantizeLinear": 1, ":Transpose": 1, ":MatMul": 1, ":Add": 1}
    assert found["int4", "onnxruntime"] == {f"{MICROSOFT}:MatMulNBits": 1, ":Add": 1}
    assert found["int8", "onnxruntime"][f"{MICROSOFT}:MatMulIntegerToFloat"] == 1


def dequantized(graph):
    """Attributes of a graph's only DequantizeLinear, and the tensors that it reads."""
    (node,) = (node for node in graph.node if node.op_type == "DequantizeLinear")
    held = {tensor.name: tensor for tensor in graph.initializer}
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}, [held[name] for name in node.input]


def test_4_bits_are_signed_blocks_of_32_for_tensorrt(tmp_path):
    load = {name: torch.tensor(array) for name, array in weights(64).items()}.__getitem__
    done = assemble(one_map(64, 2, False), load, {}, "int4", tmp_path, (*FORMS, TENSORRT))
    attributes, (codes, scale) = dequantized(onnx.load(done.graphs[TENSORRT]).graph)
    assert attributes == {"axis": 0, "block_size": 32}
    assert codes.data_type == onnx.TensorProto.INT4
    assert list(codes.dims) == [64, OUT]
    assert list(scale.dims) == [2, OUT]


def test_4_bits_lie_in_the_file_once(tmp_path):
    """Half a byte a weight and four bytes for each 32, which both forms read; and one half for each 32 zeros."""
    width = 2048
    load = {name: torch.tensor(array) for name, array in weights(width).items()}.__getitem__
    done = assemble(one_map(width, 2, False), load, {}, "int4", tmp_path)
    blocks = OUT * width // 32
    assert done.weights.stat().st_size == OUT * width // 2 + 4 * blocks + blocks // 2
    ours, standard = (onnx.load(done.graphs[form], load_external_data=False).graph for form in FORMS)
    places = {t.name: {(e.key, e.value) for e in t.external_data} for t in ours.initializer}
    _, (codes, scale, zero) = dequantized(standard)
    assert {t.name: {(e.key, e.value) for e in t.external_data} for t in (codes, scale)} == places
    assert [t.data_type for t in (codes, scale, zero)] == [
        onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT4,
    ]  # fmt: skip
    (packed,) = (t for t in ours.initializer if t.data_type == onnx.TensorProto.UINT8)
    assert list(packed.dims) == [OUT, width // 32, 16]


def test_an_odd_number_of_4_bits_fills_its_last_byte_with_nothing(tmp_path):
    odd = np.arange(33 * 33).reshape(33, 33) % 16
    with Weights(tmp_path / "net.weights") as held:
        held.add("odd", odd.astype(UINT4))
        tensor = held.tensor("odd")
    onnx.external_data_helper.load_external_data_for_tensor(tensor, str(tmp_path))
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(int), odd)


class Attention(nn.Module):
    """Attention, with a mask or without."""

    def forward(self, query, key, value, mask=None):
        return (attention(query, key, value, mask, 0.3),)


def attending(query, key, value, mask):
    """Attention, one query at a time."""
    batch, heads, new, _ = query.shape
    out = np.zeros((batch, heads, new, value.shape[-1]))
    for b, h, s in np.ndindex(batch, heads, new):
        g = h // (heads // key.shape[1])
        scores = 0.3 * (key[b, g] @ query[b, h, s])
        weight = np.exp(scores - scores.max())
        if mask is not None:
            weight = weight * mask[b, 0, s]
        out[b, h, s] = (weight / weight.sum()) @ value[b, g]
    return out


@pytest.mark.parametrize("keys", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_attention(tmp_path, keys, masked):
    heads, width, wide = 4, 8, 6
    inputs = {
        "query": Spec(dtype=FLOAT, dims=("B", heads, "S", width)),
        "key": Spec(dtype=FLOAT, dims=("B", keys, "L", width)),
        "value": Spec(dtype=FLOAT, dims=("B", keys, "L", wide)),
    }
    inputs |= {"mask": Spec(dtype=BOOL, dims=("B", 1, "S", "L"))} if masked else {}
    piece = Piece(name="attention", build=Attention, inputs=inputs, outputs=("y",))
    network = Network(name="net", inputs=inputs, outputs=("y",), uses=(Use(piece=piece),))
    done = assemble(network, lambda name: torch.zeros(()), {}, "fp32", tmp_path)
    rng = np.random.default_rng(0)
    for batch, new, length in ((1, 1, 1), (2, 5, 9), (3, 17, 4)):
        sizes = {"B": batch, "S": new, "L": length}
        given = {
            name: rng.normal(size=[sizes.get(d, d) for d in spec.dims]).astype(np.float32)
            for name, spec in inputs.items()
        }
        if masked:
            given["mask"] = given["mask"] > 0
            given["mask"][..., 0] = True
        expected = attending(*(given.get(name) for name in ("query", "key", "value", "mask")))
        for form in FORMS:
            found = MappedSession(done.graphs[form]).run(given, ["y"])["y"]
            assert np.abs(found - expected).max() < 1e-5
        if masked:  # a query that may look nowhere gets something finite
            given["mask"][0, 0, 0] = False
            for form in FORMS:
                assert np.isfinite(MappedSession(done.graphs[form]).run(given, ["y"])["y"]).all()
