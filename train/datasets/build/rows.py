"""Files of rows, read a batch at a time so that memory stays flat: CSV and TSV, Parquet, and points of vector files."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from topt_deploy.data.geometry import geo_library
from topt_deploy.data.parquet import ParquetFile
from topt_deploy.data.vocabulary import BELOW
from topt_deploy.errors import BadConfig, BadData
from topt_deploy.storage.os_errors import reading

from .layers import GEOMETRY, GIS_SUFFIXES, is_parquet, layer_columns, only, read_features
from .recipe import Source

Array = np.ndarray[Any, Any]

LON, LAT = "\0lon", "\0lat"
"""Columns of positions that a file's own geometry gives; no file has columns of these names."""
CATEGORY = "\0category"
"""A column of lists of categories that a reader makes itself."""
OVERTURE = ("taxonomy.hierarchy", "taxonomy.primary", "categories.primary", "basic_category")
"""Where Overture's places have their category, the newest first."""
BLOCK_BYTES = 1 << 23
ROWS_AT_ONCE = 1 << 16
BUFFER_BYTES = 1 << 18
PACKED = (".gz", ".bz2", ".zst")
DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a file. ``first`` is the number of the first one, from 1."""

    first: int
    table: pa.Table


class RowFile(Protocol):
    """A file of rows.

    Attributes:
        path: The file.
        names: Its columns.
        placed: Whether it brings positions of its own, as columns :data:`LON` and :data:`LAT`.
        line: What to add to a row's number for the line that it stands on.
        malformed: Lines that are no rows: number, and what is wrong.
        done: The share of the file that is read.
    """

    path: Path
    names: list[str]
    placed: bool
    line: int
    malformed: list[tuple[int, str]]
    done: float

    def read(self, columns: Sequence[str]) -> Iterator[Rows]:
        """These columns, and the file's own positions where it has them."""
        ...


