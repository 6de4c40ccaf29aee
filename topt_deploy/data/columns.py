"""The columns of a table, each read as a checked array; every error names file, column and regions.

The names of columns are the data contract (docs/reference/files.md). Of pyarrow this uses the core alone:
``pyarrow.compute`` or ``pyarrow.dataset`` would cost the runtime more start-up time than everything else it does.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import pyarrow as pa

from topt_deploy.errors import BadData, BadRows
from topt_deploy.storage.hashed_file import Held

from .parquet import ParquetFile
from .parquet_parts import ParquetParts, open_table

Array = np.ndarray[Any, Any]
REGION_ID = "region_id"
CITY_ID = "city_id"
GEOMETRY = "geometry"
FLOW_COLUMNS = {
    "origin_id": ("origin_id", "h_geocode", "PULocationID"),
    "dest_id": ("dest_id", "w_geocode", "DOLocationID"),
    "flow": ("flow", "S000"),
}
"""Mobility columns with their accepted aliases: ours, LODES' and the TLC's."""
TARGET_FLOW = "target_flow"
PROMPT_PREFIX = "prompt_"
CODED = {CITY_ID, *FLOW_COLUMNS["origin_id"], *FLOW_COLUMNS["dest_id"]}
"""Columns of a file of flows that have few different texts, and are read as codes."""
Given: TypeAlias = pa.Table | Path | Held
"""A table as it is given: itself, its file or folder of parts, or what is held of it."""


def file_of(table: Given) -> Path | None:
    """The file of a table, or its folder, where it is one."""
    return None if isinstance(table, pa.Table) else table.path if isinstance(table, Held) else Path(table)


def choose_rows(table: pa.Table, rows: Array, file: object) -> pa.Table:
    """These rows of a table: bool (rows of the table), or int64 by number.

    Raises:
        BadData: Naming the column of ``file`` whose type pyarrow cannot choose rows of.
    """
    chosen, columns = pa.array(rows), []
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            columns.append(column.filter(chosen) if rows.dtype == bool else column.take(chosen))
        except pa.ArrowNotImplementedError as error:
            raise BadData(
                "rows cannot be chosen of a column of this type", file=file, column=name, found=column.type,
                fix="write it with a plain type, such as string for string_view",
            ) from error  # fmt: skip
    return pa.table(columns, schema=table.schema)


class TableReader:
    """A table, or Parquet that is read when its columns are: prompt vectors one column at a time.

    Args:
        table: The table, its file, or its folder of parts.
        role: The table's role in the contract, :data:`BadRows.REGIONS` or :data:`BadRows.MOBILITY`.
        keep: The columns to read, besides the geometry; ``everything`` names all, for messages.

    Attributes:
        geometry: The column of the regions' shapes; None where there is none.

    Raises:
        BadData: If a column occurs twice, or the file is no Parquet.
    """

    def __init__(self, table: Given, role: str, keep: Callable[[str], bool] = lambda column: True) -> None:
        self.role = role
        self.path = file_of(table)
        self.name = f"{role} table" if self.path is None else str(self.path)
        self.file: ParquetFile | ParquetParts | None = None
        self._table: pa.Table | None = None
        self._chosen: Array | None = None
        if isinstance(table, pa.Table):
            self._table, self.schema = table, table.schema
        else:
            coded = CODED if role == BadRows.MOBILITY else ()
            self.file = open_table(table if isinstance(table, Held) else Path(table), coded=coded)
            self.schema = self.file.schema
        self.everything = list(self.schema.names)
        self.geometry = self._geometry() if role == BadRows.REGIONS else None
        self.names = [column for column in self.everything if keep(column) or column == self.geometry]
        twice = sorted({column for column in self.names if self.names.count(column) > 1})
        if twice:
            raise BadData("a column occurs twice", file=self.name, column=twice[0], expected="each name once")

    def _geometry(self) -> str | None:
        """The column of the regions' shapes: ``geometry``, or what GeoParquet, or Parquet's own type, says is one."""
        if b"geo" in self.metadata:
            try:
                geo = json.loads(self.metadata[b"geo"])
                if GEOMETRY not in geo["columns"] and geo["primary_column"] in self.everything:
                    return str(geo["primary_column"])
            except (ValueError, KeyError, TypeError, RecursionError):
                pass  # whoever reads the shapes says what is wrong
        elif GEOMETRY not in self.everything and self.file is not None:
            native = self.file.native_geometry()
            return native[0] if native else None
        return GEOMETRY if GEOMETRY in self.everything else None

    @property
    def table(self) -> pa.Table:
        """All kept columns; without the prompts where the file is too large to be held."""
        if self._table is None:
            assert self.file is not None
            self._table = self.file.read([column for column in self.names if not self._apart(column)])
        return self._table

    def _apart(self, column: str) -> bool:
        """True for large columns, which are read separately each time they are asked for."""
        return self.file is not None and not self.file.held and column.startswith(PROMPT_PREFIX)

    def choose(self, rows: Array) -> None:
        """Go on with these rows alone, bool (rows of the table)."""
        self._chosen = rows
        self._table = choose_rows(self.table, rows, self.name)

    def refuse(self, message: str, rows: Array, code: str, *, fill: Sequence[str] = (), **facts: Any) -> NoReturn:
        """Refuse single rows, bool (rows in use).

        Raises:
            BadRows: Always; its rows are counted in the table as it was given.
        """
        if self._chosen is not None:
            rows, chosen = np.zeros(len(self._chosen), bool), rows
            rows[self._chosen] = chosen
        raise BadRows(message, table=self.role, rows=rows, code=code, fill=fill, file=self.name, **facts)

    def has(self, column: str) -> bool:
        """True if there is such a column."""
        return column in self.names

    def column(self, name: str) -> pa.ChunkedArray:
        """A column's values."""
        if self._apart(name):
            assert self.file is not None
            return self.file.read([name]).column(name)
        return self.table.column(name)

    def field(self, name: str) -> pa.Field:
        """A column's type and metadata."""
        return self.schema.field(name)

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """The table's own metadata."""
        return self.schema.metadata or {}


