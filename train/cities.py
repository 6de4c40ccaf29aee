"""Reading the cities that a model is trained on: one, or several with one vocabulary."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from topt_deploy.data.cities import stack_cities
from topt_deploy.data.city import City, Schema, hive_city, infer_schema, read_city
from topt_deploy.data.columns import REGION_ID, some
from topt_deploy.data.parquet_parts import open_table
from topt_deploy.errors import UsageError
from topt_deploy.storage.hashed_file import Held


@dataclass(frozen=True, kw_only=True)
class CityFiles:
    """A city's tables.

    Attributes:
        folder: Its folder, whose name is the name of a city among several.
        regions, mobility: The tables; without the second no flows are read.
    """

    folder: Path
    regions: Path | Held
    mobility: Path | Held | None


def read_cities(
    files: Sequence[CityFiles],
    *,
    views: Sequence[str],
    prompts: Sequence[str],
    labels: Iterable[str],
    say: Callable[[str], None],
) -> tuple[City, Schema]:
    """One city as it stands, or several as one (:func:`topt_deploy.data.cities.stack_cities`).

    The first city's categories are everyone's. They are found by name, in whatever order a table has them.

    Args:
        files: The cities.
        views, prompts: Columns to read.
        labels: Label columns, which every city has.
        say: Told which regions got a position that is not their own.

    Raises:
        UsageError: If two cities have one name.
        BadData: If a city's categories are not the first's, naming those that differ, or a table is wrong.
    """
    labels, mobility = tuple(labels), files[0].mobility is not None
    schema = infer_schema(files[0].regions, views=views, mobility=mobility, prompts=prompts)
    if len(files) == 1:
        return read_placed(files[0].regions, files[0].mobility, schema, labels=labels, say=say), schema
    cities: dict[str, City] = {}
    for own in files:
        name = own.folder.resolve().name
        if name in cities:
            raise UsageError(
                "two cities have one name", file=own.folder, found=repr(name),
                fix="name each city once; its folder says what it is called",
            )  # fmt: skip
        cities[name] = read_placed(own.regions, own.mobility, schema, labels=labels, say=say)
    return stack_cities(cities), replace(schema, places=False)


def read_placed(
    regions: Path | Held,
    mobility: Path | Held | None,
    schema: Schema,
    *,
    labels: Iterable[str] = (),
    say: Callable[[str], None],
) -> City:
    """:func:`topt_deploy.data.city.read_city`; regions without a position stand in the middle, at the others' median.

    That is what ``topt-run predict --on-bad-row mask`` does with them, and it is said.
    """
    table = _placed(regions, say)
    if table is None:
        return read_city(regions, mobility, schema, labels=labels)
    file = regions.path if isinstance(regions, Held) else regions
    return read_city(table, mobility, schema, labels=labels, city_id=hive_city(file))


def _placed(regions: Path | Held, say: Callable[[str], None]) -> pa.Table | None:
    """The table with a position for all; None where nothing is missing, or all positions are."""
    file = open_table(regions)
    if not {"lon", "lat"} <= set(file.names):
        return None
    lon, lat = (file.read([axis])[axis] for axis in ("lon", "lat"))
    missing = np.array(lon.is_null()) & np.array(lat.is_null())
    if not missing.any() or missing.all() or lon.null_count != lat.null_count or lon.null_count != missing.sum():
        return None
    table = file.read()
    for axis in ("lon", "lat"):
        values = table[axis].to_numpy().astype(np.float64)
        filled = np.where(missing, np.nanmedian(values), values)
        table = table.set_column(table.column_names.index(axis), axis, pa.array(filled))
    ids = table[REGION_ID].to_pylist() if REGION_ID in table.column_names else np.arange(len(table)).tolist()
    told = some([str(ids[row]) for row in np.flatnonzero(missing)])
    name = (regions.path if isinstance(regions, Held) else regions).name
    say(f"{name}: no position, and so placed in the middle of the others: {told}")
    return table
