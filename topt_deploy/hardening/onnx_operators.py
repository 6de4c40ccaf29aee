"""The operators and fields that an ONNX graph may hold, checked in its bytes before a runtime gets them.

Whoever can write a bundle can seal it, so a graph is not believed: numbers are computed from numbers by operators of
the lists below; the body of a Scan, which ends with its input, is looked through like the graph around it. There is
no other operator with a body (loops and branches), none that keeps strings or sequences, draws random numbers or
belongs to a library of its own, and weights come from a file of the bundle. The walk reads protobuf's wire format by
itself, for the runtime has no onnx, and every part once.
"""

from collections.abc import Mapping, Sequence

from .onnx_division import results
from .onnx_parts import ANY, Value, read_declared, read_node, read_tensor
from .protobuf import Range, fields, message, text

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

# Field numbers of onnx.proto, and what a field of that number would bring.
_MODEL_GRAPH, _MODEL_REFUSED = 7, {20: "training", 25: "functions"}
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_GRAPH_REFUSED = {15: "sparse weights"}
_VALUE_NAME, _VALUE_TO_SIZES = 1, (2, 1, 2, 1)
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
    parts = fields(data, (0, len(data)), _MODEL_REFUSED)
    graphs = [message(value) for number, value in parts if number == _MODEL_GRAPH]
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} graphs")
    _check(data, graphs[0], beside)


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


def _check(
    data: bytes,
    graph: Range,
    beside: Mapping[str, int],
    *,
    around: Mapping[str, Value] | None = None,
    given: Sequence[Value] | None = None,
    depth: int = 0,
) -> list[Value]:
    """Refuse a graph, or the body of a node, that no exporter writes.

    Args:
        data: The serialised model.
        graph: The place of the graph in it.
        beside: As of :func:`check_graph`.
        around: Values of the graphs around it, which it may use.
        given: Values of its inputs; by default of the kinds that it declares.
        depth: Of the graphs around it.

    Returns:
        The values of its outputs.
    """
    if depth > DEPTH_LIMIT:
        raise ValueError("its bodies are nested deeper than any exporter writes")
    parts = fields(data, graph, _GRAPH_REFUSED)
    own: dict[str, Value] = {}
    for number, value in parts:
        if number == _GRAPH_INITIALIZER:
            _define(own, *read_tensor(data, message(value), beside))
    declared = [read_declared(data, message(value)) for number, value in parts if number == _GRAPH_INPUT]
    for place, (name, kind) in enumerate(declared):
        known = given[place] if given is not None and place < len(given) else Value(kind)
        # A constant that whoever runs the graph may replace is of its kind, and no more is known.
        own[name] = Value(known.kind, some=given is None and name not in own)
    scope = dict(around or {}) | own
    for number, value in parts:
        if number == _GRAPH_NODE:
            node = read_node(data, message(value), beside)
            if node.operator not in OPERATORS.get(node.domain, ()):
                name = f"{node.domain}::{node.operator}" if node.domain else node.operator
                raise ValueError(f"it has the operator {name}, which no exporter writes")
            inputs = [scope.get(name, ANY) for name in node.inputs]
            bodies = {}
            for name, body in node.bodies.items():
                bodies[name] = _check(data, body, beside, around=scope, given=inputs, depth=depth + 1)
            for name, result in zip(node.outputs, results(node, inputs, bodies.get("body")), strict=True):
                if name:
                    _define(own, name, result)
                    scope[name] = result
    outputs = [read_declared(data, message(value))[0] for number, value in parts if number == _GRAPH_OUTPUT]
    return [scope.get(name, ANY) for name in outputs]


def _define(own: dict[str, Value], name: str, value: Value) -> None:
    if name in own:
        raise ValueError(f"it has two values of the name {name!r}")
    own[name] = value
