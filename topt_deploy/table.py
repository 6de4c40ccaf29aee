"""A city's tables (docs/contracts.md) as arrays: read, checked, and put into canonical order.

Regions are sorted by ``region_id`` and flows by origin and destination before anything is computed, so that
neither the order of rows nor of columns can change a single bit of a result. This is the one way in, for
training and for serving. It uses pyarrow's core alone: ``pyarrow.compute`` or ``pyarrow.dataset`` would cost
the runtime more start-up time than everything else it does.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .errors import BadData, NoInput
from .parquet import ParquetFile

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Schema:
    """What a model reads of a city.

    Attributes:
        views: Count views, each with its categories in order.
        mobility: Whether flows between the regions are read.
        prompts: Prompt columns, each with its width H.
    """

    views: Mapping[str, tuple[str, ...]]
    mobility: bool
    prompts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Flows:
    """Directed flows between regions, sparse; no pair occurs twice.

    Attributes:
        origin, dest: int64 (E,), positions in :attr:`City.region_id`, sorted by origin and then destination.
        flow: float64 (E,), trips or persons, what the mobility view is made of.
        target: float64 (E,), what stage 1 learns to reconstruct; ``flow`` unless the table has ``target_flow``.
    """

    origin: Array
    dest: Array
    flow: Array
    target: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class City:
    """One city, regions sorted by id. N regions.

    Attributes:
        region_id: str (N,), sorted.
        input_row: int64 (N,), the input table's row of each region.
        city_id: The city's name, where the table or a ``city=…`` folder gives one.
        lonlat: float64 (N, 2), degrees, CRS84.
        views: float64 (N, C) counts per count view.
        flows: None where the schema reads none.
        prompts: float32 (N, H) per prompt column.
        encoders: Per prompt column, the encoder that its field metadata names, if any.
        labels: float64 (N,) per task; NaN marks a region to predict.
        geometry: The table's geometry column in input order, and its GeoParquet metadata, to be passed through.
        synthetic: Whether the table says of itself that it is made up.
    """

    region_id: Array
    input_row: Array
    city_id: str | None
    lonlat: Array
    views: Mapping[str, Array]
    flows: Flows | None
    prompts: Mapping[str, Array]
    encoders: Mapping[str, str]
    labels: Mapping[str, Array]
    geometry: tuple[pa.ChunkedArray, bytes | None] | None
    synthetic: bool

    def __len__(self) -> int:
        return len(self.region_id)


class _Source:
    """A table, or a Parquet file whose prompt columns are read one at a time, with the name that errors give it."""

    def __init__(self, table: Path | pa.Table, name: str, keep: Callable[[str], bool] = lambda column: True) -> None:
        self.path: Path | None = None
        self._file: ParquetFile | None = None
        if isinstance(table, pa.Table):
            self.table, self.name, self.names = table, name, table.column_names
            return
        self.path, self.name = Path(table), str(table)
        self._file = ParquetFile(self.path)
        self.names = [column for column in self._file.names if keep(column)]
        self.table = self._file.read([column for column in self.names if not column.startswith(PROMPT_PREFIX)])
        if GEOMETRY in self.names and b"geo" not in self.metadata:
            from .geometry import with_geo_key

            self.table = with_geo_key(self.table, self._file)

    def has(self, column: str) -> bool:
        return column in self.names

    def column(self, name: str) -> pa.ChunkedArray:
        if name in self.table.column_names or self._file is None:
            return self.table.column(name)
        return self._file.read([name]).column(name)

    def field(self, name: str) -> pa.Field:
        return (self.table.schema if self._file is None else self._file.schema).field(name)

    @property
    def metadata(self) -> dict[bytes, bytes]:
        return self.table.schema.metadata or {}


def infer_schema(
    regions: Path | pa.Table, *, views: Sequence[str], mobility: bool, prompts: Sequence[str] = ()
) -> Schema:
    """The schema of a training city: its categories as they stand in the table, sorted where they are columns.

    Args:
        regions: The regions table.
        views: Names of the count views to read.
        mobility: Whether flows will be read.
        prompts: Names of the prompt columns to read.

    Raises:
        BadData: If a view or prompt column is absent.
    """
    source = _Source(regions, "regions table")
    vocabularies: dict[str, tuple[str, ...]] = {}
    for view in views:
        vocabularies[view] = _categories(source, view)
        if not vocabularies[view]:
            raise BadData(
                f"view {view!r} is absent",
                file=source.name,
                expected=f"a list column {view!r}, or columns {view + '_<category>'!r}",
                found=f"columns {_some(source.names)}",
                fix="add the view, or leave it out of `views` in the configuration",
            )
    widths = {}
    for column in prompts:
        if not source.has(column):
            raise BadData(
                "prompt column is absent",
                file=source.name,
                column=column,
                found=f"prompt columns {[c for c in source.names if c.startswith(PROMPT_PREFIX)]}",
                fix="encode prompts first, or train without them: --set prompt4re.enabled=false",
            )
        widths[column] = _list_width(source, column)
    return Schema(views=vocabularies, mobility=mobility, prompts=widths)


def read_city(
    regions: Path | pa.Table,
    mobility: Path | pa.Table | None,
    schema: Schema,
    *,
    labels: Iterable[str] = (),
    id_col: str = REGION_ID,
) -> City:
    """Read and check one city.

    Args:
        regions: regions.parquet, or the table itself.
        mobility: mobility.parquet, or the table itself; None if the schema reads no flows.
        schema: What to read. A category too many or too few is an error.
        labels: Label columns to read (training only).
        id_col: The column that holds the region ids.

    Raises:
        BadData: Naming file, column, regions, both sides and what to do.
        NoInput: If a file is missing, or flows are needed and no mobility is given.
    """
    labels = tuple(labels)
    source = _Source(regions, "regions table", _wanted(schema, labels, id_col))
    ids = _region_ids(source, id_col)
    order = np.argsort(ids, kind="stable")
    sorted_ids = ids[order]
    flows = None
    if schema.mobility:
        if mobility is None:
            raise NoInput(
                "this model reads flows between regions, and no mobility table was given",
                file=source.name,
                expected="mobility.parquet with origin_id, dest_id, flow",
                fix="put mobility.parquet beside the regions, or name it with --mobility",
            )
        flows = _flows(_Source(mobility, "mobility table"), sorted_ids, source.name, _city_id(source))
    return City(
        region_id=sorted_ids,
        input_row=order,
        city_id=_city_id(source),
        lonlat=_lonlat(source, ids)[order],
        views={view: _view(source, ids, view, names)[order] for view, names in schema.views.items()},
        flows=flows,
        prompts={c: _lists(source, ids, c, width).astype(np.float32)[order] for c, width in schema.prompts.items()},
        encoders={column: name for column in schema.prompts if (name := _encoder(source, column))},
        labels={task: _label(source, ids, task)[order] for task in labels},
        geometry=_geometry(source),
        synthetic=source.metadata.get(b"synthetic") == b"true",
    )


def _wanted(schema: Schema, labels: Iterable[str], id_col: str) -> Callable[[str], bool]:
    """Whether a column is worth reading: texts and images of a large city stay on disk."""
    exact = {id_col, CITY_ID, "lon", "lat", GEOMETRY, *schema.views, *schema.prompts, *labels}
    prefixes = tuple(f"{view}_" for view in schema.views)
    return lambda column: column in exact or column.startswith(prefixes)


def _region_ids(source: _Source, id_col: str) -> Array:
    if not source.has(id_col):
        raise BadData(
            "the region ids are absent",
            file=source.name,
            column=id_col,
            found=f"columns {_some(source.names)}",
            fix="name the id column with --id-col",
        )
    column = source.column(id_col)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise BadData(
            "region ids are not text",
            file=source.name,
            column=id_col,
            expected="string (numbers lose leading zeros: '01073' becomes 1073)",
            found=str(column.type),
            fix="write the ids as strings, with their leading zeros",
        )
    if len(column) == 0:
        raise BadData("the table is empty", file=source.name, expected="at least one region", found="0 rows")
    raw = column.to_pylist()
    blank = [f"row {row}" for row, value in enumerate(raw) if not value or not value.strip()]
    if blank:
        raise BadData(
            "region ids are missing",
            file=source.name,
            column=id_col,
            ids=blank,
            expected="an id in every row",
        )
    ids = np.array(raw, dtype=np.str_)
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise BadData(
            "region ids occur more than once",
            file=source.name,
            column=id_col,
            ids=unique[counts > 1],
            expected="each region once",
            fix="keep one row per region; several cities go into several files",
        )
    return ids


def _city_id(source: _Source) -> str | None:
    if source.has(CITY_ID):
        cities = sorted({str(c) for c in source.column(CITY_ID).to_pylist() if c is not None})
        if len(cities) > 1:
            raise BadData(
                "holds several cities",
                file=source.name,
                column=CITY_ID,
                expected="one city per file (a city is predicted as a whole)",
                found=_some(cities),
                fix="write one file per city",
            )
        if cities:
            return cities[0]
    for part in reversed(source.path.parent.parts if source.path else ()):
        if part.startswith("city="):
            return part.removeprefix("city=")
    return None


def _lonlat(source: _Source, ids: Array) -> Array:
    if source.has("lon") and source.has("lat"):
        lonlat = np.stack([_floats(source, ids, "lon"), _floats(source, ids, "lat")], axis=1)
    elif source.has(GEOMETRY):
        from .geometry import centroids

        lonlat = centroids(source.table, source.name, ids)
    else:
        raise BadData(
            "the regions' positions are absent",
            file=source.name,
            expected="columns lon and lat in degrees, or a GeoParquet geometry",
            found=f"columns {_some(source.names)}",
        )
    outside = (np.abs(lonlat[:, 0]) > 180) | (np.abs(lonlat[:, 1]) > 90)
    if outside.any():
        raise BadData(
            "positions are not degrees",
            file=source.name,
            column="lon, lat",
            ids=ids[outside],
            expected="lon in [-180, 180], lat in [-90, 90] (CRS84)",
            found=", ".join(f"({x:g}, {y:g})" for x, y in lonlat[outside][:3]),
            fix="reproject to CRS84; the reference system is never guessed",
        )
    return lonlat


def _encoder(source: _Source, column: str) -> str | None:
    metadata = source.field(column).metadata or {}
    return metadata.get(b"encoder", b"").decode() or None


def _geometry(source: _Source) -> tuple[pa.ChunkedArray, bytes | None] | None:
    if not source.has(GEOMETRY):
        return None
    return source.column(GEOMETRY), source.metadata.get(b"geo")


def _categories(source: _Source, view: str) -> tuple[str, ...]:
    """Categories of a view: the list column's own names, or the sorted suffixes of its wide columns."""
    if source.has(view):
        width = _list_width(source, view)
        meta = source.field(view).metadata or {}
        names = json.loads(meta.get(b"categories", b"[]")) or [f"{i:02d}" for i in range(width)]
        if len(names) != width:
            raise BadData(
                "the list's category names do not fit its width", file=source.name, column=view,
                expected=f"{width} names", found=f"{len(names)} names",
            )  # fmt: skip
        return tuple(str(name) for name in names)
    prefix = f"{view}_"
    return tuple(sorted(c.removeprefix(prefix) for c in source.names if c.startswith(prefix)))


