"""A traced graph's weights in 8 or 4 bits, behind DequantizeLinear: the standard's form, which TensorRT reads.

Weights alone: what flows between the layers stays in half. Scales of that would be measured on the training city, and
a larger city's numbers would be cut off at them without a word.
"""

from collections.abc import Collection, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.helper import make_opsetid

from .quantize_weights import BLOCK, Array, quantize_int4, quantize_int8

LEAST = 1024
"""Smaller weights stay in half: their scales would take what their codes save."""
BLOCKS_OPSET = 21
"""The first in which a scale may stand for a block of a weight."""


def quantise(proto: onnx.ModelProto, precision: str, kept: Collection[str]) -> None:
    """Keep the weights of products in few bits; those are float16 initialisers, (…, in, out) or transposed in a Gemm.

    Args:
        proto: The model, whose products are in half.
        precision: ``int8``, one scale per output, or ``int4``, one per block of 32 inputs; a weight whose inputs do
            not come in whole blocks gets int8.
        kept: Names of weights that stay in half.
    """
    graph = proto.graph
    weights = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT16 and tensor.name not in kept
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        tensor = weights.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if tensor is not None and len(tensor.dims) > 1 and np.prod(tensor.dims) >= LEAST:
            name = node.input[1]
            weight = numpy_helper.to_array(tensor).astype(np.float32)
            for attribute in node.attribute:
                if attribute.name == "transB" and attribute.i:
                    weight, attribute.i = weight.T, 0
            nodes.append(_dequantised(graph, name, weight, precision, f"{name}/{len(nodes)}"))
            node.input[1] = nodes[-1].output[0]
        nodes.append(node)
    kept = set(_read(nodes))
    initializers = [tensor for tensor in graph.initializer if tensor.name in kept]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    del proto.opset_import[:]
    proto.opset_import.append(make_opsetid("", BLOCKS_OPSET))


def _read(nodes: list[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from node.input


def _dequantised(graph: onnx.GraphProto, name: str, weight: Array, precision: str, result: str) -> onnx.NodeProto:
    """Add codes and scales of a weight (…, in, out), and make the node that puts it together again."""
    *members, inputs, outputs = weight.shape
    rows = weight.reshape(-1, outputs).T  # (out, in) of all members, whose blocks do not meet
    codes_name, scale_name = f"{name}.{precision}", f"{name}.{precision}_scale"
    if precision == "int4" and inputs % BLOCK == 0:
        codes, scale = quantize_int4(rows, np.float16)
        tensor = numpy_helper.from_array(codes.T.reshape(weight.shape).astype(ml_dtypes.int4), codes_name)
        scale = scale.T.reshape(*members, inputs // BLOCK, outputs)
        how: dict[str, Any] = {"axis": len(members), "block_size": BLOCK}
    else:
        codes, scale = quantize_int8(rows, np.float16)
        tensor = numpy_helper.from_array(np.ascontiguousarray(codes.T).reshape(weight.shape), codes_name)
        how = {"axis": len(members) + 1}
    if codes_name not in {known.name for known in graph.initializer}:
        graph.initializer.extend([tensor, numpy_helper.from_array(np.ascontiguousarray(scale), scale_name)])
    return helper.make_node("DequantizeLinear", [codes_name, scale_name], [result], name=result, **how)
