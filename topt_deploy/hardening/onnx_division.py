"""Divisions of whole numbers in an ONNX graph: by zero, or of the least number by -1, they end the process.

ONNX Runtime looks at divisors that are constants, and at zero alone. So a divisor must be known to be positive: a
positive constant, what Max makes of one and of something else, as the exporter writes it, or the first size of an input
of the graph, as earlier exporters wrote it: nothing is predicted for no region. Fractions have no such trap, so the
kind of number of every value is followed through the graph. What cannot be followed counts as whole.
"""

from collections.abc import Mapping, Sequence

from .onnx_parts import INT32, INT64, UNKNOWN, Attribute, Node, Value

FLOAT, BOOL, UINT8 = 1, 9, 2
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


def results(node: Node, inputs: Sequence[Value], body: Sequence[Value] | None) -> list[Value]:
    """The values that a node gives, one per output.

    Args:
        node: The node.
        inputs: The values that it is given.
        body: Those that its body gives, where it has one.

    Raises:
        ValueError: If it may divide whole numbers by 0 or less.
    """
    operator = node.operator
    if operator == "Div" and len(inputs) > 1 and inputs[1].kind not in FRACTIONS and not inputs[1].positive:
        raise ValueError(
            f"it may divide whole numbers by 0 or less (into {node.outputs[:1]}), which no exporter writes"
        )
    if operator == "Scan" and body is not None:
        return [Value(body[i].kind) if i < len(body) else Value() for i in range(len(node.outputs))]
    first = _first(node, inputs)
    if len(node.outputs) == 1:
        return [first]
    second = Value(SECOND.get(operator, first.kind))
    return [second if i == 1 else first for i in range(len(node.outputs))]


def _first(node: Node, inputs: Sequence[Value]) -> Value:
    """The value of a node's first output."""
    operator, attributes = node.operator, node.attributes
    if operator == "Shape" and inputs and inputs[0].some and _whole(attributes, "start") == 0:
        return Value(INT64, positive=_whole(attributes, "end") == 1)
    if operator == "Squeeze" and inputs:
        return Value(inputs[0].kind, positive=inputs[0].positive)
    if operator in ALWAYS:
        return Value(ALWAYS[operator])
    if operator == "Cast":
        return Value(_whole(attributes, "to"))
    if operator in {"Constant", "ConstantOfShape"}:
        for attribute in attributes.values():
            if attribute.tensor is not None:
                return attribute.tensor if operator == "Constant" else Value(attribute.tensor.kind)
            for number in CONSTANTS.keys() & {*attribute.has}:
                return Value(CONSTANTS[number])
        return Value(FLOAT if operator == "ConstantOfShape" else UNKNOWN)
    if operator == "DynamicQuantizeLinear" or (operator == "QuantizeLinear" and len(inputs) < 3):
        return Value(UINT8)
    place = LIKE.get(operator, 0)
    kind = inputs[place].kind if place < len(inputs) else UNKNOWN
    if operator == "Max" and kind in {INT32, INT64}:
        return Value(kind, any(value.positive for value in inputs))
    return Value(kind)


def _whole(attributes: Mapping[str, Attribute], name: str) -> int:
    """An attribute that is a whole number; 0 where there is none."""
    return attributes[name].integer if name in attributes else 0