def _view(source: _Source, ids: Array, view: str, categories: Sequence[str]) -> Array:
    if source.has(view):
        values = _lists(source, ids, view, len(categories))
        names = _categories(source, view)
        unnamed = names == tuple(f"{i:02d}" for i in range(len(categories)))
        if not unnamed and set(names) == set(categories):
            values = values[:, [names.index(name) for name in categories]]
        elif not unnamed:
            _refuse_categories(source, view, categories, names)
        columns = [f"{view}[{name}]" for name in categories]
    else:
        have = _categories(source, view)
        if set(have) != set(categories):
            _refuse_categories(source, view, categories, have)
        columns = [f"{view}_{name}" for name in categories]
        values = np.stack([_floats(source, ids, column) for column in columns], axis=1)
    for position, column in enumerate(columns):
        _check_counts(source, ids, column, values[:, position])
    return values


def _refuse_categories(source: _Source, view: str, expected: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in expected if name not in set(found)]
    unknown = [name for name in found if name not in set(expected)]
    sides = [f"without {_some(missing)}"] * bool(missing) + [f"with unknown {_some(unknown)}"] * bool(unknown)
    raise BadData(
        f"the categories of view {view!r} are not the model's",
        file=source.name,
        column=_some([f"{view}_{name}" for name in (missing or unknown)]),
        expected=f"{len(expected)} categories: {_some(expected)}",
        found=f"{len(found)} categories, {' and '.join(sides)}",
        fix="count the same categories as in training; a category without any POI is a column of zeros",
    )