def texts(source: TableReader, column: str, fix: str) -> tuple[list[str | None], Array]:
    """A text column, dictionary-encoded or not; numbers are refused, for they lose leading zeros.

    Returns:
        Its different values, null as None, and int64 (N,), each row's place among them.
    """
    kind = source.column(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadData(
            "region ids are not text",
            file=source.name,
            column=column,
            expected="string (numbers lose leading zeros: '01073' becomes 1073)",
            found=str(kind),
            fix=fix,
        )
    return different(source, column)


def strings(source: TableReader, column: str, fix: str) -> list[str | None]:
    """:func:`texts`, one per row."""
    values, places = texts(source, column, fix)
    return [values[place] for place in places.tolist()]


def different(source: TableReader, column: str) -> tuple[list[Any], Array]:
    """The different values of a column, and int64 (N,), each row's place among them.

    Raises:
        BadData: If a text is not UTF-8.
    """
    data = source.column(column)
    places: dict[Any, int] = {}
    parts = [np.empty(0, np.int64)]
    try:
        for chunk in data.chunks:
            if not pa.types.is_dictionary(data.type):
                values = chunk.to_pylist()
                if pa.types.is_nested(data.type):  # which are no keys
                    values = [None if value is None else str(value) for value in values]
                parts.append(np.array([places.setdefault(v, len(places)) for v in values], np.int64))
                continue
            named = [*chunk.dictionary.to_pylist(), None]
            codes = chunk.indices.to_numpy(zero_copy_only=False)
            codes = np.where(np.isnan(codes), len(named) - 1, codes).astype(np.int64) if chunk.null_count else codes
            known = np.zeros(len(named), np.int64)
            for code in np.flatnonzero(np.bincount(codes, minlength=len(named))).tolist():
                known[code] = places.setdefault(named[code], len(places))
            parts.append(known[codes])
    except UnicodeDecodeError as error:
        raise BadData(f"not UTF-8 text ({error})", file=source.name, column=column, fix="write it again") from error
    return list(places), np.concatenate(parts)


def city_names(source: TableReader) -> tuple[list[str | None], Array]:
    """:func:`different` of the column ``city_id`` as names: a city that is a number is "7", however it is stored."""
    values, places = different(source, CITY_ID)
    names = [_name(value) for value in values]
    numbered = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return list(numbered), np.array([numbered[name] for name in names], np.int64)[places]


def canonical(text: str) -> str:
    """Text in Unicode's composed form (NFC): é may be one character or two, which no reader can tell apart."""
    if text.isascii():
        return text
    import unicodedata  # whose tables hardly any city needs

    return unicodedata.normalize("NFC", text)


def _name(value: Any) -> str | None:
    if value is None or value != value:
        return None
    if not isinstance(value, str):
        with suppress(TypeError, ValueError, OverflowError):
            value = int(value) if value == int(value) else value
    return canonical(str(value))


def floats(source: TableReader, ids: Array, column: str, nulls: bool = False) -> Array:
    """A numeric column as float64 (N,); nulls are an error unless allowed, and then NaN."""
    data = source.column(column)
    numeric = pa.types.is_integer(data.type) or pa.types.is_floating(data.type) or pa.types.is_decimal(data.type)
    if not numeric and not (nulls and pa.types.is_null(data.type)):
        raise BadData("not a number", file=source.name, column=column, expected="numbers", found=str(data.type))
    if data.null_count and not nulls:
        where = np.array(data.is_null().to_pylist())
        source.refuse(
            "values are missing", where, "missing_value", fill=[column], column=column, ids=ids[where],
            expected="a number in every row", found="null", fix="fill them in; write 0 where there is none",
        )  # fmt: skip
    if pa.types.is_decimal(data.type) or pa.types.is_null(data.type):
        data = data.cast(pa.float64())
    values = data.to_numpy().astype(np.float64)  # nulls become NaN; a cast would import pyarrow.compute
    if nulls and data.null_count < int(np.isnan(values).sum()):
        where = np.isnan(values) & ~np.array(data.is_null().to_pylist())
        raise BadData(
            "label is NaN", file=source.name, column=column, ids=ids[where],
            expected="a number, or null for a region to predict", found="NaN",
        )  # fmt: skip
    return values


def check_counts(source: TableReader, ids: Array, column: str, values: Array, part_of: str | None = None) -> None:
    """Refuse what is no count; ``column`` may be a part of a list column, ``part_of``."""
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        source.refuse(
            "counts must be finite and not negative",
            bad,
            "bad_count",
            fill=[part_of or column],
            column=column,
            ids=ids[bad],
            expected="a number ≥ 0",
            found=", ".join(f"{v:g}" for v in values[bad][:5]),
            fix="correct the values; write 0 where there is none",
        )


def list_width(source: TableReader, column: str) -> int:
    """The width of a list column: of its type where fixed, else of its first list that is not null."""
    kind = source.field(column).type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise BadData("not a list", file=source.name, column=column, expected="a list of numbers", found=str(kind))
    return next((len(value) for value in source.column(column) if value.is_valid), 0)


def lists(source: TableReader, ids: Array, column: str, width: int) -> Array:
    """A list column as float64 or float32 (N, width), finite."""
    if not source.has(column):
        prompt = column.startswith(PROMPT_PREFIX)
        raise BadData(
            "column is absent",
            file=source.name,
            column=column,
            expected=f"a list of {width} numbers per region",
            found=f"columns {some(source.everything)}",
            fix="encode prompts with the encoder the model was trained with" if prompt else None,
        )
    found_width = list_width(source, column)
    data = source.column(column)
    null = np.array(data.is_null().to_pylist()) if data.null_count else np.zeros(len(ids), bool)
    if pa.types.is_fixed_size_list(data.type):
        lengths = np.full(len(ids), found_width)
    else:
        lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in data.chunks])
    wrong = null | (lengths != width)
    if wrong.any():
        found = "null" if null.any() else f"lists of {', '.join(map(str, np.unique(lengths[wrong])[:5]))}"
        source.refuse(
            "list of the wrong length", wrong, "bad_list", fill=[column], column=column, ids=ids[wrong],
            expected=f"{width} numbers", found=found,
            fix="the columns must be those of the training data, in number and order",
        )  # fmt: skip
    parts = [_entries(chunk, width) for chunk in data.chunks]
    kind = parts[0].type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise BadData(
            "list entries are not numbers", file=source.name, column=column, expected="numbers", found=str(kind)
        )
    flat = np.concatenate([p.to_numpy(zero_copy_only=False) for p in parts])
    if len(flat) != len(ids) * width:
        raise BadData("the lists' entries do not add up: damaged file", file=source.name, column=column)
    if any(p.null_count for p in parts):
        absent = np.array([null for p in parts for null in p.is_null().to_pylist()]).reshape(len(ids), width)
        where = np.asarray(absent.any(axis=1))
        source.refuse(
            "list entries are missing", where, "missing_value", fill=[column], column=column, ids=ids[where],
            expected="numbers without nulls", found=f"{int(absent.sum())} nulls",
        )  # fmt: skip
    values = flat.reshape(len(ids), width)
    infinite = np.asarray(~np.isfinite(values).all(axis=1))
    if infinite.any():
        source.refuse(
            "list entries are NaN or infinite", infinite, "not_finite", fill=[column], column=column, ids=ids[infinite],
            expected="finite numbers", fix="compute them again",
        )  # fmt: skip
    return values if values.dtype == np.float32 else values.astype(np.float64, copy=False)


def _entries(chunk: pa.Array, width: int) -> pa.Array:
    """The entries of a chunk of lists, none of them null and all of one width; flatten() would import compute."""
    fixed = pa.types.is_fixed_size_list(chunk.type)
    start = chunk.offset * width if fixed else chunk.offsets[0].as_py()
    return chunk.values.slice(start, len(chunk) * width)


def some(names: Sequence[str], limit: int = 8) -> str:
    """A short listing of names."""
    names = list(names)
    text = ", ".join(repr(str(name)) for name in names[:limit]) or "none"
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


ID_LIMIT = 256


def checked_ids(source: TableReader, column: str, raw: Sequence[str | None]) -> Array:
    """Ids as an array, in which each takes the room of the longest."""
    longest = max(map(len, filter(None, raw)), default=0)
    if longest > ID_LIMIT:
        raise BadData(
            "an id is too long", file=source.name, column=column, expected=f"at most {ID_LIMIT} characters",
            found=f"{longest:,}",
        )  # fmt: skip
    return np.array(raw, dtype=np.str_)
