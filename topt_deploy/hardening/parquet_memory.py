"""The memory that a Parquet file's columns take, computed from the headers of its pages before any page is decoded.

A page of fifty bytes can stand for two billion numbers: one value and how often it is repeated. What the file's footer
says of that need not be true, and Arrow decodes by what the pages say; so their headers are read, all of them, which
are a few bytes in every megabyte (format: parquet.thrift, in Thrift's compact protocol). Where the pages lie is read
from the footer here, too: pyarrow ends the process when it is asked that of a damaged one.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pyarrow as pa

WIDTHS = (1, 4, 8, 12, 4, 8)
"""In bytes, of Parquet's types by number: boolean, int32, int64, int96, float, double."""
TEXT, FIXED = 6, 7
"""Numbers of the types BYTE_ARRAY and FIXED_LEN_BYTE_ARRAY."""
TEXT_BYTES = 64
"""A text's memory besides its characters, once it is Python's."""
PAGE_BYTES = 1 << 10
"""The memory counted for a page in any case; no writer makes pages as small as that."""
EXACT_FROM_BYTES = 64 << 20
"""Of texts by a dictionary: below, every one is taken for as long as the whole dictionary."""
DICTIONARY_LIMIT_BYTES = 16 << 20
"""Larger dictionaries are not looked into."""
CODECS = ("snappy", "gzip", "brotli", "zstd", "lz4_raw", "lz4")
WINDOWS_BYTES = (1 << 10, 16 << 20)
"""Of a page's header: what nearly all fit, and Arrow's own limit."""
DEPTH_LIMIT = 8

_DICTIONARY_PAGE = 2
_DICTIONARY_CODES = {2, 8}
_DELTA_TEXT = 7


class _Page(NamedTuple):
    """A page: whether it is a dictionary, where its content is, sizes of it packed and unpacked, values, encoding."""

    dictionary: bool
    start: int
    packed: int
    unpacked: int
    values: int
    encoding: int


class _Chunk(NamedTuple):
    """A column in a row group: type, number of values and of rows, where its pages are."""

    physical: int
    values: int
    rows: int
    start: int
    end: int


Footer = tuple[list[list[_Chunk]], list[int]]
"""Columns of every row group, and the lengths of the leaves' values, where a type has one."""


