"""The parts of an ONNX graph, each read once from its bytes, and refused where no exporter writes it so."""

import struct
from collections.abc import Mapping
from typing import NamedTuple

from .protobuf import Range, fields, message, packed, text

UNKNOWN, INT32, INT64 = 0, 6, 7
"""Numbers, in onnx.proto, of types of numbers."""
ENTRIES_LIMIT = 64
"""Of a constant that is looked into."""
NUMBER_LIMIT = 1 << 31
"""Of whole numbers in attributes: kernels multiply them, and end the process where the product is none."""
POSITIVE = frozenset(
    {
        "K", "N", "bits", "block_size", "blocksize", "dilations", "group", "kernel_shape", "kv_num_heads", "num_groups",
        "num_heads", "num_outputs", "num_scan_inputs", "q_num_heads", "strides",
    }
)  # fmt: skip
"""Attributes that something is divided by."""

# Field numbers of onnx.proto, and what a field of that number would bring.
_NODE_INPUT, _NODE_OUTPUT, _NODE_KIND, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER, _ATTRIBUTE_TENSOR, _ATTRIBUTE_BODY = 1, 3, 5, 6
_ATTRIBUTE_INTEGERS, _ATTRIBUTE_TENSORS = {_ATTRIBUTE_INTEGER, 8}, {_ATTRIBUTE_TENSOR, 10}
_ATTRIBUTE_REFUSED = {11: "bodies", 22: "sparse weights", 23: "sparse weights"}
_TENSOR_KIND, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 2, 8, 9, 13, 14
_TENSOR_NUMBERS = {5, 7}
_EXTERNAL = 1
_VALUE_NAME, _VALUE_TO_KIND = 1, (2, 1, 1)


class Value(NamedTuple):
    """A value of the graph: its kind of number, and if all of it, and if its first size, is known to be above 0."""

    kind: int = UNKNOWN
    positive: bool = False
    some: bool = False


ANY = Value()
"""Nothing is known of it."""


class Attribute(NamedTuple):
    """An attribute: the numbers of the fields that it has, its whole number, its tensor and its body."""

    has: list[int]
    integer: int
    tensor: Value | None
    body: Range | None


class Node(NamedTuple):
    """A node: its operator with the operator's domain, names of its inputs and outputs; attributes, and those that
    are bodies once more, by name."""

    operator: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Attribute]
    bodies: dict[str, Range]


def read_node(data: bytes, where: Range, beside: Mapping[str, int]) -> Node:
    """Read a node.

    Args:
        data: The serialised model.
        where: The node's place in it.
        beside: Sizes in bytes of the files that its weights may lie in.

    Raises:
        ValueError: If no exporter writes it so.
    """
    operators, domains = list[str](), list[str]()
    inputs, outputs, attributes, bodies = list[str](), list[str](), dict[str, Attribute](), dict[str, Range]()
    for number, value in fields(data, where):
        if number == _NODE_INPUT:
            inputs.append(text(data, value))
        elif number == _NODE_OUTPUT:
            outputs.append(text(data, value))
        elif number == _NODE_KIND:
            operators.append(text(data, value))
        elif number == _NODE_DOMAIN:
            domains.append(text(data, value))
        elif number == _NODE_ATTRIBUTE:
            name, attribute = _attribute(data, message(value), beside)
            if name in attributes:
                raise ValueError(f"it has the attribute {name!r} twice")
            attributes[name] = attribute
            if attribute.body is not None:
                bodies[name] = attribute.body
    if len(operators) != 1 or len(domains) > 1:
        raise ValueError("it has a node that is not of one operator, which no exporter writes")
    return Node(operators[0], domains[0] if domains else "", inputs, outputs, attributes, bodies)


