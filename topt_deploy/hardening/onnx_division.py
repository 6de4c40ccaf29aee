"""Divisions of whole numbers in an ONNX graph: by zero, or of the least number by -1, they end the process.

ONNX Runtime looks at divisors that are constants, and at zero alone. So a divisor must be known to be positive: a
positive constant, what Max makes of one and of something else, as the exporter writes it, or the first size of an input
of the graph, as earlier exporters wrote it: nothing is predicted for no region. Fractions have no such trap, so the
kind of number of every value is followed through the graph. What cannot be followed counts as whole.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .protobuf import Range, fields, message, packed, text

FLOAT, INT32, INT64, BOOL, UINT8, UNKNOWN = 1, 6, 7, 9, 2, 0
FRACTIONS = frozenset({FLOAT, 10, 11, 16})
"""Numbers, in onnx.proto, of the types with a fraction: float, float16, double, bfloat16."""
ALWAYS = dict.fromkeys(("Shape", "Size", "NonZero", "ArgMax", "ArgMin"), INT64) | {"MatMulInteger": INT32}
ALWAYS |= dict.fromkeys(
    ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not", "IsInf", "IsNaN"), BOOL
)
"""Operators whose results are always of one kind."""
LIKE = {
    "CastLike": 1, "Where": 1, "DequantizeLinear": 1, "OneHot": 2, "QuantizeLinear": 2, "MatMulIntegerToFloat": 2,
    "QLinearMatMul": 7,
}  # fmt: skip
"""The input that a result is of the kind of, where that is not the first."""
SECOND = {"TopK": INT64, "MaxPool": INT64, "DynamicQuantizeLinear": FLOAT}
"""The kind of an operator's second result, where that is not the first one's."""
CONSTANTS = {2: FLOAT, 7: FLOAT, 3: INT64, 8: INT64}
"""Kinds of the constants that an attribute's fields hold: a fraction, several, a whole number, several."""
ENTRIES_LIMIT = 64

# Field numbers of onnx.proto.
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_KIND, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_TENSOR, _ATTRIBUTE_BODY, _ATTRIBUTE_INTEGER = 1, 5, 6, 3
_ONCE = (_ATTRIBUTE_TENSOR, _ATTRIBUTE_BODY)
_TENSOR_KIND, _TENSOR_NAME, _TENSOR_RAW = 2, 8, 9
_TENSOR_NUMBERS = {5, 7}
_VALUE_NAME, _VALUE_TO_KIND = 1, (2, 1, 1)


class Value(NamedTuple):
    """A value of the graph: its kind of number, and if all of it, and if its first size, is known to be above 0."""

    kind: int = UNKNOWN
    positive: bool = False
    some: bool = False


_ANY = Value()
"""Nothing is known of it."""


class _Node(NamedTuple):
    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, dict[int, int | Range]]


def check_divisions(
    data: bytes, graph: Range, around: Mapping[str, Value] | None = None, given: Sequence[Value] | None = None
) -> list[Value]:
    """Refuse a graph that may divide whole numbers by 0 or less.

    Args:
        data: The serialised model, which :func:`.onnx_operators.check_graph` has passed.
        graph: The place of the graph in it.
        around: Values of the graphs around it, which it may use.
        given: Values of its inputs; by default of the kinds that it declares.

    Returns:
        The values of its outputs.

    Raises:
        ValueError: Naming the operator.
    """
    parts = fields(data, graph)
    own: dict[str, Value] = {}
    for number, value in parts:
        if number == _GRAPH_INITIALIZER:
            name, found = _tensor(data, message(value))
            _define(own, name, found)
    declared = [_declared(data, message(value)) for number, value in parts if number == _GRAPH_INPUT]
    for place, (name, kind) in enumerate(declared):
        known = given[place] if given is not None and place < len(given) else Value(kind)
        # A constant that whoever runs the graph may replace is of its kind, and no more is known.
        own[name] = Value(known.kind, some=given is None and name not in own)
    scope = dict(around or {}) | own
    for number, value in parts:
        if number == _GRAPH_NODE:
            node = _node(data, message(value))
            for name, result in zip(node.outputs, _results(data, node, scope), strict=True):
                if name:
                    _define(own, name, result)
                    scope[name] = result
    outputs = [_declared(data, message(value))[0] for number, value in parts if number == _GRAPH_OUTPUT]
    return [scope.get(name, _ANY) for name in outputs]


def _results(data: bytes, node: _Node, scope: Mapping[str, Value]) -> list[Value]:
    """The values that a node gives, one per output."""
    inputs = [scope.get(name, _ANY) for name in node.inputs]
    operator = node.operator
    if operator == "Div" and len(inputs) > 1 and inputs[1].kind not in FRACTIONS and not inputs[1].positive:
        raise ValueError(
            f"it may divide whole numbers by 0 or less (into {node.outputs[:1]}), which no exporter writes"
        )
    if operator == "Scan" and _ATTRIBUTE_BODY in node.attributes.get("body", {}):
        found = check_divisions(data, message(node.attributes["body"][_ATTRIBUTE_BODY]), scope, inputs)
        return [Value(found[i].kind) if i < len(found) else Value() for i in range(len(node.outputs))]
    first = _first(data, node, inputs)
    second = Value(SECOND.get(operator, first.kind))
    return [second if i == 1 else first for i in range(len(node.outputs))]


