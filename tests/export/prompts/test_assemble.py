"""Networks put together layer by layer: what they compute, what they are traced from, and what they keep in memory."""

import tracemalloc

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from topt_deploy.export.prompts import assemble as module
from topt_deploy.export.prompts.assemble import assemble
from topt_deploy.export.prompts.lower import FORMS, PRECISIONS
from topt_deploy.export.prompts.pieces import Network, Piece, Spec, Use, execute
from topt_deploy.export.prompts.trace import trace, without_weights
from topt_deploy.runtime.backends.onnxruntime import MappedSession

FLOAT = torch.float32
WIDTH, LAYERS = 64, 3


class Inner(nn.Module):
    """A norm of its own, a map, and what stays of the input."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.map = nn.Linear(width, width)

    def forward(self, hidden, other):
        shifted = hidden + other.mean(dim=1, keepdim=True)
        return hidden + torch.nn.functional.silu(self.map(shifted * self.scale))


class Layer(nn.Module):
    """Wraps the layer as recipes do; the second output is an input as it came."""

    def __init__(self, width):
        super().__init__()
        self.inner = Inner(width)

    def forward(self, hidden, other):
        return self.inner(hidden, other), other


class Last(nn.Module):
    """What a network ends with: its output has a name that no input has."""

    def forward(self, hidden):
        return (2 * hidden,)


def network(width=WIDTH, layers=LAYERS):
    x = Spec(dtype=FLOAT, dims=("B", "S", width))
    y = Spec(dtype=FLOAT, dims=("B", "L", width))
    piece = Piece(
        name="layer", build=lambda: Layer(width), inputs={"hidden": x, "other": y}, outputs=("hidden", "same")
    )
    uses = tuple(Use(piece=piece, weights=f"layers.{i}.", names={"same": f"same_{i}"}) for i in range(layers))
    last = Piece(name="last", build=Last, inputs={"hidden": x}, outputs=("last",))
    return Network(name="net", inputs=piece.inputs, outputs=("last", "same_1"), uses=(*uses, Use(piece=last)))


def weights(width=WIDTH, layers=LAYERS):
    torch.manual_seed(0)
    found = {}
    for i in range(layers):
        found[f"layers.{i}.scale"] = torch.rand(width) + 0.5
        found[f"layers.{i}.map.weight"] = torch.randn(width, width) * width**-0.5
        found[f"layers.{i}.map.bias"] = torch.randn(width) * 0.3
    return found


def inputs(batch, new, other):
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.normal(size=(batch, new, WIDTH)).astype(np.float32),
        "other": rng.normal(size=(batch, other, WIDTH)).astype(np.float32),
    }


def by_hand(given):
    """The network in plain PyTorch."""
    hidden, other = (torch.tensor(array) for array in given.values())
    tensors = weights()
    for i in range(LAYERS):
        scale, weight, bias = (tensors[f"layers.{i}.{name}"] for name in ("scale", "map.weight", "map.bias"))
        z = ((hidden + other.mean(dim=1, keepdim=True)) * scale) @ weight.T + bias
        hidden = hidden + z * torch.sigmoid(z)
    return 2 * hidden.numpy()


def test_graphs_compute_what_the_network_does_at_any_size(tmp_path):
    done = assemble(network(), weights().__getitem__, {}, "fp32", tmp_path)
    for sizes in ((1, 1, 1), (2, 6, 3), (3, 1, 20)):
        given = inputs(*sizes)
        tensors = {name: torch.tensor(array) for name, array in given.items()}
        expected = by_hand(given)
        found = execute(network(), weights().__getitem__, tensors)
        assert np.abs(found["last"].numpy() - expected).max() < 1e-5
        for form in FORMS:
            found = MappedSession(done.graphs[form]).run(given, ["last", "same_1"])
            assert np.abs(found["last"] - expected).max() < 1e-5
            assert np.array_equal(found["same_1"], given["other"])


def test_layers_of_one_kind_are_traced_once_and_forms_share_their_weights(tmp_path, monkeypatch):
    traced, loaded = [], []
    monkeypatch.setattr(module, "trace", lambda piece: traced.append(piece.name) or trace(piece))
    done = assemble(network(), lambda name: loaded.append(name) or weights()[name], {}, "fp32", tmp_path)
    assert traced == ["layer", "last"]
    assert set(loaded) == set(weights())
    assert sum(name.endswith("map.weight") for name in loaded) == LAYERS, "each is read once for both forms"
    held = []
    for graph in done.graphs.values():
        tensors = onnx.load(graph, load_external_data=False).graph.initializer
        held.append({t.name: [(e.key, e.value) for e in t.external_data] for t in tensors if t.external_data})
    assert held[0] == held[1]
    assert len([name for name in held[0] if name.endswith("map.weight")]) == LAYERS


def test_a_layer_that_is_kept_has_the_precision_it_is_kept_in(tmp_path):
    done = assemble(network(), weights().__getitem__, {"layers.1.map": "fp16"}, "int8", tmp_path)
    graph = onnx.load(done.graphs["standard"]).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert kinds["layers.0.map.codes"] == kinds["layers.2.map.codes"] == onnx.TensorProto.INT8
    assert kinds["layers.1.map.half"] == onnx.TensorProto.FLOAT16
    assert "layers.1.map.codes" not in kinds


def test_the_same_weights_give_the_same_bytes(tmp_path):
    made = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        done = assemble(network(), weights().__getitem__, {}, "int4", tmp_path / name)
        made.append([done.weights.read_bytes(), *(graph.read_bytes() for graph in done.graphs.values())])
    assert made[0] == made[1]


def test_a_trace_holds_no_large_weight():
    piece = network().uses[0].piece
    assert {name: tuple(p.shape) for name, p in without_weights(piece).named_parameters()} == {"inner.scale": (WIDTH,)}
    traced = trace(piece)
    assert traced.parameters == ("inner.scale",)
    kinds = [node.op_type for node in traced.proto.graph.node if node.domain]
    assert kinds == ["Linear"]
    assert all(np.prod(tensor.dims) < WIDTH for tensor in traced.proto.graph.initializer)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_layers_weights_are_in_memory_at_a_time(tmp_path, monkeypatch, precision):
    """Every byte that numpy holds while 24 layers of 1 MiB each are written."""
    width, layers = 512, 24
    one = width * width * 4
    net = network(width, layers)
    known = {use.piece.name: trace(use.piece) for use in (net.uses[0], net.uses[-1])}
    monkeypatch.setattr(module, "trace", lambda piece: known[piece.name])  # tracing has its own, small memory
    loaded = 0

    def load(name):
        nonlocal loaded
        rng = np.random.default_rng(len(name))
        array = rng.standard_normal((width, width) if name.endswith("weight") else width, dtype=np.float32)
        loaded += array.nbytes
        return torch.from_numpy(array)

    tracemalloc.start()
    try:
        done = assemble(net, load, {}, precision, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert loaded > layers * one
    assert done.weights.stat().st_size > layers * one / 9
    assert peak < 8 * one, f"{peak / one:.1f} layers"
