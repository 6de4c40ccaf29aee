"""The operators and fields that an ONNX graph may hold, checked in its bytes before a runtime gets them.

Whoever can write a bundle can seal it, so a graph is not believed: numbers are computed from numbers by operators of
the lists below; the body of a Scan, which ends with its input, is looked through like the graph around it. There is
no other operator with a body (loops and branches), none that keeps strings or sequences, draws random numbers or
belongs to a library of its own, and weights come from a file of the bundle. The walk reads protobuf's wire format by
itself, for the runtime has no onnx: 12 ms for 841 nodes.
"""

from collections.abc import Mapping

from .onnx_division import check_divisions
from .protobuf import Range, fields, message, packed, text

STANDARD = frozenset(
    {
        "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh",
        "AveragePool", "BatchNormalization",
        "Cast", "CastLike", "Ceil", "Celu", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv", "Cos",
        "Cosh", "CumSum", "DequantizeLinear", "Div", "DynamicQuantizeLinear", "Einsum", "Elu",
        "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND",
        "Gelu", "Gemm", "GlobalAveragePool", "Greater", "GreaterOrEqual", "GroupNormalization", "HardSigmoid",
        "HardSwish", "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu",
        "Less", "LessOrEqual", "Log", "LogSoftmax", "MatMul", "MatMulInteger", "Max", "MaxPool", "Mean", "Min",
        "Mish", "Mul", "Neg", "NonZero", "Not", "OneHot", "Or", "PRelu", "Pad", "Pow", "QLinearMatMul",
        "QuantizeLinear", "RMSNormalization", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
        "Relu", "Reshape", "Resize", "Round", "Scan", "ScatterElements", "ScatterND", "Selu",
        "Shape", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign",
        "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh", "Tile", "TopK", "Transpose",
        "Trilu", "Unsqueeze", "Where", "Xor",
    }
)  # fmt: skip
"""Of the standard: what exporters make of arithmetic, shapes and layers."""
ONNXRUNTIME = frozenset({"FusedMatMul", "MatMulIntegerToFloat", "MatMulNBits"})
"""Of ONNX Runtime's own: what export/prompts/lower.py writes."""
OPERATORS: Mapping[str, frozenset[str]] = {"": STANDARD, "ai.onnx": STANDARD, "com.microsoft": ONNXRUNTIME}

DEPTH_LIMIT = 2
"""Of bodies within bodies."""
NUMBER_LIMIT = 1 << 31
"""Of whole numbers in attributes: kernels multiply them, and end the process where the product is none."""
POSITIVE = frozenset(
    {
        "K", "N", "bits", "block_size", "blocksize", "dilations", "group", "kernel_shape", "kv_num_heads", "num_groups",
        "num_heads", "num_outputs", "num_scan_inputs", "q_num_heads", "strides",
    }
)  # fmt: skip
"""Attributes that something is divided by."""

_EXTERNAL = 1
# Field numbers of onnx.proto, and what a field of that number would bring.
_MODEL_GRAPH, _MODEL_REFUSED = 7, {20: "training", 25: "functions"}
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_REFUSED = 1, 5, {15: "sparse weights"}
_NODE_KIND, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGERS = 1, {3, 8}
_ATTRIBUTE_TENSORS = {5, 10}
_ATTRIBUTE_BODY = 6
_ATTRIBUTE_REFUSED = {11: "bodies", 22: "sparse weights", 23: "sparse weights"}
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_GRAPH_INPUT, _VALUE_NAME, _VALUE_TO_SIZES = 11, 1, (2, 1, 2, 1)
_SIZE_VALUE, _SIZE_NAME = 1, 2


def check_graph(data: bytes, beside: Mapping[str, int]) -> None:
    """Refuse a graph that the exporter could not have written.

    Args:
        data: The serialised ONNX model.
        beside: Sizes in bytes of the files that its weights may lie in, by their names in the graph's folder.

    Raises:
        ValueError: Saying what is wrong.
    """
    if data[4:8] == b"ORTM":  # ONNX Runtime goes by these bytes alone, and they can be part of a sound ONNX file
        raise ValueError("it is in ONNX Runtime's own format")
    graphs = 0
    for number, value in fields(data, (0, len(data)), _MODEL_REFUSED):
        if number == _MODEL_GRAPH:
            graphs += 1
            _check_nodes(data, message(value), beside)
            check_divisions(data, message(value))
    if graphs != 1:
        raise ValueError(f"it has {graphs} graphs")