def open_rows(path: Path, source: Source) -> RowFile:
    """Open a file of rows by what its name says it is.

    Raises:
        NoInput, BadData: If it is absent, or is not what its name says.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in PACKED:
        suffixes = suffixes[:-1]
    last = suffixes[-1] if suffixes else ""
    if is_parquet(path):
        return ParquetRows(path)
    if last in {".csv", ".tsv", ".txt"}:
        return TextRows(path, source)
    if last in {".pbf", ".osm"}:
        from .osm import OsmRows

        return OsmRows(path)
    if last == ".json" and _is_overpass(path):
        from .osm import OverpassRows

        return OverpassRows(path)
    if last in GIS_SUFFIXES:
        return FeatureRows(path, source)
    raise BadData(
        "unknown kind of file", file=path, found=path.suffix or "no suffix",
        expected=f".csv, .tsv, .parquet, .osm.pbf, {', '.join(sorted(GIS_SUFFIXES))}",
    )  # fmt: skip


@dataclass
class TextRows:
    """CSV and TSV, compressed or not. Every column is text here: an id 007 would be the number 7 otherwise."""

    path: Path
    source: Source
    placed: bool = False
    malformed: list[tuple[int, str]] = field(default_factory=list)
    done: float = 0.0

    def __post_init__(self) -> None:
        with reading(self.path), pa.input_stream(str(self.path), compression="detect") as stream:
            head = stream.read(1 << 16)
        self.encoding = self.source.encoding or ("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
        try:
            text = head.decode(self.encoding, errors="ignore").removeprefix("\N{BYTE ORDER MARK}")
        except LookupError as error:
            raise BadConfig("no such encoding", column="encoding", found=self.encoding) from error
        first = text.splitlines()[0] if text.strip() else ""
        if not first:
            raise BadData("the file is empty", file=self.path, expected="a header and rows")
        self.delimiter = {"tab": "\t", "\\t": "\t"}.get(self.source.delimiter or "", self.source.delimiter)
        self.delimiter = self.delimiter or _delimiter(self.path, first)
        self.line = 0 if self.source.header else 1
        with reading(self.path):
            self.names = list(self._open(None).schema.names)

    def _open(self, columns: Sequence[str] | None) -> Any:
        header = self.source.header

        def bad(row: Any) -> str:
            self.malformed.append((row.number or 0, f"{row.actual_columns} columns, expected {row.expected_columns}"))
            return "skip"

        convert = pacsv.ConvertOptions(
            strings_can_be_null=False,
            include_columns=columns,
            column_types=dict.fromkeys(columns or (), pa.string()),
        )
        try:
            self._raw = pa.OSFile(os.fsencode(self.path))
            packed = pa.Codec.detect(str(self.path)) if self.path.suffix.lower() in PACKED else None
            return pacsv.open_csv(
                self._raw if packed is None else pa.CompressedInputStream(self._raw, packed.name),
                read_options=pacsv.ReadOptions(
                    block_size=BLOCK_BYTES, encoding=self.encoding, column_names=list(header) if header else None
                ),
                parse_options=pacsv.ParseOptions(
                    delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=bad
                ),
                convert_options=convert,
            )
        except pa.ArrowInvalid as error:
            raise self._damaged(error) from error

    def read(self, columns: Sequence[str]) -> Iterator[Rows]:
        """The columns, as text."""
        self.malformed.clear()
        first = 1
        with reading(self.path):
            reader = self._open(list(columns) or self.names[:1])
            while True:
                try:
                    table = pa.Table.from_batches([reader.read_next_batch()])
                except StopIteration:
                    return
                except (pa.ArrowInvalid, UnicodeDecodeError) as error:
                    raise self._damaged(error) from error
                self.done = self._raw.tell() / max(self._raw.size(), 1)
                yield Rows(first=first, table=table)
                first += len(table)

    def _damaged(self, error: Exception) -> BadData:
        told = str(error)
        fix = None
        if "UTF8" in told or "UTF-8" in told or isinstance(error, UnicodeError):
            fix = 'name its encoding: encoding = "latin-1" or "cp1252" in the recipe; it is never guessed'
        return BadData(f"not a table of text ({told})", file=self.path, expected=f"text in {self.encoding}", fix=fix)


def _delimiter(path: Path, header: str) -> str:
    if ".tsv" in [suffix.lower() for suffix in path.suffixes]:
        return "\t"
    outside = "".join(header.split('"')[::2])
    return max(DELIMITERS, key=lambda sign: (outside.count(sign), sign == ","))


class ParquetRows:
    """Parquet; points of GeoParquet bring their own positions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = ParquetFile(path)  # its checks
        self.names = list(file.names)
        self.line = 0
        self.malformed: list[tuple[int, str]] = []
        self.done = 0.0
        self._geo = file.metadata.get(b"geo")
        self._parts = [name for name in OVERTURE if _nested(file.schema, name)]
        if self._parts:
            self.names.append(CATEGORY)
        self.placed = GEOMETRY in self.names and self._geo is not None and _is_lonlat(self._geo, path)

    def read(self, columns: Sequence[str]) -> Iterator[Rows]:
        """The columns in their own types; text that repeats stays in codes."""
        first = 1
        with reading(self.path):
            # Without pre_buffer=False, pyarrow holds all columns of the whole file.
            file = pq.ParquetFile(
                self.path, read_dictionary=[c for c in columns if c != CATEGORY and self._is_text(c)],
                pre_buffer=False, buffer_size=BUFFER_BYTES,
            )  # fmt: skip
            asked = [column for column in columns if column != CATEGORY]
            asked += [GEOMETRY] if self.placed and GEOMETRY not in columns else []
            asked += self._parts if CATEGORY in columns else []
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=asked, use_threads=False):
                table = pa.Table.from_batches([batch])
                if CATEGORY in columns:
                    table = table.append_column(CATEGORY, _overture(table, self._parts))
                if self.placed:
                    table = _with_positions(table)
                self.done = min(first / max(file.metadata.num_rows, 1), 1.0)
                yield Rows(first=first, table=table)
                first += len(table)

    def _is_text(self, column: str) -> bool:
        kind = pq.read_schema(self.path).field(column).type
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _nested(schema: pa.Schema, name: str) -> bool:
    """True if a schema has a column, or a field of a column, ``column.field``."""
    column, _, part = name.partition(".")
    place = schema.get_field_index(column)
    if place < 0:
        return False
    kind = schema.field(place).type
    return not part or (pa.types.is_struct(kind) and kind.get_field_index(part) >= 0)


