"""A city's tables (docs/reference/files.md) as arrays: read, checked, and put into canonical order.

Regions are sorted by ``region_id`` and flows by origin and destination before anything is computed, so that
neither the order of rows nor of columns can change a single bit of a result. This is the one way in, for
training and for serving.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.errors import BadData, BadRows, NoInput
from topt_deploy.storage.table_parts import is_city_partition

from .categories import find_categories, read_view
from .columns import (
    CITY_ID,
    PROMPT_PREFIX,
    REGION_ID,
    Given,
    TableReader,
    canonical,
    check_counts,
    checked_ids,
    city_names,
    floats,
    list_width,
    lists,
    some,
    strings,
)
from .coordinates import described_geometry, read_lonlat
from .flows import Flows, read_flows

Array = np.ndarray[Any, Any]
REGION_LIMIT = 2_000_000
"""Regions of one city. More than that are several cities, or nobody's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Schema:
    """The tables and columns of a city that a model reads.

    Attributes:
        views: Count views, each with its categories in order.
        mobility: True if flows between the regions are read.
        prompts: Prompt columns, each with its width H.
        places: The default's head sees where a region lies in its city, and where its flows lead to. Off for a model of
            several cities: those are places of other cities.
    """

    views: Mapping[str, tuple[str, ...]]
    mobility: bool
    prompts: Mapping[str, int] = field(default_factory=dict)
    places: bool = True


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
        encoders, templates, precisions: Per prompt column, the encoder, the hash of the template and the precision that
            its field metadata names, if any.
        labels: float64 (N,) per task; NaN marks a region to predict.
        geometry: The table's geometry column in input order, and its GeoParquet metadata, to be passed through.
        synthetic: True if the table says of itself that it is made up.
        parts: The cities that this one stands for (:func:`.cities.stack_cities`), without their labels, one after the
            other in its rows; empty for a city that is one.
    """

    region_id: Array
    input_row: Array
    city_id: str | None
    lonlat: Array
    views: Mapping[str, Array]
    flows: Flows | None
    prompts: Mapping[str, Array]
    encoders: Mapping[str, str]
    templates: Mapping[str, str]
    precisions: Mapping[str, str]
    labels: Mapping[str, Array]
    geometry: tuple[pa.ChunkedArray, bytes | None] | None
    synthetic: bool
    parts: tuple["City", ...] = ()

    def __len__(self) -> int:
        return len(self.region_id)

    @property
    def blocks(self) -> list[slice]:
        """The rows of every city that this one stands for; all rows of a city that is one."""
        ends = np.cumsum([len(part) for part in self.parts or (self,)]).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    @property
    def part(self) -> Array:
        """The number of the city that each region is of, int64 (N,)."""
        return np.repeat(np.arange(len(self.blocks)), [block.stop - block.start for block in self.blocks])


def infer_schema(regions: Given, *, views: Sequence[str], mobility: bool, prompts: Sequence[str] = ()) -> Schema:
    """The schema of a training city: its categories as they stand in the table, sorted where they are columns.

    Args:
        regions: The regions table.
        views: Names of the count views to read.
        mobility: True if flows will be read.
        prompts: Names of the prompt columns to read.

    Raises:
        BadData: If a view or prompt column is absent.
    """
    source = TableReader(regions, BadRows.REGIONS)
    vocabularies: dict[str, tuple[str, ...]] = {}
    for view in views:
        vocabularies[view] = find_categories(source, view)
        if not vocabularies[view]:
            raise BadData(
                f"view {view!r} is absent",
                file=source.name,
                expected=f"a list column {view!r}, or columns {view + '_<category>'!r}",
                found=f"columns {some(source.everything)}",
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
        widths[column] = list_width(source, column)
    return Schema(views=vocabularies, mobility=mobility, prompts=widths)


def read_city(
    regions: Given,
    mobility: Given | None,
    schema: Schema,
    *,
    labels: Iterable[str] = (),
    id_col: str = REGION_ID,
    city_id: str | None = None,
) -> City:
    """Read and check one city.

    Args:
        regions: regions.parquet, or the table itself.
        mobility: mobility.parquet, or the table itself; None if the schema reads no flows.
        schema: The columns to read. A category too many or too few is an error.
        labels: Label columns to read (training only).
        id_col: The column that holds the region ids.
        city_id: The name of a city whose table does not say, and whose file lies in no ``city=…`` folder.

    Raises:
        BadData: Naming file, column, regions, both sides and what to do.
        NoInput: If a file is missing, or flows are needed and no mobility is given.
    """
    labels = tuple(labels)
    source = TableReader(regions, BadRows.REGIONS, _wanted(schema, labels, id_col))
    ids = _region_ids(source, id_col)
    city_id = _city_id(source) or city_id
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
        flows = read_flows(TableReader(mobility, BadRows.MOBILITY), sorted_ids, source.name, city_id)
    return City(
        region_id=sorted_ids,
        input_row=order,
        city_id=city_id,
        lonlat=read_lonlat(source, ids)[order],
        views={view: read_view(source, ids, view, names)[order] for view, names in schema.views.items()},
        flows=flows,
        prompts=_prompts(source, ids, order, schema),
        encoders=_made_with(source, schema, b"encoder"),
        templates=_made_with(source, schema, b"template"),
        precisions=_made_with(source, schema, b"precision"),
        labels={task: _label(source, ids, task)[order] for task in labels},
        geometry=described_geometry(source),
        synthetic=source.metadata.get(b"synthetic") == b"true",
    )


def add_prompts(city: City, regions: Given, schema: Schema) -> City:
    """A city with the prompt columns of its regions table, where all else of the table has been read already.

    Args:
        city: The city, read from the same rows.
        regions: The table with the prompt columns.
        schema: The inputs of the model.

    Raises:
        BadData: If a prompt column is absent, or holds something else than vectors of its width.
    """
    source = TableReader(regions, BadRows.REGIONS, lambda column: column in schema.prompts)
    ids, order = np.empty_like(city.region_id), city.input_row
    ids[order] = city.region_id
    return replace(
        city,
        prompts=_prompts(source, ids, order, schema),
        encoders=_made_with(source, schema, b"encoder"),
        templates=_made_with(source, schema, b"template"),
        precisions=_made_with(source, schema, b"precision"),
    )


def _prompts(source: TableReader, ids: Array, order: Array, schema: Schema) -> dict[str, Array]:
    """The prompt columns, float32 (N, H) each, the regions in this order; not copied where they are in it already."""
    sorted_already = bool((order == np.arange(len(order))).all())
    found = {}
    for column, width in schema.prompts.items():
        vectors = lists(source, ids, column, width).astype(np.float32, copy=False)
        found[column] = vectors if sorted_already else vectors[order]
    return found


def _wanted(schema: Schema, labels: Iterable[str], id_col: str) -> Callable[[str], bool]:
    """True for columns that must be read: texts and images of a large city stay on disk."""
    exact = {id_col, CITY_ID, "lon", "lat", *schema.views, *schema.prompts, *labels}
    prefixes = tuple(f"{view}_" for view in schema.views)
    return lambda column: column in exact or column.startswith(prefixes)


def _region_ids(source: TableReader, id_col: str) -> Array:
    if not source.has(id_col):
        raise BadData(
            "the region ids are absent",
            file=source.name,
            column=id_col,
            found=f"columns {some(source.everything)}",
            fix="name the id column with --id-col",
        )
    raw = strings(source, id_col, fix="write the ids as strings, with their leading zeros")
    if not raw:
        raise BadData("the table is empty", file=source.name, expected="at least one region", found="0 rows")
    if len(raw) > REGION_LIMIT:
        raise BadData(
            "too many regions for one city", file=source.name, expected=f"at most {REGION_LIMIT:,}",
            found=f"{len(raw):,}", fix="write one file per city",
        )  # fmt: skip
    blank = np.array([not value or not value.strip() for value in raw])
    if blank.any():
        source.refuse(
            "region ids are missing",
            blank,
            "missing_id",
            column=id_col,
            ids=[f"row {row}" for row in np.flatnonzero(blank)],
            expected="an id in every row",
        )
    ids = checked_ids(source, id_col, raw)
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        source.refuse(
            "region ids occur more than once",
            np.isin(ids, unique[counts > 1]),
            "duplicate_id",
            column=id_col,
            ids=unique[counts > 1],
            expected="each region once",
            fix="keep one row per region; several cities go into several files",
        )
    return ids


def _city_id(source: TableReader) -> str | None:
    if source.has(CITY_ID):
        cities = sorted(set(filter(None, city_names(source)[0])))
        if len(cities) > 1:
            raise BadData(
                "holds several cities",
                file=source.name,
                column=CITY_ID,
                expected="one city per file (a city is predicted as a whole)",
                found=some(cities),
                fix="write one file per city",
            )
        if cities:
            return cities[0]
    return None if source.path is None else hive_city(source.path)


def hive_city(file: Path) -> str | None:
    """The city that a Hive partition, a folder ``city=…`` or ``city_id=…`` above the file, is of.

    A relative path means the same as its absolute one: the folder that a command is started in counts. So does the
    folder of a table in parts itself.
    """
    whole = Path(os.path.abspath(file))
    folders = reversed(whole.parts if os.path.isdir(whole) else whole.parent.parts)
    name = next((folder.partition("=")[2] for folder in folders if is_city_partition(folder)), None)
    if name is not None and "%" in name:  # as Hive escapes what a folder's name cannot hold
        from urllib.parse import unquote

        name = unquote(name)
    return None if name is None else canonical(name)


def _made_with(source: TableReader, schema: Schema, what: bytes) -> dict[str, str]:
    """Encoder, template and precision that the metadata of the prompt columns name, if any."""
    said = {column: (source.field(column).metadata or {}).get(what, b"") for column in schema.prompts}
    return {column: name.decode(errors="replace") for column, name in said.items() if name}


def _label(source: TableReader, ids: Array, task: str) -> Array:
    if not source.has(task):
        raise BadData(
            "label column is absent",
            file=source.name,
            column=task,
            found=f"columns {some(source.everything)}",
            fix="add it (null where unknown), or choose tasks with --task",
        )
    values = floats(source, ids, task, nulls=True)
    known = ~np.isnan(values)
    check_counts(source, ids[known], task, values[known])
    if not known.any():
        raise BadData("no region has a label", file=source.name, column=task, expected="labels for some regions")
    return values