def graph_inputs(data: bytes) -> dict[str, tuple[int | str | None, ...]]:
    """Dimensions of each of a graph's inputs, by its name: a number, the name of a free one, or None.

    Args:
        data: A serialised ONNX model that :func:`check_graph` has passed.
    """
    found: dict[str, tuple[int | str | None, ...]] = {}
    for graph in _inner(data, (0, len(data)), _MODEL_GRAPH):
        for value in _inner(data, graph, _GRAPH_INPUT):
            parts = dict(fields(data, value))
            places = [value]
            for step in _VALUE_TO_SIZES:
                places = [inner for place in places for inner in _inner(data, place, step)]
            name = text(data, parts[_VALUE_NAME]) if _VALUE_NAME in parts else ""
            found[name] = tuple(_size(data, place) for place in places)
    return found


def _size(data: bytes, where: Range) -> int | str | None:
    for number, value in fields(data, where):
        if number == _SIZE_VALUE and isinstance(value, int):
            return value
        if number == _SIZE_NAME:
            return text(data, value)
    return None


def _inner(data: bytes, where: Range, number: int) -> list[Range]:
    """The places of the messages of a field."""
    return [message(value) for field, value in fields(data, where) if field == number]


def _check_nodes(data: bytes, graph: Range, beside: Mapping[str, int], depth: int = 0) -> None:
    if depth > DEPTH_LIMIT:
        raise ValueError("its bodies are nested deeper than any exporter writes")
    for number, value in fields(data, graph, _GRAPH_REFUSED):
        if number == _GRAPH_NODE:
            kinds, domains = [], []
            for part, inner in fields(data, message(value)):
                if part == _NODE_KIND:
                    kinds.append(text(data, inner))
                elif part == _NODE_DOMAIN:
                    domains.append(text(data, inner))
                elif part == _NODE_ATTRIBUTE:
                    _check_attribute(data, message(inner), beside, depth)
            kind, domain = kinds[-1] if kinds else "", domains[-1] if domains else ""
            if len(kinds) != 1 or len(domains) > 1 or kind not in OPERATORS.get(domain, ()):
                raise ValueError(
                    f"it has the operator {f'{domain}::' if domain else ''}{kind}, which no exporter writes"
                )
        elif number == _GRAPH_INITIALIZER:
            _check_tensor(data, message(value), beside)


def _check_attribute(data: bytes, attribute: Range, beside: Mapping[str, int], depth: int) -> None:
    name, integers = "", []
    for number, value in fields(data, attribute, _ATTRIBUTE_REFUSED):
        if number == _ATTRIBUTE_NAME:
            name = text(data, value)
        elif number in _ATTRIBUTE_INTEGERS:
            integers += [value] if isinstance(value, int) else packed(data, value)
        elif number in _ATTRIBUTE_TENSORS:
            _check_tensor(data, message(value), beside)
        elif number == _ATTRIBUTE_BODY:
            _check_nodes(data, message(value), beside, depth + 1)
    low = 1 if name in POSITIVE else -NUMBER_LIMIT
    if not all(low <= value - (1 << 64 if value >> 63 else 0) < NUMBER_LIMIT for value in integers):
        raise ValueError(f"the attribute {name!r} has a number that no exporter writes")


def _check_tensor(data: bytes, tensor: Range, beside: Mapping[str, int]) -> None:
    entries: dict[str, str] = {}
    external = False
    for number, value in fields(data, tensor):
        if number == _TENSOR_LOCATION:
            external = external or value == _EXTERNAL
        elif number == _TENSOR_EXTERNAL:
            pair = {part: text(data, inner) for part, inner in fields(data, message(value))}
            key = pair.get(1, "")
            if key in entries:
                raise ValueError(f"weights have two values of {key!r}")
            entries[key] = pair.get(2, "")
    if not external and not entries:
        return
    location = entries.get("location", "")
    if location not in beside:
        raise ValueError(f"weights lie in {location!r}, which is not a file beside it")
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    if offset < 0 or length < 0 or offset + length > beside[location]:
        raise ValueError(f"weights lie beyond the end of {location}")