def _label(source: _Source, ids: Array, task: str) -> Array:
    if not source.has(task):
        raise BadData(
            "label column is absent",
            file=source.name,
            column=task,
            found=f"columns {_some(source.names)}",
            fix="add it (null where unknown), or choose tasks with --task",
        )
    values = _floats(source, ids, task, nulls=True)
    known = ~np.isnan(values)
    _check_counts(source, ids[known], task, values[known])
    if not known.any():
        raise BadData("no region has a label", file=source.name, column=task, expected="labels for some regions")
    return values


def _check_counts(source: _Source, ids: Array, column: str, values: Array) -> None:
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        raise BadData(
            "counts must be finite and not negative",
            file=source.name,
            column=column,
            ids=ids[bad],
            expected="a number ≥ 0",
            found=", ".join(f"{v:g}" for v in values[bad][:5]),
            fix="correct the values; write 0 where there is none",
        )


def _floats(source: _Source, ids: Array, column: str, nulls: bool = False) -> Array:
    """A numeric column as float64 (N,); nulls are an error unless allowed, and then NaN."""
    data = source.column(column)
    numeric = pa.types.is_integer(data.type) or pa.types.is_floating(data.type) or pa.types.is_decimal(data.type)
    if not numeric and not (nulls and pa.types.is_null(data.type)):
        raise BadData("not a number", file=source.name, column=column, expected="numbers", found=str(data.type))
    if data.null_count and not nulls:
        where = np.array(data.is_null().to_pylist())
        raise BadData(
            "values are missing", file=source.name, column=column, ids=ids[where],
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


def _list_width(source: _Source, column: str) -> int:
    """The width of a list column: of its type where fixed, else of its first list that is not null."""
    kind = source.field(column).type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise BadData("not a list", file=source.name, column=column, expected="a list of numbers", found=str(kind))
    return next((len(value) for value in source.column(column) if value.is_valid), 0)


def _lists(source: _Source, ids: Array, column: str, width: int) -> Array:
    """A list column as float64 or float32 (N, width), finite."""
    if not source.has(column):
        prompt = column.startswith(PROMPT_PREFIX)
        raise BadData(
            "column is absent",
            file=source.name,
            column=column,
            expected=f"a list of {width} numbers per region",
            found=f"columns {_some(source.names)}",
            fix="encode prompts with the encoder the model was trained with" if prompt else None,
        )
    found_width = _list_width(source, column)
    data = source.column(column)
    null = np.array(data.is_null().to_pylist()) if data.null_count else np.zeros(len(ids), bool)
    if pa.types.is_fixed_size_list(data.type):
        lengths = np.full(len(ids), found_width)
    else:
        lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in data.chunks])
    wrong = null | (lengths != width)
    if wrong.any():
        found = "null" if null.any() else f"lists of {', '.join(map(str, np.unique(lengths[wrong])[:5]))}"
        raise BadData(
            "list of the wrong length", file=source.name, column=column, ids=ids[wrong],
            expected=f"{width} numbers", found=found,
            fix="the columns must be those of the training data, in number and order",
        )  # fmt: skip
    parts = [_entries(chunk, width) for chunk in data.chunks]
    kind = parts[0].type
    if any(p.null_count for p in parts) or not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise BadData(
            "list entries are missing or not numbers", file=source.name, column=column,
            expected="numbers without nulls", found=f"{kind}, {sum(p.null_count for p in parts)} nulls",
        )  # fmt: skip
    values = np.concatenate([p.to_numpy(zero_copy_only=False) for p in parts]).reshape(len(ids), width)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise BadData(
            "list entries are NaN or infinite", file=source.name, column=column, ids=ids[~finite],
            expected="finite numbers", fix="compute them again",
        )  # fmt: skip
    return values if values.dtype == np.float32 else values.astype(np.float64)


