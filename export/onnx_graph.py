"""The fused model as an ONNX graph: features in, every task's counts out, any number of regions."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
import torch
from onnx.external_data_helper import set_external_data
from onnx.helper import make_opsetid
from torch import Tensor, nn

from topt_deploy.model.half_precision import halved, in_half, never_in_few_bits
from topt_deploy.model.row_tiles import planned, whole
from topt_deploy.model.topt import TopT

from .quantize_graph import quantise
from .tile_scans import lay_tiles, make_scans
from .translate import translate

REGIONS_AXIS = "regions"
WEIGHTS = "topt.weights"
"""Name of the external data, beside the model."""
EXTERNAL_FROM_BYTES = 1024
ALIGNMENT = 64
_TILES = "tiles"
"""An input while the model is traced (:func:`topt_deploy.model.row_tiles.planned`); the graph computes it from N."""
_OUTER = "/outer"
"""Marks inputs and outputs during the export: the tracer puts no slash into a name."""


class _ByPosition(nn.Module):
    """The model with inputs by position and outputs as a tuple, as ONNX has them. The last input is its tiles."""

    def __init__(self, model: TopT) -> None:
        super().__init__()
        self.model = model
        self.names = model.input_names()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *arrays, rows = inputs
        with planned(rows):
            predictions = self.model(dict(zip(self.names, arrays, strict=True)))
        return tuple(predictions.values())


class _Whole(_ByPosition):
    """The same in one tile, as engines have it; in half where asked."""

    def __init__(self, model: TopT, half: bool) -> None:
        super().__init__(model)
        self.within = in_half if half else contextlib.nullcontext

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with whole(), self.within():
            predictions = self.model(dict(zip(self.names, inputs, strict=True)))
        return tuple(predictions.values())


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An ONNX model with its large initialisers as external data, the standard's own form.

    Attributes:
        model: The serialised model; it names :data:`WEIGHTS` beside it.
        weights: The external data.
        initializers: Offset in bytes and shape of every external initialiser that is float32. ONNX Runtime takes them
            from a buffer of the caller's by this list: checked bytes, and one copy in memory instead of three.
    """

    model: bytes
    weights: bytes
    initializers: dict[str, tuple[int, tuple[int, ...]]]


def export_graph(model: TopT, sample: Mapping[str, Tensor]) -> Graph:
    """Export with a named dynamic axis for the regions.

    Args:
        model: The trained model.
        sample: Inputs of some city; its number of regions does not matter to the result.

    Returns:
        The checked graph, with inputs named as the features and outputs as the tasks.
    """
    module = _ByPosition(model).eval()
    arguments = (*(sample[name] for name in module.names), torch.zeros(5, 3, dtype=torch.int64))
    regions, count, height = (torch.export.Dim(name, max=1 << 24) for name in (REGIONS_AXIS, "tiles", "height"))
    axes = ({0: regions},) * len(module.names) + ({0: count, 1: height},)
    # Traced here and not by torch.onnx.export, which would quietly fix the axis where the code made it constant.
    with torch.no_grad():
        traced = torch.export.export(module, arguments, dynamic_shapes=(axes,), strict=False)
        inputs, outputs = (
            [name + _OUTER for name in names] for names in ((*module.names, _TILES), model.output_names())
        )
        proto = translate(traced, inputs, outputs)
    lay_tiles(proto.graph)
    make_scans(proto.graph)
    _name(proto)
    _strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    return _split(proto)


def export_for_engine(model: TopT, sample: Mapping[str, Tensor], *, precision: str, most: int) -> Graph:
    """Export as TensorRT's engines are best built from: no tiles, for an engine's size is bounded, and a Scan would
    become a loop that nothing is fused across.

    Args:
        model: The trained model.
        sample: Of :func:`export_graph`.
        precision: Of the products: ``fp32``, ``fp16``, or the weights in ``int8`` or ``int4`` and the rest in half.
        most: The largest number of regions.

    Returns:
        The checked graph, in standard operators; inputs and outputs are float32 whatever the precision.
    """
    half = precision != "fp32"
    module = _Whole(halved(model) if half else model, half).eval()
    axes = ({0: torch.export.Dim(REGIONS_AXIS, max=most)},) * len(module.names)
    with torch.no_grad():
        traced = torch.export.export(
            module, tuple(sample[name] for name in module.names), dynamic_shapes=(axes,), strict=False
        )
        inputs, outputs = ([name + _OUTER for name in names] for names in (module.names, model.output_names()))
        proto = translate(traced, inputs, outputs)
    _name(proto)
    _strip(proto)
    if precision in ("int8", "int4"):
        quantise(proto, precision, never_in_few_bits(module))
    onnx.checker.check_model(proto, full_check=True)
    return _split(proto, every_type=True)


def _split(proto: onnx.ModelProto, *, every_type: bool = False) -> Graph:
    """Move the large initialisers out of the model: those of float32, or all."""
    weights = bytearray()
    initializers = {}
    for tensor in proto.graph.initializer:
        float32 = tensor.data_type == onnx.TensorProto.FLOAT
        if not (float32 or every_type) or len(tensor.raw_data) < EXTERNAL_FROM_BYTES:
            continue
        if float32:
            initializers[tensor.name] = (len(weights), tuple(tensor.dims))
        data = tensor.raw_data
        set_external_data(tensor, WEIGHTS, offset=len(weights), length=len(data))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        weights += data + b"\0" * (-len(data) % ALIGNMENT)
    return Graph(model=proto.SerializeToString(deterministic=True), weights=bytes(weights), initializers=initializers)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and all inside of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _name(proto: onnx.ModelProto) -> None:
    """Give inputs and outputs their plain names, and inner values that the tracer called the same another one.

    A task may be called ``sqrt``, and so may the result of a square root.
    """
    graph = proto.graph
    outer = {value.name: value.name.removesuffix(_OUTER) for value in (*graph.input, *graph.output)}
    names = outer | {name: f"{name}/inner" for name in outer.values()}
    for part in _graphs(graph):
        for value in (*part.input, *part.output, *part.initializer):
            value.name = names.get(value.name, value.name)
        for node in part.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what only the exporting machine cares about: source locations, stack traces, doc strings."""
    proto.producer_name, proto.producer_version, proto.doc_string = "topt-deploy", "", ""
    proto.graph.name = "topt"
    del proto.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output):  # the tracer calls the axis something like s15
        value.type.tensor_type.shape.dim[0].dim_param = REGIONS_AXIS
    parts = list(_graphs(proto.graph))
    for part in parts:
        for item in (part, *part.node, *part.input, *part.output, *part.initializer):
            item.doc_string = ""
            del item.metadata_props[:]
        del part.value_info[:]
    used = {node.domain for part in parts for node in part.node}
    opsets = [make_opsetid(o.domain, o.version) for o in proto.opset_import if o.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