def _overture(table: pa.Table, parts: Sequence[str]) -> pa.ChunkedArray:
    """Overture's category of each place, from the newest of its columns; hierarchies are written ``A > B``."""
    found = []
    for name in parts:
        column, _, part = name.partition(".")
        values = table.column(column)
        if part:
            values = pc.struct_field(values, part)
        if pa.types.is_list(values.type):
            values = pa.chunked_array([pc.binary_join(chunk, BELOW) for chunk in values.chunks])
        found.append(values)
    return pc.coalesce(*found)


class FeatureRows:
    """A vector file's features: points, or the middles of areas and lines."""

    def __init__(self, path: Path, source: Source) -> None:
        self.path = path
        self.source = source
        self.names = layer_columns(path, source.layer)
        self.placed = True
        self.line = 0
        self.malformed: list[tuple[int, str]] = []
        self.done = 0.0

    def read(self, columns: Sequence[str]) -> Iterator[Rows]:
        """The columns, with the features' positions."""
        parts = read_features(self.path, columns, layer=self.source.layer, crs=self.source.crs)
        for part in parts:
            yield Rows(first=part.first, table=with_points(part.table, part.shapes))


def with_points(table: pa.Table, shapes: Array) -> pa.Table:
    """A table with the positions of shapes: of points themselves, and of others a point that lies on them."""
    shapely = geo_library("shapely")
    shapes = only(shapes, ~shapely.is_empty(shapes))
    points = only(shapes, shapely.get_type_id(shapes) == 0)
    other = ~shapely.is_missing(shapes) & shapely.is_missing(points)
    if other.any():
        points[other] = shapely.point_on_surface(shapes[other])
    # Arrow's append_column would take NaN for a value: from_pandas makes it the blank that it is.
    for name, values in ((LON, shapely.get_x(points)), (LAT, shapely.get_y(points))):
        table = table.append_column(name, pa.array(values, pa.float64(), from_pandas=True))
    return table


def _with_positions(table: pa.Table) -> pa.Table:
    column = table.column(GEOMETRY)
    if isinstance(column.type, pa.ExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    shapes = geo_library("shapely").from_wkb(column.to_numpy(zero_copy_only=False), on_invalid="ignore")
    return with_points(table, shapes)


def _is_lonlat(geo: bytes, path: Path) -> bool:
    """True if GeoParquet's positions are degrees; another system is refused."""
    try:
        columns = json.loads(geo)["columns"]
        crs = columns[GEOMETRY].get("crs", "OGC:CRS84")
    except (ValueError, KeyError, TypeError):
        return False
    pyproj = geo_library("pyproj")
    if crs is None:
        raise BadData("the geometry's reference system is not stated", file=path, column=GEOMETRY, expected="CRS84")
    system = pyproj.CRS.from_user_input(json.dumps(crs) if isinstance(crs, dict) else crs)
    if not system.equals(pyproj.CRS.from_user_input("OGC:CRS84"), ignore_axis_order=True):
        raise BadData(
            "the geometry is in another reference system", file=path, column=GEOMETRY, expected="OGC:CRS84",
            found=system.to_string(), fix="write it in CRS84, or as GeoPackage, which is reprojected",
        )  # fmt: skip
    return True


def _is_overpass(path: Path) -> bool:
    """True if a JSON file is an answer of the Overpass API, which has ``elements`` where GeoJSON has ``features``."""
    with reading(path), path.open("rb") as stream:
        head = stream.read(4096)
    return b'"elements"' in head and b'"FeatureCollection"' not in head