def _first(data: bytes, node: _Node, inputs: Sequence[Value]) -> Value:
    """The value of a node's first output."""
    operator, attributes = node.operator, node.attributes
    if operator == "Shape" and inputs and inputs[0].some and _whole(attributes, "start") == 0:
        return Value(INT64, positive=_whole(attributes, "end") == 1)
    if operator == "Squeeze" and inputs:
        return Value(inputs[0].kind, positive=inputs[0].positive)
    if operator in ALWAYS:
        return Value(ALWAYS[operator])
    if operator == "Cast":
        kind = attributes.get("to", {}).get(_ATTRIBUTE_INTEGER, UNKNOWN)
        return Value(kind if isinstance(kind, int) else UNKNOWN)
    if operator in {"Constant", "ConstantOfShape"}:
        for found in attributes.values():
            if _ATTRIBUTE_TENSOR in found:
                value = _tensor(data, message(found[_ATTRIBUTE_TENSOR]))[1]
                return value if operator == "Constant" else Value(value.kind)
            for number in CONSTANTS.keys() & found.keys():
                return Value(CONSTANTS[number])
        return Value(FLOAT if operator == "ConstantOfShape" else UNKNOWN)
    if operator == "DynamicQuantizeLinear" or (operator == "QuantizeLinear" and len(inputs) < 3):
        return Value(UINT8)
    place = LIKE.get(operator, 0)
    kind = inputs[place].kind if place < len(inputs) else UNKNOWN
    return Value(kind, operator == "Max" and kind in {INT32, INT64} and any(value.positive for value in inputs))


def _whole(attributes: Mapping[str, Mapping[int, int | Range]], name: str) -> int | Range:
    """An attribute that is a whole number; 0 where there is none."""
    return attributes.get(name, {}).get(_ATTRIBUTE_INTEGER, 0)


def _define(own: dict[str, Value], name: str, value: Value) -> None:
    if name in own:
        raise ValueError(f"it has two values of the name {name!r}")
    own[name] = value


def _node(data: bytes, where: Range) -> _Node:
    operator, inputs, outputs, attributes = "", list[str](), list[str](), {}
    for number, value in fields(data, where):
        if number == _NODE_INPUT:
            inputs.append(text(data, value))
        elif number == _NODE_OUTPUT:
            outputs.append(text(data, value))
        elif number == _NODE_KIND:
            operator = text(data, value)
        elif number == _NODE_ATTRIBUTE:
            pairs = fields(data, message(value))
            found = dict(pairs)
            name = text(data, found.get(_ATTRIBUTE_NAME, (0, 0)))
            numbers = [field for field, _ in pairs]
            if name in attributes or any(numbers.count(part) > 1 for part in _ONCE):
                raise ValueError(f"it has the attribute {name!r} twice")
            attributes[name] = found
    return _Node(operator, inputs, outputs, attributes)


def _declared(data: bytes, where: Range) -> tuple[str, int]:
    """The name of an input or output, and the kind that it is declared to be of."""
    name, places = "", [where]
    for number, value in fields(data, where):
        name = text(data, value) if number == _VALUE_NAME else name
    for step in _VALUE_TO_KIND[:-1]:
        places = [message(v) for place in places for number, v in fields(data, place) if number == step]
    kinds = [v for place in places for number, v in fields(data, place) if number == _VALUE_TO_KIND[-1]]
    return name, kinds[-1] if kinds and isinstance(kinds[-1], int) else UNKNOWN


def _tensor(data: bytes, where: Range) -> tuple[str, Value]:
    """A constant's name, and what it is; positive only where its numbers are few and in one place."""
    name, kind, numbers, raw, places = "", UNKNOWN, list[int](), b"", set[int]()
    for number, value in fields(data, where):
        if number == _TENSOR_NAME:
            name = text(data, value)
        elif number == _TENSOR_KIND and isinstance(value, int):
            kind = value
        elif number == _TENSOR_RAW:
            start, end = message(value)
            raw = data[start : min(end, start + 8 * ENTRIES_LIMIT + 1)]
            places.add(number)
        elif number in _TENSOR_NUMBERS:
            numbers += [value] if isinstance(value, int) else packed(data, value)
            places.add(number)
    if kind not in {INT32, INT64} or len(places) != 1:
        return name, Value(kind)
    width = {INT32: 4, INT64: 8}[kind]
    if raw and len(raw) % width == 0:
        numbers = list(struct.unpack(f"<{len(raw) // width}{'q' if kind == INT64 else 'i'}", raw))
    # Varints are without a sign: beyond 2³¹ they are negative, or no divisor that an exporter writes.
    return name, Value(kind, 0 < len(numbers) <= ENTRIES_LIMIT and all(0 < n < 1 << 31 for n in numbers))
