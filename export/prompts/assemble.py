"""A network's graph, put together layer by layer: no more than one weight is in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from ..translate import OPSET
from .graph_builder import MICROSOFT, Array, Builder, Weights
from .lower import FORMS, TENSORRT, Linear, attention, linear
from .pieces import Network, Use
from .trace import Traced, trace
from .traced_operators import ATTENTION, DOMAIN, LINEAR

IR_VERSION = 10
BLOCKS_OPSET = 21
"""The first in which a scale may stand for a block of a weight."""


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A network on disk.

    Attributes:
        graphs: File of each form (:mod:`.lower`).
        weights: The file they share.
    """

    graphs: Mapping[str, Path]
    weights: Path


def assemble(
    network: Network,
    load: Callable[[str], Tensor],
    kept: Mapping[str, str],
    precision: str,
    folder: Path,
    forms: Sequence[str] = FORMS,
) -> Assembled:
    """Write a network as ONNX, in several forms, with external weights that the forms share.

    Args:
        network: The network.
        load: Gives the checkpoint's tensor of a name.
        kept: Precision of linear layers that have one of their own, by the checkpoint's name.
        precision: Of all others (:mod:`.lower`).
        folder: Where ``<network>.weights`` and ``<network>.<form>.onnx`` are written.
        forms: The forms (:mod:`.lower`).
    """
    traced: dict[str, Traced] = {}
    names = {form: {name: name for name in network.inputs} for form in forms}
    with Weights(folder / f"{network.name}.weights") as weights:
        builders = {form: Builder(weights) for form in forms}
        for use in network.uses:
            layers = _Layers(use, load, kept, precision)
            for form, builder in builders.items():
                piece = use.piece.for_engines if form == TENSORRT and use.piece.for_engines else use.piece
                if piece.name not in traced:
                    traced[piece.name] = trace(piece)
                names[form] |= _add(builder, form, use, traced[piece.name], names[form], layers)
    graphs = {}
    for form, builder in builders.items():
        graphs[form] = folder / f"{network.name}.{form}.onnx"
        proto = _model(network, builder, names[form])
        graphs[form].write_bytes(proto.SerializeToString(deterministic=True))
    return Assembled(graphs=graphs, weights=weights.path)


def _model(network: Network, builder: Builder, names: Mapping[str, str]) -> onnx.ModelProto:
    """The graph, its outputs under the network's names."""
    final = {names[name]: name for name in network.outputs}
    for node in builder.nodes:
        node.input[:] = [final.get(name, name) for name in node.input]
        node.output[:] = [final.get(name, name) for name in node.output]
    inputs = [
        helper.make_tensor_value_info(name, _onnx_type(spec.dtype), spec.dims) for name, spec in network.inputs.items()
    ]
    outputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * builder.ranks[names[name]])
        for name in network.outputs
    ]
    blocks = any(a.name == "block_size" for node in builder.nodes for a in node.attribute if not node.domain)
    opsets = [helper.make_opsetid("", BLOCKS_OPSET if blocks else OPSET)]
    if any(node.domain == MICROSOFT for node in builder.nodes):
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    return helper.make_model(
        helper.make_graph(builder.nodes, network.name, inputs, outputs, list(builder.initializers.values())),
        opset_imports=opsets,
        ir_version=IR_VERSION,
        producer_name="topt-deploy",
    )


class _Layers:
    """One use's weights as they are needed, each read once for all forms.

    Args:
        use: The use.
        load: Gives the checkpoint's tensor of a name.
        kept, precision: Of :func:`assemble`.
    """

    def __init__(self, use: Use, load: Callable[[str], Tensor], kept: Mapping[str, str], precision: str) -> None:
        self._use, self._load, self._kept, self.general = use, load, kept, precision
        self._linear: dict[str, Linear] = {}

    def linear(self, slot: str, bias: bool, rank: int) -> Linear:
        """The linear layer of a slot; only the last one asked for is kept."""
        name = self._use.weight(slot)
        if name not in self._linear:
            self._linear = {
                name: Linear(
                    name=name,
                    load=partial(_matrix, self._load, f"{name}.weight"),
                    bias=partial(_array, self._load, f"{name}.bias") if bias else None,
                    rank=rank,
                )
            }
        return self._linear[name]

    def precision(self, name: str) -> str:
        """A linear layer's precision, by the checkpoint's name."""
        return self._kept.get(name, self.general)

    def parameter(self, name: str) -> tuple[str, Callable[[], Array]]:
        """A small parameter's name in the checkpoint, and what reads it."""
        stored = self._use.weight(name)
        return stored, partial(_array, self._load, stored)


# No methods: a layer that held them would stand in a cycle with what holds it, and stay until Python looks for those.
def _matrix(load: Callable[[str], Tensor], name: str) -> Array:
    """A weight as (out, in): a convolution over whole patches is a linear map of the flattened patch."""
    array = _array(load, name)
    return array.reshape(len(array), -1)


def _array(load: Callable[[str], Tensor], name: str) -> Array:
    array: Array = load(name).detach().to(torch.float32).numpy()
    return array


def _add(
    builder: Builder, form: str, use: Use, traced: Traced, known: Mapping[str, str], layers: _Layers
) -> dict[str, str]:
    """Add one layer's nodes; what the network calls its outputs, and where they are."""
    graph = traced.proto.graph
    names = {name: known[use.outer(name)] for name in use.piece.inputs}
    names |= {name: builder.weight(*layers.parameter(name)) for name in traced.parameters}
    names |= {c.name: builder.constant(onnx.numpy_helper.to_array(c)) for c in graph.initializer}
    for node in graph.node:
        given = [names[name] if name else "" for name in node.input]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.domain == DOMAIN and node.op_type == LINEAR:
            layer = layers.linear(attributes["slot"].decode(), bool(attributes["bias"]), attributes["rank"])
            results = [linear(builder, given[0], layer, layers.precision(layer.name), form)]
        elif node.domain == DOMAIN and node.op_type == ATTENTION:
            results = [attention(builder, given, layers.general, form, **attributes)]
        else:
            first = builder.node(node.op_type, given, domain=node.domain, outputs=len(node.output), **attributes)
            results = [first, *(f"{first}/{i}" for i in range(1, len(node.output)))]
        names |= dict(zip(node.output, results, strict=True))
    produced = [value.name for value in graph.output]
    builder.ranks |= {names[value.name]: len(value.type.tensor_type.shape.dim) for value in graph.output}
    return {use.outer(name): names[inner] for name, inner in zip(use.piece.outputs, produced, strict=True)}


def _onnx_type(dtype: torch.dtype) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(str(dtype).removeprefix("torch."))))