def _entries(chunk: pa.Array, width: int) -> pa.Array:
    """The entries of a chunk of lists, none of them null and all of one width; flatten() would import compute."""
    fixed = pa.types.is_fixed_size_list(chunk.type)
    start = chunk.offset * width if fixed else chunk.offsets[0].as_py()
    return chunk.values.slice(start, len(chunk) * width)


def _flows(source: _Source, sorted_ids: Array, regions_name: str, city_id: str | None) -> Flows:
    columns = {}
    for role, aliases in FLOW_COLUMNS.items():
        present = [alias for alias in aliases if source.has(alias)]
        if len(present) != 1:
            raise BadData(
                f"expected exactly one {role} column",
                file=source.name,
                expected=f"one of {', '.join(aliases)}",
                found=f"columns {_some(source.names)}",
            )
        columns[role] = present[0]
    if city_id is not None and source.has(CITY_ID):
        mine = [c == city_id for c in source.column(CITY_ID).to_pylist()]
        if not all(mine):  # a table of this city alone is spared the import of pyarrow.compute
            source = _Source(source.table.filter(pa.array(mine)), source.name)
    ends = {}
    for role in ("origin_id", "dest_id"):
        data = source.column(columns[role])
        if pa.types.is_dictionary(data.type):
            data = data.cast(data.type.value_type)
        if not (pa.types.is_string(data.type) or pa.types.is_large_string(data.type)):
            raise BadData(
                "region ids are not text", file=source.name, column=columns[role], expected="string",
                found=str(data.type), fix=f"write the ids as they stand in {regions_name}",
            )  # fmt: skip
        names = np.array(["" if v is None else v for v in data.to_pylist()], dtype=np.str_)
        position = np.minimum(np.searchsorted(sorted_ids, names), len(sorted_ids) - 1)
        unknown = sorted_ids[position] != names
        if unknown.any():
            raise BadData(
                "names regions that the regions table does not have",
                file=source.name,
                column=columns[role],
                ids=np.unique(names[unknown]),
                expected=f"ids of {regions_name}, such as {sorted_ids[0]!r}",
                fix="drop those flows, or add the regions",
            )
        ends[role] = position
    pairs = np.stack([ends["origin_id"], ends["dest_id"]], axis=1)
    flow = _flow_values(source, columns["flow"], sorted_ids, pairs)
    target = _flow_values(source, TARGET_FLOW, sorted_ids, pairs) if source.has(TARGET_FLOW) else flow
    # Sorted by value as well: duplicates are then summed in an order that no shuffling of rows changes.
    order = np.lexsort((target, flow, pairs[:, 1], pairs[:, 0]))
    keys, start = np.unique(pairs[order, 0] * len(sorted_ids) + pairs[order, 1], return_index=True)
    if len(keys) == 0:
        raise BadData("no flow at all", file=source.name, expected="at least one row", found="0 rows")
    return Flows(
        origin=keys // len(sorted_ids),
        dest=keys % len(sorted_ids),
        flow=np.add.reduceat(flow[order], start),
        target=np.add.reduceat(target[order], start),
    )


def _flow_values(source: _Source, column: str, sorted_ids: Array, pairs: Array) -> Array:
    origins = sorted_ids[pairs[:, 0]]
    values = _floats(source, origins, column)
    _check_counts(source, origins, column, values)
    return values


def _some(names: Sequence[str], limit: int = 8) -> str:
    """A short listing of names."""
    names = list(names)
    text = ", ".join(repr(str(name)) for name in names[:limit]) or "none"
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")
