"""A table in several Parquet files, as Spark writes it (:mod:`topt_deploy.storage.table_parts`), read like one file."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from topt_deploy.errors import BadData
from topt_deploy.storage.hashed_file import Held
from topt_deploy.storage.table_parts import table_files

from .parquet import ParquetFile, memory_limit

GEO = b"geo"
IGNORED = (b"pandas", b"ARROW:schema", b"org.apache.spark.version")
"""Metadata that writers keep for themselves: it may differ from part to part, and is not read."""


class ParquetParts:
    """A table whose parts are Parquet files with the same columns, joined in their order.

    A part is open while it is read, and no longer: there may be more of them than files that a process may open.

    Args:
        source: The folder, or what is held of it.
        coded: As of :class:`ParquetFile`.

    Attributes:
        held, name, schema, names, metadata, rows: As of :class:`ParquetFile`.

    Raises:
        NoInput, NoPermission: If there is no part, or one may not be read.
        BadData: If a part is no Parquet, or has other columns than the first.
    """

    def __init__(self, source: Path | Held, *, coded: Collection[str] = ()) -> None:
        folder = source.path if isinstance(source, Held) else source
        self.name = str(folder)
        self._parts: Sequence[Path | Held] = source.parts if isinstance(source, Held) else table_files(folder)
        self._coded = coded
        first: ParquetFile | None = None
        self.rows = self._size = 0
        self.held, self._types = True, dict[str, pa.DataType]()
        described: list[dict[bytes, bytes]] = []
        for file in self._files():
            first = first or file
            self._check(file, first)
            for name, kind in zip(file.names, file.schema.types, strict=True):
                if not pa.types.is_null(kind):  # of a part without a value, where the writer takes types from values
                    self._types.setdefault(name, kind)
            self.rows += file.rows
            self._size += file.size
            self.held = self.held and file.held
            described.append(file.metadata)
        assert first is not None
        if twice := [name for name in first.names if first.names.count(name) > 1]:
            raise BadData("a column occurs twice", file=first.name, column=twice[0], expected="each name once")
        self._first = first
        self.names = first.names
        self.metadata = self._joined(described)
        fields = [field.with_type(self._types.get(field.name, field.type)) for field in first.schema]
        self.schema = pa.schema(fields, self.metadata)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all columns, or those named."""
        wanted = self.names if columns is None else columns
        chosen = [name for name in self.names if name in set(wanted)]
        limit, total = memory_limit(self._size), 0
        for file in self._files():
            total = file.check_memory(chosen, limit, total)
        schema = pa.schema([self.schema.field(name) for name in chosen], self.metadata)
        tables = [self._cast(file.read(chosen, checked=True), schema) for file in self._files()]
        return pa.concat_tables(tables).combine_chunks()

    def logical_types(self) -> dict[str, str]:
        """As of :class:`ParquetFile`, of the first part."""
        return self._first.logical_types()

    def native_geometry(self) -> list[str]:
        """As of :class:`ParquetFile`, of the first part."""
        return self._first.native_geometry()

    def _files(self) -> Iterator[ParquetFile]:
        for part in self._parts:
            yield ParquetFile(part, coded=self._coded)

    def _check(self, file: ParquetFile, first: ParquetFile) -> None:
        """Refuse a part whose columns are not those of the first."""
        if sorted(file.names) != sorted(first.names):
            other = sorted(set(file.names) ^ set(first.names)) or file.names
            raise BadData(
                "the parts of a table have different columns", file=file.name, column=other[0],
                expected=f"the columns of {first.name}", found=f"{len(file.names)} columns",
                fix="write the table again into an empty folder; old parts may have stayed",
            )  # fmt: skip
        for field in file.schema:
            known = self._types.get(field.name, field.type)
            if field.type != known and not pa.types.is_null(field.type):
                raise BadData(
                    "the parts of a table have different types", file=file.name, column=field.name,
                    expected=str(known), found=str(field.type), fix="write the table again with one type per column",
                )  # fmt: skip
            mine, theirs = (_own(f.metadata) for f in (field, first.schema.field(field.name)))
            if mine != theirs:
                raise BadData(
                    "the parts of a table say different things of a column", file=file.name, column=field.name,
                    expected=f"the metadata that {first.name} has", fix="write the table again from one source",
                )  # fmt: skip

    def _joined(self, described: Sequence[dict[bytes, bytes]]) -> dict[bytes, bytes]:
        """The metadata of all parts, where GeoParquet's extent is that of all of them."""
        told = {key: value for key, value in described[0].items() if key not in IGNORED}
        for other in described[1:]:
            differ = {key for key in told.keys() | other.keys() if told.get(key) != other.get(key)} - {*IGNORED}
            if GEO in differ and GEO in told and GEO in other:
                told[GEO] = _geo(told[GEO], other[GEO], self.name)
                differ -= {GEO}
            if differ:
                raise BadData(
                    "the parts of a table are described differently", file=self.name,
                    found=", ".join(sorted(key.decode(errors="replace") for key in differ)),
                    expected="one description", fix="write the table again from one source",
                )  # fmt: skip
        return told

    def _cast(self, table: pa.Table, schema: pa.Schema) -> pa.Table:
        """A part with the types of all, where its own are of columns without a value."""
        columns = [
            table.column(f.name) if table.schema.field(f.name).type == f.type else pa.nulls(len(table), f.type)
            for f in schema
        ]
        return pa.table(columns, schema=schema)


def open_table(source: Path | Held, *, coded: Collection[str] = ()) -> ParquetFile | ParquetParts:
    """A table's Parquet file or files; the arguments and errors are those of :class:`ParquetFile`."""
    several = bool(source.parts) if isinstance(source, Held) else source.is_dir()
    return ParquetParts(source, coded=coded) if several else ParquetFile(source, coded=coded)


def _own(metadata: dict[bytes, bytes] | None) -> dict[bytes, bytes]:
    """A field's metadata without what the writer numbers by itself."""
    return {key: value for key, value in (metadata or {}).items() if key != b"PARQUET:field_id"}


def _geo(one: bytes, other: bytes, name: str) -> bytes:
    """GeoParquet's key of two parts together: the extent and kinds of shapes of both, all else the same.

    Raises:
        BadData: If all else is not the same.
    """
    try:
        joined, added = json.loads(one), json.loads(other)
        for column, facts in joined["columns"].items():
            more = added["columns"][column]
            facts["geometry_types"] = sorted({*facts["geometry_types"], *more["geometry_types"]})
            more["geometry_types"] = facts["geometry_types"]
            boxes = [facts.pop("bbox", None), more.pop("bbox", None)]
            if all(boxes) and len(boxes[0]) == len(boxes[1]):
                facts["bbox"] = more["bbox"] = _extent(*boxes)
        if joined == added:
            return json.dumps(joined).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise BadData(
        "the parts of a table describe their geometry differently", file=name, column=GEO.decode(),
        expected="one reference system and encoding", fix="write the table again from one source",
    )  # fmt: skip


def _extent(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    half = len(one) // 2
    low = [min(pair) for pair in zip(one[:half], other[:half], strict=True)]
    return low + [max(pair) for pair in zip(one[half:], other[half:], strict=True)]
