"""Protobuf's wire format, read without the library: where the fields of a message are in its bytes."""

from collections.abc import Iterator, Mapping

Range = tuple[int, int]
"""Where a message's bytes begin and end."""
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


def fields(data: bytes, where: Range, refused: Mapping[int, str] | None = None) -> Iterator[tuple[int, int | Range]]:
    """Field numbers of a message, each with its number, or where its bytes are.

    Args:
        data: All the bytes.
        where: The message's place in them.
        refused: Numbers of fields that may not occur, with what they would bring.

    Raises:
        ValueError: If it is no message, or has such a field.
    """
    position, end = where
    while position < end:
        tag, position = _varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if refused and number in refused:
            raise ValueError(f"it has {refused[number]}, which no exporter writes")
        if kind == _BYTES:
            length, position = _varint(data, position, end)
            value: int | Range = (position, position + length)
            position += length
        elif kind == _VARINT:
            value, position = _varint(data, position, end)
        elif kind in (_EIGHT, _FOUR):
            size = 8 if kind == _EIGHT else 4
            value = (position, position + size)
            position += size
        else:
            raise ValueError("it is not an ONNX model")
        if position > end:
            raise ValueError("it is cut off")
        yield number, value


def packed(data: bytes, where: Range) -> list[int]:
    """The numbers that stand one after the other in a field's bytes."""
    position, end = where
    found = []
    while position < end:
        value, position = _varint(data, position, end)
        found.append(value)
    return found


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("it is not an ONNX model")


def message(value: int | Range) -> Range:
    """A field's value as the place of a message."""
    if isinstance(value, int):
        raise ValueError("it is not an ONNX model")
    return value


def text(data: bytes, value: int | Range) -> str:
    """A field's value as text."""
    start, end = message(value)
    return data[start:end].decode()
