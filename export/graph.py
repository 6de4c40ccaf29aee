"""The fused model as an ONNX graph: features in, every task's counts out, any number of regions."""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from onnx.external_data_helper import set_external_data
from onnx.helper import make_opsetid
from torch import Tensor, nn

from topt_deploy.model.topt import TopT

OPSET = 20
REGIONS_AXIS = "regions"
WEIGHTS = "topt.weights"
"""Name of the external data, beside the model."""
EXTERNAL_FROM_BYTES = 1024
ALIGNMENT = 64
_OUTER = "/outer"
"""Marks inputs and outputs during the export: the tracer puts no slash into a name."""


class _ByPosition(nn.Module):
    """The model with inputs by position and outputs as a tuple, as ONNX has them."""

    def __init__(self, model: TopT) -> None:
        super().__init__()
        self.model = model
        self.names = model.input_names()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        predictions = self.model(dict(zip(self.names, inputs, strict=True)))
        return tuple(predictions.values())


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An ONNX model with its large initialisers as external data, the standard's own form.

    Attributes:
        model: The serialised model; it names :data:`WEIGHTS` beside it.
        weights: The external data.
        initializers: Offset in bytes and shape of every external initialiser, all float32. ONNX Runtime takes them
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
    arguments = tuple(sample[name] for name in module.names)
    regions = torch.export.Dim(REGIONS_AXIS, min=2, max=1 << 24)
    # Traced here and not by torch.onnx.export, which would quietly fix the axis where the code made it constant.
    with torch.no_grad():
        traced = torch.export.export(
            module, arguments, dynamic_shapes=(tuple({0: regions} for _ in arguments),), strict=False
        )
    inputs, outputs = ([name + _OUTER for name in names] for names in (module.names, model.heads))
    proto = translate(traced, inputs, outputs)
    _name(proto)
    _strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    return _split(proto)


def translate(traced: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """What was traced as ONNX, inputs and outputs under these names, and nothing printed on the way."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells everyone that torchvision is absent
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _split(proto: onnx.ModelProto) -> Graph:
    """Move the large initialisers out of the model."""
    weights = bytearray()
    initializers = {}
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.raw_data) < EXTERNAL_FROM_BYTES:
            continue
        initializers[tensor.name] = (len(weights), tuple(tensor.dims))
        data = tensor.raw_data
        set_external_data(tensor, WEIGHTS, offset=len(weights), length=len(data))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        weights += data + b"\0" * (-len(data) % ALIGNMENT)
    return Graph(model=proto.SerializeToString(deterministic=True), weights=bytes(weights), initializers=initializers)


def _name(proto: onnx.ModelProto) -> None:
    """Give inputs and outputs their plain names, and inner values that the tracer called the same another one.

    A task may be called ``sqrt``, and so may the result of a square root.
    """
    graph = proto.graph
    outer = {value.name: value.name.removesuffix(_OUTER) for value in (*graph.input, *graph.output)}
    names = outer | {name: f"{name}/inner" for name in outer.values()}
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what only the exporting machine cares about: source locations, stack traces, doc strings."""
    proto.producer_name, proto.producer_version, proto.doc_string = "topt-deploy", "", ""
    graph = proto.graph
    graph.name, graph.doc_string = "topt", ""
    del graph.metadata_props[:]
    del proto.metadata_props[:]
    for value in (*graph.input, *graph.output):  # the tracer calls the axis something like s15
        value.type.tensor_type.shape.dim[0].dim_param = REGIONS_AXIS
    for group in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
        for item in group:
            item.doc_string = ""
            del item.metadata_props[:]
    del graph.value_info[:]
    used = {node.domain for node in graph.node}
    opsets = [make_opsetid(o.domain, o.version) for o in proto.opset_import if o.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
