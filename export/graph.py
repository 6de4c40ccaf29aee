"""The fused model as an ONNX graph: features in, every task's counts out, any number of regions."""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping

import onnx
import torch
from onnx.helper import make_opsetid
from torch import Tensor, nn

from topt_deploy.model.topt import TopT

OPSET = 20
REGIONS_AXIS = "regions"


class _ByPosition(nn.Module):
    """The model with inputs by position and outputs as a tuple, as ONNX has them."""

    def __init__(self, model: TopT) -> None:
        super().__init__()
        self.model = model
        self.names = model.input_names()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        predictions = self.model(dict(zip(self.names, inputs, strict=True)))
        return tuple(predictions.values())


def export_graph(model: TopT, sample: Mapping[str, Tensor]) -> bytes:
    """Export with a named dynamic axis for the regions.

    Args:
        model: The trained model.
        sample: Inputs of some city; its number of regions does not matter to the result.

    Returns:
        The serialised ONNX model, checked, with inputs named as the features and outputs as the tasks.
    """
    module = _ByPosition(model).eval()
    arguments = tuple(sample[name] for name in module.names)
    regions = torch.export.Dim(REGIONS_AXIS, min=2, max=1 << 24)
    noise = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(noise), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=module.names,
            output_names=list(model.heads),
            dynamic_shapes=(tuple({0: regions} for _ in arguments),),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what only the exporting machine cares about: source locations, stack traces, doc strings."""
    proto.producer_name, proto.producer_version, proto.doc_string = "topt-deploy", "", ""
    graph = proto.graph
    graph.name, graph.doc_string = "topt", ""
    del graph.metadata_props[:]
    del proto.metadata_props[:]
    for group in (graph.node, graph.value_info, graph.input, graph.output, graph.initializer):
        for item in group:
            item.doc_string = ""
            del item.metadata_props[:]
    del graph.value_info[:]
    used = {node.domain for node in graph.node}
    opsets = [make_opsetid(o.domain, o.version) for o in proto.opset_import if o.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
