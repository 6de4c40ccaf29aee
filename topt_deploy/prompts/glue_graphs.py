"""The steps between an encoder's networks, as ONNX graphs of a few nodes, for data that stays on a device.

Made here byte by byte, for the runtime has no onnx: protobuf's wire format is tags, lengths and bytes. The numbers
are onnx.proto's, as in :mod:`topt_deploy.hardening.onnx_operators`.
"""

from collections.abc import Mapping, Sequence

FLOAT, INT64, FLOAT16, DOUBLE, BFLOAT16 = 1, 7, 10, 11, 16
"""ONNX's numbers of the types."""
OPSET = 20
IR_VERSION = 9
_INT = 2
"""The number of an attribute's type that is one integer."""

Shape = Sequence[str | int]


def join_graph(kind: int, width: int) -> bytes:
    """``first`` (a, H) and ``second`` (b, H) one behind the other: ``joined`` (a + b, H), all of a type."""
    return _model(
        _node("Concat", ["first", "second"], "joined", axis=0),
        inputs={"first": (kind, ["a", width]), "second": (kind, ["b", width])},
        output=("joined", kind, ["m", width]),
    )


def place_graph(features: int, hidden: int, width: int) -> bytes:
    """Rows ``index`` (B, S) of ``text`` (n, H) and ``features`` (m, H) behind it: ``embeds`` (B, S, H).

    Args:
        features: The type of ``features``.
        hidden: The type of ``text`` and of ``embeds``.
        width: H.
    """
    return _model(
        _node("Cast", ["features"], "cast", to=hidden),
        _node("Concat", ["text", "cast"], "rows", axis=0),
        _node("Gather", ["rows", "index"], "embeds", axis=0),
        inputs={
            "text": (hidden, ["n", width]),
            "features": (features, ["m", width]),
            "index": (INT64, ["batch", "tokens"]),
        },
        output=("embeds", hidden, ["batch", "tokens", width]),
    )


def sums_graph(hidden: int, width: int, kind: int) -> bytes:
    """``select`` (B, R, S) of ones and zeros times ``hidden`` (B, S, H): ``sums`` (B, R, H).

    Args:
        hidden: The type of ``hidden``.
        width: H.
        kind: The type of ``select`` and ``sums``, and what is added up in.
    """
    return _model(
        _node("Cast", ["hidden"], "cast", to=kind),
        _node("MatMul", ["select", "cast"], "sums"),
        inputs={
            "select": (kind, ["batch", "ranges", "tokens"]),
            "hidden": (hidden, ["batch", "tokens", width]),
        },
        output=("sums", kind, ["batch", "ranges", width]),
    )


def _model(*nodes: bytes, inputs: Mapping[str, tuple[int, Shape]], output: tuple[str, int, Shape]) -> bytes:
    graph = b"".join(_bytes(1, node) for node in nodes) + _bytes(2, b"between")
    graph += b"".join(_bytes(11, _value(name, *about)) for name, about in inputs.items())
    graph += _bytes(12, _value(*output))
    return _number(1, IR_VERSION) + _bytes(7, graph) + _bytes(8, _number(2, OPSET))


def _node(operator: str, inputs: Sequence[str], output: str, **attributes: int) -> bytes:
    node = b"".join(_bytes(1, name.encode()) for name in inputs) + _bytes(2, output.encode())
    node += _bytes(3, output.encode()) + _bytes(4, operator.encode())
    for name, value in attributes.items():
        node += _bytes(5, _bytes(1, name.encode()) + _number(3, value) + _number(20, _INT))
    return node


def _value(name: str, kind: int, shape: Shape) -> bytes:
    sizes = [_number(1, size) if isinstance(size, int) else _bytes(2, size.encode()) for size in shape]
    tensor = _number(1, kind) + _bytes(2, b"".join(_bytes(1, size) for size in sizes))
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, tensor))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