def read_footer(file: pa.NativeFile) -> Footer:
    """Read the places of a file's columns from its footer.

    Raises:
        ValueError: If the footer says it in no way that makes sense.
    """
    size = file.size()
    length = int.from_bytes(file.read_at(4, size - 8), "little")
    try:
        told, _ = _struct(file.read_at(length, size - 8 - length), 0, DEPTH_LIMIT)
        groups = [[_chunk(column[3], _number(group[3])) for column in group[1]] for group in told[4]]
        return groups, [_number(leaf.get(2, 0)) for leaf in told[2][1:] if not leaf.get(5)]
    except (IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError("the footer cannot be read") from error


def _chunk(facts: dict[int, Any], rows: int) -> _Chunk:
    start, dictionary, packed = _number(facts[9]), _number(facts.get(11, 0)), _number(facts[7])
    start = dictionary if 0 < dictionary < start else start
    return _Chunk(_number(facts[1]), _number(facts[5]), rows, start, start + packed)


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("the footer lacks a number where one must be")
    return value


def memory(file: pa.NativeFile, footer: Footer, column: int, kind: pa.DataType, limit: int) -> int:
    """Bytes that reading a column takes, at most; not counted further where they are above the limit.

    Args:
        file: The file.
        footer: Its footer (:func:`read_footer`).
        column: Number of the column among the leaves of the schema.
        kind: Arrow's type of what it is, or is a part of.
        limit: In bytes.

    Raises:
        ValueError: If the pages' headers cannot be read.
    """
    repeat, only_fixed = _places(kind)
    total = 0
    groups, lengths = footer
    for group in groups:
        if column >= min(len(group), len(lengths)):
            raise ValueError("a row group lacks columns")
        chunk = group[column]
        if chunk.values == 0:  # Arrow reads none of its pages
            continue
        physical, values = chunk.physical, 0
        if not 0 <= physical <= FIXED:
            raise ValueError("a column has no type")
        width = WIDTHS[physical] if physical < TEXT else lengths[column] if physical == FIXED else 0
        texts = _Texts(file)
        for page in _pages(file, chunk):
            total += PAGE_BYTES + page.unpacked
            if page.dictionary:
                total += texts.memory()
                texts = _Texts(file, page if physical == TEXT else None)
                continue
            values += page.values
            if physical != TEXT:
                total += page.values * width
            elif page.encoding in _DICTIONARY_CODES:
                texts.coded += page.values
            else:  # of delta encoding each begins with as much of the one before as it says
                total += page.values * (TEXT_BYTES + (page.unpacked if page.encoding == _DELTA_TEXT else 0))
            if total + texts.memory() > limit:
                return limit + 1
        total += texts.memory()
        # A null in a list of fixed size takes as many places as a list does.
        places = max(values, chunk.rows * repeat) if only_fixed else values * repeat
        total += (places - values) * (width or TEXT_BYTES)
        if total > limit:
            return total
    return total


class _Texts:
    """Texts that are told by codes of a dictionary.

    Args:
        file: The file.
        dictionary: The dictionary's page.

    Attributes:
        coded: How many there are so far.
    """

    def __init__(self, file: pa.NativeFile, dictionary: _Page | None = None) -> None:
        self._file, self._dictionary = file, dictionary
        self._longest, self._exact = dictionary.unpacked if dictionary else 0, False
        self.coded = 0

    def memory(self) -> int:
        """Bytes that they take: each as the longest, which is looked up once that matters."""
        if self._dictionary and not self._exact and self._longest * self.coded > EXACT_FROM_BYTES:
            self._longest, self._exact = _longest(self._file, self._dictionary), True
        return self.coded * (TEXT_BYTES + self._longest)


def _places(kind: pa.DataType) -> tuple[int, bool]:
    """Product of the widths of the fixed-size lists in a type, and whether no other lists are in it."""
    if isinstance(kind, pa.ExtensionType):
        return _places(kind.storage_type)
    inner = [_places(kind.field(i).type) for i in range(kind.num_fields)] if kind.num_fields else [(1, True)]
    repeat, only_fixed = max(r for r, _ in inner), all(fixed for _, fixed in inner)
    if pa.types.is_fixed_size_list(kind):
        return repeat * kind.list_size, only_fixed
    return repeat, only_fixed and (pa.types.is_struct(kind) or not kind.num_fields)


def _pages(file: pa.NativeFile, chunk: _Chunk) -> Iterator[_Page]:
    position = chunk.start
    while position < chunk.end:
        header, length = _header(file, position)
        unpacked, packed = header.get(2, -1), header.get(3, -1)
        # Data of version 1, of a dictionary, of version 2: number of values and encoding.
        about = header.get(5) or header.get(7) or header.get(8) or {}
        if not isinstance(about, dict):
            raise ValueError("invalid page header")
        values, encoding = about.get(1, 0), about.get(4 if 8 in header and 5 not in header else 2, 0)
        for number in (unpacked, packed, values, encoding):
            if not isinstance(number, int) or number < 0:
                raise ValueError("invalid page header")
        yield _Page(header.get(1) == _DICTIONARY_PAGE, position + length, packed, unpacked, values, encoding)
        position += length + packed


def _header(file: pa.NativeFile, position: int) -> tuple[dict[int, Any], int]:
    """A page's header as its fields by number, and its length."""
    if not 0 <= position < file.size():
        raise ValueError("a page lies outside of the file")
    for window in WINDOWS_BYTES:
        try:
            return _struct(file.read_at(window, position), 0, DEPTH_LIMIT)
        except (IndexError, struct.error):
            continue
    raise ValueError("a page's header is cut off")


def _struct(data: bytes, position: int, depth: int) -> tuple[dict[int, Any], int]:
    """A structure's fields by number: numbers, truths, structures and lists of them; and where it ends.

    A footer has some thousand fields, nearly all of whose numbers and lengths are a single byte: read here, and by
    :func:`_varint` where they are not.
    """
    fields: dict[int, Any] = {}
    number = 0
    while byte := data[position]:
        position += 1
        kind = byte & 15
        if byte > 15:
            number += byte >> 4
        else:
            number, position = _integer(data, position)
        if 4 <= kind <= 6:
            value = data[position]
            position += 1
            if value > 0x7F:
                value, position = _varint(data, position - 1)
            fields[number] = (value >> 1) ^ -(value & 1)
        elif kind == 8:
            length = data[position]
            position += 1
            if length > 0x7F:
                length, position = _varint(data, position - 1)
            position += length
        elif kind == 12 and depth:
            fields[number], position = _struct(data, position, depth - 1)
        elif kind == 9 and depth:
            fields[number], position = _list(data, position, depth - 1)
        elif kind in (1, 2):
            fields[number] = kind == 1
        elif kind == 3:
            position += 1
        elif kind == 7:
            position += 8
        else:
            raise ValueError("invalid page header")
    return fields, position + 1


def _list(data: bytes, position: int, depth: int) -> tuple[list[Any], int]:
    """A list, of which structures are kept, and nothing else is asked for."""
    byte = data[position]
    count, kind, position = byte >> 4, byte & 15, position + 1
    if count == 15:
        count, position = _varint(data, position)
    kept: list[Any] = []
    if kind == 12 and depth:
        for _ in range(count):
            fields, position = _struct(data, position, depth)
            kept.append(fields)
    elif kind in (4, 5, 6):
        for _ in range(count):
            position += 1
            if data[position - 1] > 0x7F:
                _, position = _varint(data, position - 1)
    elif kind == 8:
        for _ in range(count):
            length, position = _varint(data, position)
            position += length
    elif kind in (1, 2, 3):
        position += count
    elif kind == 7:
        position += 8 * count
    elif count:
        raise ValueError("a list of an unknown type")
    if position > len(data):
        raise IndexError("a list is cut off")
    return kept, position


def _integer(data: bytes, position: int) -> tuple[int, int]:
    """A number whose sign is its last bit."""
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("invalid page header")


def _longest(file: pa.NativeFile, page: _Page) -> int:
    """Bytes of the longest text of a dictionary; of all of it where it cannot be looked into.

    Which codec it is, pyarrow tells by ending the process where the footer names none: so it is the longest text by any
    codec that unpacks the page.
    """
    if max(page.packed, page.unpacked) > DICTIONARY_LIMIT_BYTES:
        return page.unpacked
    packed = file.read_at(page.packed, page.start)
    found = [packed] if page.packed == page.unpacked else []
    for codec in CODECS:
        with suppress(pa.ArrowException, OSError, ValueError):
            found.append(pa.decompress(packed, page.unpacked, codec, asbytes=True))
    longest = 0 if found else page.unpacked
    for data in found:
        position = 0
        while position + 4 <= len(data):
            (length,) = struct.unpack_from("<I", data, position)
            longest, position = max(longest, length), position + 4 + length
    return min(longest, page.unpacked)
