"""Finds the columns of a file: by what the recipe names, by the publisher whose file it is, by names that all know."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from topt_deploy.errors import BadConfig

from .recipe import Source

PUBLISHERS = Path(__file__).with_name("publishers.toml")
LON = ("lon", "lng", "long", "longitude", "point_lng", "decimallongitude", "start_lng")
LAT = ("lat", "latitude", "point_lat", "decimallatitude", "start_lat")
CATEGORY = (
    "category", "type", "class", "kind", "fclass", "land_use", "landuse", "zone_type", "zone_class", "zone", "zoning",
)  # fmt: skip
COLUMN_KEYS = (
    "lon", "lat", "x", "y", "point", "region", "category", "weight", "date",
    "origin", "dest", "origin_lon", "origin_lat", "dest_lon", "dest_lat", "count", "id",
)  # fmt: skip
"""Keys of a source that name a column."""
INTERNAL = {
    "community_areas": "Community Area",
    "analysis_neighborhoods": "Analysis Neighborhood",
    "zip_codes": "Zip Code",
    "census_tracts": "Census Tract",
    "police_districts": "Police District",
    "neighborhoods": "Neighborhood",
    "supervisor_districts": "Supervisor District",
}
"""Plural columns that Socrata adds to a download: numbers of its own, and no numbers of areas."""


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """Whose file it is.

    Attributes:
        title: For people.
        columns: Normalised columns that such a file has.
        any: Of these it has one at least.
        role: What its rows are: points, labels, flows, regions.
        set: Keys of a source, with their columns as published.
        where: Which rows to leave out, as its users do.
        name: Of the view or task.
        timezone: The city's.
    """

    title: str
    columns: tuple[str, ...]
    role: str
    set: Mapping[str, Any]
    any: tuple[str, ...] = ()
    where: str | None = None
    name: str = ""
    timezone: str | None = None


def normal(name: str) -> str:
    """A column's name in lower case, with ``_`` for whatever is no letter or digit."""
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")


@cache
def publishers() -> tuple[Publisher, ...]:
    """Those that are known, in the order in which they are tried."""
    raw = tomllib.loads(PUBLISHERS.read_text(encoding="utf-8"))["publisher"]
    known = {f.name for f in fields(Publisher)}
    told: list[dict[str, Any]] = [{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()} for one in raw]
    return tuple(Publisher(**{key: value for key, value in one.items() if key in known}) for one in told)


def recognise(columns: Iterable[str], role: str | None = None) -> Publisher | None:
    """The publisher of a file with these columns; None where it is not known."""
    have = {normal(column) for column in columns}
    for publisher in publishers():
        fits = have.issuperset(publisher.columns) and (not publisher.any or have.intersection(publisher.any))
        if fits and role in (None, publisher.role):
            return publisher
    return None


def resolve(source: Source, columns: Sequence[str], path: Path, *, role: str, placed: bool) -> Source:
    """A source with every column named as the file has it.

    Args:
        source: As the recipe says.
        columns: The file's.
        path: The file, for messages.
        role: What the source's rows are: points, labels, areas or flows.
        placed: Whether the file brings positions of its own.

    Raises:
        BadConfig: If a column is absent, or holds a portal's internal numbers.
    """
    publisher = recognise(columns)
    named: dict[str, Any] = {}
    if publisher is not None and publisher.role not in ("regions",):
        named = dict(publisher.set)
        if role == "labels":
            named.pop("category", None)
        if publisher.where and _has_all(publisher.where, columns):
            named["where"] = publisher.where
        if role == "points" and publisher.role == "labels" and source.date is None:
            named.pop("date", None)
        named["key"] = tuple(named.get("key", ())) or None
    chosen = source
    placing = {"lon", "lat", "x", "y", "point", "region"}
    given = {f.name for f in fields(Source) if getattr(source, f.name) is not None}
    for key, value in named.items():
        if key not in given and hasattr(source, key) and not (key in placing and (given & placing or placed)):
            chosen = replace(chosen, **{key: value})
    if role in ("points", "labels") and not placed:
        chosen = _with_positions(chosen, columns, path)
    if role in ("points", "areas") and chosen.category is None and chosen.categories != "none":
        chosen = replace(chosen, category=next((c for c in columns if normal(c) in CATEGORY), None))
    found: dict[str, Any] = {
        key: find(getattr(chosen, key), columns, path) for key in COLUMN_KEYS if getattr(chosen, key) is not None
    }
    if chosen.key is not None:
        found["key"] = tuple(find(name, columns, path) for name in chosen.key)
    for key in ("region", "origin", "dest"):
        if key in found:
            _check_internal(found[key], columns, path)
    return replace(chosen, **found)


def find(name: str, columns: Sequence[str], path: Path) -> str:
    """A column by its name, as it stands or in another spelling.

    Raises:
        BadConfig: If there is none, or several in another spelling.
    """
    if name in columns:
        return name
    alike = [column for column in columns if normal(column) == normal(name)]
    if len(alike) == 1:
        return alike[0]
    near = difflib.get_close_matches(name, list(columns), n=1)
    raise BadConfig(
        "column is absent" if not alike else "several columns have this name in another spelling",
        file=path, column=name, found=", ".join(alike or columns),
        fix=f"did you mean {near[0]!r}?" if near and not alike else None,
    )  # fmt: skip


def _with_positions(source: Source, columns: Sequence[str], path: Path) -> Source:
    if source.point or source.region or (source.lon and source.lat) or (source.x and source.y):
        if source.x and source.crs is None:
            raise BadConfig(
                "x and y are in a system that is not stated", file=path, column="crs", expected='crs = "EPSG:…"',
                fix="name it; it is never guessed. Degrees go by lon and lat",
            )  # fmt: skip
        return source
    by_name = {normal(column): column for column in reversed(columns)}
    lon = next((by_name[name] for name in LON if name in by_name), None)
    lat = next((by_name[name] for name in LAT if name in by_name), None)
    if lon is None or lat is None:
        raise BadConfig(
            "where its rows are is not stated", file=path, found=", ".join(columns),
            expected="columns lon and lat, x and y with crs, point (WKT), or region",
            fix='name them in the recipe: lon = "…" and lat = "…"',
        )  # fmt: skip
    return replace(source, lon=lon, lat=lat)


def _check_internal(column: str, columns: Sequence[str], path: Path) -> None:
    singular = INTERNAL.get(normal(column))
    if singular or column.startswith(":@computed_region"):
        there = [name for name in columns if singular and normal(name) == normal(singular)]
        raise BadConfig(
            "this column holds a portal's internal numbers, and no numbers of areas", file=path, column=column,
            expected=repr(there[0] if there else singular), fix="use that column, or the positions",
        )  # fmt: skip


def _has_all(where: str, columns: Sequence[str]) -> bool:
    from .where import Where

    have = {normal(column) for column in columns}
    return all(normal(column) in have for column in Where(where, "where").columns)
