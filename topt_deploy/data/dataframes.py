"""Tables of other libraries: taken as Arrow, and answers given back in the kind that was given.

Nothing here imports pandas, polars or geopandas. Who passes one of their objects has loaded its library already.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from topt_deploy.errors import BadData, UsageError
from topt_deploy.storage.hashed_file import Held

from .columns import GEOMETRY, Given

KINDS = "a path, or a table of pyarrow, pandas, geopandas or polars"
GEOPARQUET = "1.1.0"


class ArrowStream(Protocol):
    """A table that other libraries can read as Arrow: of pyarrow, pandas, geopandas, polars, DuckDB and others.

    This is the PyCapsule interface of Arrow's C stream.
    """

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The table's batches as a capsule."""


class ArrowDataset(Protocol):
    """A dataset of ``pyarrow.dataset``."""

    def to_table(self) -> Any:
        """All of it in memory."""


def as_given(table: object, role: str) -> Given:
    """A table as the readers take it: the path of a Parquet file, or Arrow.

    Args:
        table: A path, a table of pyarrow, pandas, geopandas or polars, or a dataset. A pandas index with a name is a
            column like the others. The active geometry of a GeoDataFrame becomes the column ``geometry``.
        role: ``regions`` or ``mobility``, for messages.

    Raises:
        UsageError: If it is none of these.
        BadData: If a column holds several kinds of values, such as texts and numbers, and cannot be Arrow.
    """
    if isinstance(table, str | os.PathLike):
        return Path(table)
    if isinstance(table, pa.Table | Held):
        return table
    try:
        found = _as_arrow(table)
    except (pa.ArrowException, TypeError, OverflowError, UnicodeError) as error:
        raise BadData(
            f"a column holds several kinds of values ({error})", file=f"{role} table", found=_kind(table),
            fix="give every column one type: ids as text, counts as numbers",
        ) from error  # fmt: skip
    if found is None:
        lazy = hasattr(table, "collect")
        raise UsageError(
            f"the {role} are not a table", expected=KINDS, found=_kind(table),
            fix="collect() it first" if lazy else "read it into one of these first",
        )  # fmt: skip
    return found


def as_kind_of(given: object, table: pa.Table) -> Any:
    """A table in the kind of another one: what was a DataFrame is answered with a DataFrame of the same library.

    Args:
        given: What the user passed. Paths, datasets and streams are answered with a ``pyarrow.Table``.
        table: The answer.
    """
    if isinstance(given, pa.RecordBatch):
        return table.combine_chunks().to_batches()[0]
    if _is_a(given, "geopandas", "GeoDataFrame") and GEOMETRY in table.column_names:
        return _geo_frame(given, table)
    if _is_a(given, "pandas", "DataFrame"):
        return table.to_pandas()
    if _is_a(given, "polars", "DataFrame"):
        return sys.modules["polars"].from_arrow(table)
    return table


def _as_arrow(table: Any) -> pa.Table | None:
    if isinstance(table, pa.RecordBatch):
        return pa.Table.from_batches([table])
    if _is_a(table, "geopandas", "GeoDataFrame") and table.active_geometry_name is not None:
        return _geo_table(table)
    if _is_a(table, "pandas", "DataFrame"):
        return pa.Table.from_pandas(table)
    if _is_a(table, "polars", "DataFrame"):
        return table.to_arrow()
    if _is_a(table, "pyarrow.dataset", "Dataset"):
        return table.to_table()
    if hasattr(table, "__arrow_c_stream__") and not _is_a(table, "pandas", "Series"):
        return _without_views(pa.table(table))
    return None


def _is_a(table: object, module: str, name: str) -> bool:
    """True if a table is an instance of a library's class; never where the library is not loaded."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(table, kind)


def _kind(table: object) -> str:
    return f"{type(table).__module__}.{type(table).__qualname__}".removeprefix("builtins.")


def _without_views(table: pa.Table) -> pa.Table:
    """Text in Arrow's older layout, which all readers know."""
    older = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    fields = [field.with_type(older.get(field.type, field.type)) for field in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata)) if set(older) & set(table.schema.types) else table


def _geo_table(frame: Any) -> pa.Table:
    """A GeoDataFrame as a table with GeoParquet's metadata, its reference system as it is."""
    crs = frame.crs
    shape = {"encoding": "WKB", "geometry_types": [], "crs": None if crs is None else crs.to_json_dict()}
    described = {"version": GEOPARQUET, "primary_column": GEOMETRY, "columns": {GEOMETRY: shape}}
    table = pa.Table.from_pandas(frame.select_dtypes(exclude="geometry"))
    if GEOMETRY in table.column_names:
        table = table.drop_columns([GEOMETRY])
    table = table.append_column(GEOMETRY, pa.array(frame.geometry.to_wkb().tolist(), pa.binary()))
    return table.replace_schema_metadata({b"geo": json.dumps(described).encode()})


def _geo_frame(given: Any, table: pa.Table) -> Any:
    """The answer to a GeoDataFrame, its geometry under the name that it had."""
    library = sys.modules["geopandas"]
    shapes = library.GeoSeries.from_wkb(table.column(GEOMETRY).to_pylist(), crs=given.crs)
    frame = library.GeoDataFrame(table.drop_columns([GEOMETRY]).to_pandas(), geometry=shapes)
    return frame.rename_geometry(given.active_geometry_name) if given.active_geometry_name != GEOMETRY else frame
