"""Parquet files, local and small: read by column, written whole.

This works on the classes beneath ``pyarrow.parquet``, because importing that module also imports file systems of
four clouds and TLS. Peak memory of `topt-run predict`, as a multiple of importing its libraries, is 1.39 as it is and
1.59 with ``pyarrow.parquet``, where 1.5 is the most allowed; processor time is 1.19 and 1.21 (best of 12 interleaved
runs each, two cores of an AMD EPYC, 2026-11-28). tests/data/test_parquet.py holds both to be the same on the versions
that are tested.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow._parquet import ParquetReader, ParquetWriter

from topt_deploy.errors import BadData, OutOfMemory
from topt_deploy.hardening.parquet_memory import Footer, memory, read_footer
from topt_deploy.storage.atomic import atomic_file
from topt_deploy.storage.hashed_file import Held
from topt_deploy.storage.os_errors import check_file, reading

LOOKED_AT_BYTES = 4096
OTHERS = (
    (b"SQLite format 3", "a GeoPackage or other SQLite database"),
    (b"PK\x03\x04", "a zip file, such as a spreadsheet or a zipped shapefile"),
    (b"\x00\x00\x27\x0a", "a shapefile"),
    (b"ARROW1", "a Feather file (Arrow's own format)"),
    (b"ORC", "an ORC file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet (.xls)"),
    (b"\xff\xfe", "text in UTF-16, as spreadsheets write it"),
    (b"fgb\x03", "FlatGeobuf"),
    (b"\x89HDF", "an HDF5 file"),
    (b"Obj\x01", "an Avro file"),
    (b"<", "XML or HTML, such as a page that says why there is no file"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file: run git lfs pull"),
)
"""Formats that users give in place of Parquet, by their first bytes."""
COLUMN_LIMIT = 10_000
FOOTER_LIMIT_BYTES = 8 << 20
"""Of what describes the columns: a hundred times that of a wide table."""
MEMORY_FREE_BYTES = 1 << 30
WRITTEN_AT_ONCE_BYTES = 1 << 18
PIECE_ENTRIES, PIECE_ROWS = 1 << 16, 16
"""Of vectors that are read at once: so many numbers, or rows if these are more."""
MEMORY_RATIO = 200
"""A file may take so much memory, or so many times its size, whichever is more: vectors take as much as they are, an
honest table of flows up to a hundred times (an id in the memory has 70 bytes, and less than one in a sorted file)."""


class ParquetFile:
    """An open Parquet file.

    Args:
        source: A path, a file that is held, or the bytes of one.
        name: Its name in errors; the path by default.
        coded: Columns that are read as codes of a dictionary, where they are text.

    Attributes:
        held: True if its bytes are in memory.
        size: In bytes.

    Raises:
        NoInput, NoPermission: If the file is missing or may not be read.
        BadData: If it is not Parquet, is damaged, or is made to take more memory than a table has need of.
    """

    def __init__(self, source: Path | Held | bytes, name: str | None = None, *, coded: Collection[str] = ()) -> None:
        self.held = not isinstance(source, Path)
        if isinstance(source, Held):
            self.held = source.data is not None
            name = name or str(source.path)
            source = source.path if source.data is None else source.data
        self.name = name or (str(source) if isinstance(source, Path) else "Parquet data")
        self._reader = ParquetReader()
        self._footer: Footer | None = None
        self.size = 0
        if isinstance(source, Path):
            check_file(source)  # the operating system's own reasons first: Arrow words them differently
        with self._errors():
            # No pre-buffering: it starts a pool of I/O threads for a file that is read once from a local disk.
            # Names are bytes to the system: Arrow would have them in UTF-8.
            self._file = pa.OSFile(os.fsencode(source)) if isinstance(source, Path) else pa.BufferReader(source)
            self.size = self._file.size()
            self._check_footer()
            self._open()
            about = self._reader.metadata
            if about.num_columns > COLUMN_LIMIT:
                raise self._too_large("columns", COLUMN_LIMIT, about.num_columns)
            self._leaves = [path[0] for path in self._reader.column_paths]
            if codes := [i for i, name in enumerate(self._leaves) if name in coded]:
                self._reader = ParquetReader()
                self._open(read_dictionary=codes, metadata=about)
            self.schema: pa.Schema = self._reader.schema_arrow
            self.names: list[str] = list(self.schema.names)
            self.metadata: dict[bytes, bytes] = dict(about.metadata or {})
            self.rows: int = about.num_rows

    def read(self, columns: Sequence[str] | None = None, *, checked: bool = False) -> pa.Table:
        """Read all columns, or those named; ``checked`` if their memory is within a limit that several files share."""
        chosen = set(self.names if columns is None else columns)
        if not checked:
            self.check_memory(chosen, memory_limit(self.size))
        with self._errors():
            vectors = {name: leaf for name, leaf in self._vectors().items() if name in chosen}
            others = [i for i, name in enumerate(self._leaves) if name in chosen and name not in vectors]
            table = self._reader.read_all(column_indices=others, use_threads=False)
            if vectors:
                table = self._with_vectors(table, vectors)
            for column in table.itercolumns():
                if "dictionary<" in str(column.type):  # whose codes Arrow takes as they are, wherever they lead
                    column.validate(full=True)
            return table

    def _vectors(self) -> dict[str, int]:
        """The columns of lists of numbers, each with the number of its leaf."""
        leaves = {name: i for i, name in enumerate(self._leaves)}
        times = Counter(self.names)
        return {f.name: leaves[f.name] for f in self.schema if times[f.name] == 1 and _is_vector(f.type)}

    def _with_vectors(self, table: pa.Table, vectors: Mapping[str, int]) -> pa.Table:
        """The table with its columns of vectors, in the file's order."""
        others = list(zip(table.schema, table.itercolumns(), strict=True))[::-1]
        fields, columns = [], []
        for field in self.schema:
            if field.name in vectors:
                fields.append(field)
                columns.append(pa.chunked_array(self._in_pieces(vectors[field.name]), field.type))
            elif others and others[-1][0].name == field.name:
                fields.append(others[-1][0])
                columns.append(others.pop()[1])
        return pa.table(columns, schema=pa.schema(fields, table.schema.metadata))

    def _in_pieces(self, leaf: int) -> list[pa.Array]:
        """A column of vectors, some rows at a time: all at once take five times what they are."""
        groups = (self._footer or read_footer(self._file))[0]
        width = sum(group[leaf].values for group in groups if leaf < len(group)) // max(1, self.rows)
        pieces = self._reader.iter_batches(
            max(PIECE_ROWS, PIECE_ENTRIES // max(1, width)), row_groups=range(self._reader.num_row_groups),
            column_indices=[leaf], use_threads=False,
        )  # fmt: skip
        return [piece.column(0) for piece in pieces]

    def _open(self, **more: Any) -> None:
        self._reader.open(self._file, pre_buffer=False, page_checksum_verification=True, **more)

    def _check_footer(self) -> None:
        size = self.size
        length = int.from_bytes(self._file.read_at(4, size - 8), "little") if size >= 8 else 0
        if length > FOOTER_LIMIT_BYTES and length <= size:
            raise self._too_large("bytes that describe the columns", FOOTER_LIMIT_BYTES, length)

    def check_memory(self, columns: Collection[str], limit: int, total: int = 0) -> int:
        """The bytes of memory that columns take, added to ``total``.

        Raises:
            BadData: If it is more than ``limit``.
        """
        with self._errors():
            if self._footer is None:
                self._footer = read_footer(self._file)
            kinds = {field.name: field.type for field in self.schema}
            for index, name in enumerate(self._leaves):
                if name in columns:
                    total += memory(self._file, self._footer, index, kinds[name], limit)
                if total > limit:
                    raise self._too_large("bytes of memory", limit, total)
        return total

    def _too_large(self, what: str, limit: int, found: int) -> BadData:
        return BadData(
            "the file is small and would take a great deal of memory" if what.endswith("memory") else "too large",
            file=self.name,
            expected=f"at most {limit:,} {what}",
            found=f"{found:,} or more",
            fix="if it is what it should be, write it without dictionary or delta encoding, or in parts",
        )

    def logical_types(self) -> dict[str, str]:
        """Parquet's own logical type of every flat column, as JSON: what Arrow's schema does not show."""
        schema = self._reader.metadata.schema
        columns = [schema.column(i) for i in range(len(schema))]
        return {column.path: column.logical_type.to_json() for column in columns}

    def _other(self) -> str | None:
        """The format of the file by its first bytes, where that is not Parquet."""
        try:
            head = self._file.read_at(LOOKED_AT_BYTES, 0)
        except (pa.ArrowException, OSError, ValueError, AttributeError):
            return None
        if head.startswith(b"PAR1"):
            return None
        found = next((name for magic, name in OTHERS if head.startswith(magic)), None)
        if found is not None:
            return found
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if text[:1] in (b"{", b"["):
            return "GeoJSON or other JSON"
        first = text.partition(b"\n")[0]
        plain = b"\0" not in head and not any(byte < 9 for byte in head)
        return "a CSV table" if plain and any(mark in first for mark in (b",", b";", b"\t")) else None

    def _honest(self, error: MemoryError) -> bool:
        """Tell if the memory that could not be had is no more than the file may take: else its own sizes lie."""
        asked = max(map(int, re.findall(r"\d+", str(error))), default=0)
        return asked <= memory_limit(self.size)

    def native_geometry(self) -> list[str]:
        """Columns of Parquet's own types GEOMETRY and GEOGRAPHY."""
        binary = {field.name for field in self.schema if field.type in (pa.binary(), pa.large_binary())}
        if not binary:
            return []
        kinds = self.logical_types()
        return [name for name in self.names if name in binary and '"Geo' in kinds.get(name, "")]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Arrow reports a damaged file as one of its own errors, or as an OSError without a number."""
        try:
            yield
        except (pa.ArrowException, EOFError, OSError, ValueError, MemoryError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                with reading(Path(self.name)):
                    raise
            if isinstance(error, MemoryError) and self._honest(error):
                raise OutOfMemory(self.name) from error
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if other := self._other():
                raise BadData(
                    f"not a Parquet file, but {other}", file=self.name, expected="Parquet", found=other,
                    fix="convert it, with the ids as text; GDAL, DuckDB, pandas and polars write Parquet",
                ) from error  # fmt: skip
            raise BadData(
                f"not a whole Parquet file ({reason})",
                file=self.name,
                expected="Parquet",
                fix="write it again; a download or copy may have been cut off",
            ) from error


def _is_vector(kind: pa.DataType) -> bool:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return listed and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def memory_limit(size: int) -> int:
    """The bytes of memory that so many bytes of Parquet may take."""
    return max(MEMORY_FREE_BYTES, MEMORY_RATIO * size)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file, or those of ``columns`` that it has."""
    return ParquetFile(path).read(columns)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table atomically (:func:`save_parquet`)."""
    with atomic_file(path) as temporary:
        save_parquet(temporary, table)


def save_parquet(path: Path, table: pa.Table) -> None:
    """Write a table; the same table gives the same bytes.

    Only text is dictionary-encoded: prompt vectors do not repeat, and reading them back is three times as fast.
    """
    text = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    with pa.OSFile(os.fsencode(path), "wb") as file, pa.BufferedOutputStream(file, WRITTEN_AT_ONCE_BYTES) as stream:
        writer = ParquetWriter(
            stream,
            table.schema,
            compression="snappy",
            use_dictionary=text,
            version="2.6",
            writer_engine_version="V2",
            store_schema=True,
            write_page_checksum=True,
        )
        writer.write_table(table)
        writer.close()