def _attribute(data: bytes, where: Range, beside: Mapping[str, int]) -> tuple[str, Attribute]:
    name, integer, tensor, body, integers, has = "", 0, None, None, list[int](), list[int]()
    for number, value in fields(data, where, _ATTRIBUTE_REFUSED):
        has.append(number)
        if number == _ATTRIBUTE_NAME:
            name = text(data, value)
        elif number in _ATTRIBUTE_INTEGERS:
            integers += [value] if isinstance(value, int) else packed(data, value)
            if number == _ATTRIBUTE_INTEGER:
                integer = value if isinstance(value, int) else -1  # which runtimes do not read as one
        elif number in _ATTRIBUTE_TENSORS:
            _, found = read_tensor(data, message(value), beside)
            tensor = found if number == _ATTRIBUTE_TENSOR else tensor
        elif number == _ATTRIBUTE_BODY:
            body = message(value)
    if has.count(_ATTRIBUTE_TENSOR) > 1 or has.count(_ATTRIBUTE_BODY) > 1:
        raise ValueError(f"it has the attribute {name!r} twice")
    if integers:
        low = 1 if name in POSITIVE else -NUMBER_LIMIT
        if not all(low <= value - (1 << 64 if value >> 63 else 0) < NUMBER_LIMIT for value in integers):
            raise ValueError(f"the attribute {name!r} has a number that no exporter writes")
    return name, Attribute(has, integer, tensor, body)


def read_tensor(data: bytes, where: Range, beside: Mapping[str, int]) -> tuple[str, Value]:
    """A constant's name, and what it is; positive only where its numbers are few and in one place.

    Raises:
        ValueError: If it lies elsewhere than in a file beside the graph.
    """
    name, kind, external = "", UNKNOWN, False
    entries: dict[str, str] = {}
    held: list[tuple[int, int | Range]] = []
    for number, value in fields(data, where):
        if number == _TENSOR_NAME:
            name = text(data, value)
        elif number == _TENSOR_KIND and isinstance(value, int):
            kind = value
        elif number == _TENSOR_RAW or number in _TENSOR_NUMBERS:
            held.append((number, value))
        elif number == _TENSOR_LOCATION:
            external = external or value == _EXTERNAL
        elif number == _TENSOR_EXTERNAL:
            pair = {part: text(data, inner) for part, inner in fields(data, message(value))}
            key = pair.get(1, "")
            if key in entries:
                raise ValueError(f"weights have two values of {key!r}")
            entries[key] = pair.get(2, "")
    if external or entries:
        _check_place(entries, beside)
    return name, Value(kind, kind in {INT32, INT64} and _positive(data, kind, held))


def _check_place(entries: Mapping[str, str], beside: Mapping[str, int]) -> None:
    location = entries.get("location", "")
    if location not in beside:
        raise ValueError(f"weights lie in {location!r}, which is not a file beside it")
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    if offset < 0 or length < 0 or offset + length > beside[location]:
        raise ValueError(f"weights lie beyond the end of {location}")


def _positive(data: bytes, kind: int, held: list[tuple[int, int | Range]]) -> bool:
    """Tell if the numbers of a constant, by the fields that hold them, are known to be positive."""
    numbers, raw = list[int](), b""
    for number, value in held:
        if number == _TENSOR_RAW:
            start, end = message(value)
            raw = data[start : min(end, start + 8 * ENTRIES_LIMIT + 1)]
        else:
            numbers += [value] if isinstance(value, int) else packed(data, value)
    if len({number for number, _ in held}) != 1:
        return False
    width = {INT32: 4, INT64: 8}[kind]
    if raw and len(raw) % width == 0:
        numbers = list(struct.unpack(f"<{len(raw) // width}{'q' if kind == INT64 else 'i'}", raw))
    # Varints are without a sign: beyond 2³¹ they are negative, or no divisor that an exporter writes.
    return 0 < len(numbers) <= ENTRIES_LIMIT and all(0 < n < 1 << 31 for n in numbers)


def read_declared(data: bytes, where: Range) -> tuple[str, int]:
    """The name of an input or output, and the kind that it is declared to be of."""
    name, places = "", [where]
    for number, value in fields(data, where):
        name = text(data, value) if number == _VALUE_NAME else name
    for step in _VALUE_TO_KIND[:-1]:
        places = [message(v) for place in places for number, v in fields(data, place) if number == step]
    kinds = [v for place in places for number, v in fields(data, place) if number == _VALUE_TO_KIND[-1]]
    return name, kinds[-1] if kinds and isinstance(kinds[-1], int) else UNKNOWN
