"""Protobuf's wire format, read without the library: where the fields of a message are in its bytes."""

from collections.abc import Mapping

Range = tuple[int, int]
"""Where a message's bytes begin and end."""
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


def fields(data: bytes, where: Range, refused: Mapping[int, str] | None = None) -> list[tuple[int, int | Range]]:
    """Field numbers of a message, each with its number, or where its bytes are.

    Args:
        data: All the bytes.
        where: The message's place in them.
        refused: Numbers of fields that may not occur, with what they would bring.

    Raises:
        ValueError: If it is no message, or has such a field.
    """
    position, end = where
    found: list[tuple[int, int | Range]] = []
    while position < end:
        # Nearly all tags and lengths are a single byte: read here, and by _varint where they are not.
        tag = data[position]
        position += 1
        if tag > 0x7F:
            tag, position = _varint(data, position - 1, end)
        number, kind = tag >> 3, tag & 7
        if refused and number in refused:
            raise ValueError(f"it has {refused[number]}, which no exporter writes")
        if kind == _BYTES:
            length = data[position] if position < end else 0x80
            position += 1
            if length > 0x7F:
                length, position = _varint(data, position - 1, end)
            found.append((number, (position, position + length)))
            position += length
        elif kind == _VARINT:
            value, position = _varint(data, position, end)
            found.append((number, value))
        elif kind in (_EIGHT, _FOUR):
            size = 8 if kind == _EIGHT else 4
            found.append((number, (position, position + size)))
            position += size
        else:
            raise ValueError("it is not an ONNX model")
        if position > end:
            raise ValueError("it is cut off")
    return found


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
    if isinstance(value, int):
        raise ValueError("it is not an ONNX model")
    return data[value[0] : value[1]].decode()
