"""``topt-deploy build --init``: looks at a folder of files and writes a recipe to read and correct."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topt_deploy.data.geometry import geo_library
from topt_deploy.errors import NoInput, ToptError

from .find import CATEGORY, LAT, LON, Publisher, normal, recognise
from .layers import GIS_SUFFIXES, is_parquet, layer_columns
from .recipe import Source
from .regions import ID_COLUMNS
from .rows import open_rows

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".geoparquet", ".pbf", *GIS_SUFFIXES)
TSMC = ("user", "venue", "category_id", "category_name", "lat", "lon", "offset_minutes", "utc_time")
DATES = ("date", "datetime", "timestamp", "occurred", "incident_date", "created", "created_date", "reported")


@dataclass
class _Found:
    """A file, and what it seems to be.

    Attributes:
        path: As the recipe names it.
        columns: Its columns.
        role: regions, points, labels, areas, flows; empty where it cannot be told.
        name: Of the view or task.
        publisher: Whose file it is, where that is known.
        keys: Keys of its source, for the recipe.
        notes: What the reader should look at.
    """

    path: str
    columns: list[str]
    role: str = ""
    name: str = ""
    publisher: Publisher | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_recipe(folder: Path) -> str:
    """A recipe for the files in a folder, as TOML with comments.

    Args:
        folder: Looked through with all that is below it.

    Raises:
        NoInput: If no file there can be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NoInput("no such folder", file=folder)
    found = [_look(path, folder) for path in sorted(folder.rglob("*")) if _is_data(path)]
    if not found:
        raise NoInput("no file here can be used", file=folder, expected=", ".join(SUFFIXES))
    _only_one_of_regions(found)
    zones = {one.publisher.timezone for one in found if one.publisher and one.publisher.timezone}
    lines = [
        "# A recipe of topt-deploy build, written from the files that were found. Read and correct it: files are taken",
        "# for what their columns say, and nothing was counted yet. Then: topt-deploy build RECIPE.toml --out CITY",
        f"city = {_toml(folder.resolve().name)}",
        f"timezone = {_toml(zones.pop())}" if len(zones) == 1 else '# timezone = "America/Chicago"   # the city\'s own',
        "# The period whose incidents and trips are counted; its last day is the one before `to`.",
        "# from = 2019-01-01",
        "# to = 2020-01-01",
        "",
    ]
    regions = [one for one in found if one.role == "regions"]
    for one in regions:
        lines += _table("[regions]", one)
    if not regions:
        lines += ["# No file of areas was found. Name one, or take a grid.", "[regions]", '# file = "areas.geojson"',
                  '# id = "…"', '# grid = "h3:8"', '# boundary = "outline.geojson"', ""]  # fmt: skip
    for role in ("points", "labels", "areas", "flows"):
        for one in (one for one in found if one.role == role):
            several = sum(other.role == role and other.name == one.name for other in found) > 1
            place = role if role == "flows" else f"{role}.{one.name}"
            lines += _table(f"[[{place}]]" if several or role == "flows" else f"[{place}]", one)
    for one in (one for one in found if not one.role):
        lines += [f"# Not used: {one.path}", *(f"#   {note}" for note in one.notes), ""]
    return "\n".join(lines).rstrip() + "\n"


def _is_data(path: Path) -> bool:
    name = path.name.lower()
    name = name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".zst")
    return path.is_file() and not path.name.startswith(".") and name.endswith(SUFFIXES)


def _look(path: Path, folder: Path) -> _Found:
    """The likely content of a file."""
    given = str(folder / path.relative_to(folder))
    try:
        columns = _columns(path)
    except ToptError as error:
        return _Found(path=given, columns=[], notes=str(error).splitlines())
    one = _Found(path=given, columns=columns)
    one.publisher = recognise(columns)
    if len(columns) == len(TSMC) and one.publisher is None and _is_tsmc(columns):
        one.publisher = recognise(TSMC)
        one.keys |= {"header": list(TSMC), "encoding": "latin-1"}
    shapes = _kind(path)
    if path.name.lower().endswith(".pbf"):
        one.role, one.name = "points", "poi"
        one.notes.append("OpenStreetMap: also usable as land use: [areas.land_use]")
    elif one.publisher is not None and (one.publisher.role != "regions" or shapes == "areas"):
        _published(one, shapes)
    elif shapes == "areas":
        _areas(one)
    else:
        _rows(one, shapes)
    _system(one, path, shapes)
    return one


def _columns(path: Path) -> list[str]:
    if path.suffix.lower() in GIS_SUFFIXES and _kind(path):
        return layer_columns(path)
    return [name for name in open_rows(path, Source(file=(str(path),))).names if not name.startswith("\0")]


def _is_tsmc(columns: list[str]) -> bool:
    """Foursquare's check-ins have no header: their first row stands for it, with a position in it."""
    try:
        return abs(float(columns[4])) <= 90 and abs(float(columns[5])) <= 180 and "+0000" in columns[7]
    except ValueError:
        return False


def _kind(path: Path) -> str:
    """The content of a vector file, areas or points; empty for tables."""
    if is_parquet(path) or path.suffix.lower() not in GIS_SUFFIXES:
        return ""
    try:
        kind = str(geo_library("pyogrio").read_info(path).get("geometry_type"))
    except Exception:  # GDAL has many errors of its own; reading the file will tell which
        return ""
    return "areas" if "Polygon" in kind or kind in ("Unknown", "GeometryCollection") else "points"


def _published(one: _Found, shapes: str) -> None:
    """A file whose publisher is known."""
    assert one.publisher is not None
    one.role, one.name = one.publisher.role, one.publisher.name
    if one.publisher.where:
        one.notes.append(f"if the file has these columns, only rows count where {one.publisher.where}")
        one.notes.append('to count others, say which: where = "…"')
    elif one.role == "labels":
        one.notes.append("every row counts; with where, only some: where = \"… in ('…')\"")
    for key, column in one.publisher.set.items():
        if one.role == "labels" and key == "category":
            continue
        one.keys[key] = [_actual(c, one.columns) for c in column] if isinstance(column, tuple | list) else column
        if isinstance(column, str) and key not in ("vocabulary", "date_format"):
            one.keys[key] = _actual(column, one.columns)
    if shapes == "points" and one.role == "points":
        one.keys.pop("lon", None)


def _areas(one: _Found) -> None:
    """Areas of an unknown publisher: regions if they have a column of ids, or land use by a column of classes."""
    classes = [column for column in one.columns if normal(column) in CATEGORY]
    ids = [column for known in ID_COLUMNS for column in one.columns if normal(column) == known]
    if ids or not classes:
        one.role = "regions"
        one.keys["id"] = (
            ids or [column for column in one.columns if "id" in normal(column).split("_")] or one.columns
        )[0]
        names = [c for c in one.columns if normal(c) == "name" or normal(c).endswith("_name")]
        if names:
            one.keys["name"] = names[0]
        one.notes.append(f"columns: {', '.join(one.columns)}. Is id the one that your other files name regions by?")
    else:
        one.role, one.name = "areas", "land_use"
        one.keys |= {"category": classes[0], "categories": "own"}


def _rows(one: _Found, shapes: str) -> None:
    """Rows of an unknown publisher: incidents if they have dates, else points of interest."""
    by_name = {normal(column): column for column in one.columns}
    lon, lat = (next((by_name[name] for name in names if name in by_name), None) for names in (LON, LAT))
    dates = [by_name[name] for name in by_name if name in DATES or name.endswith(("_date", "_datetime", "_at"))]
    if not shapes and (lon is None or lat is None):
        one.notes.append(
            f"columns: {', '.join(one.columns)}. No positions, ids of regions or flows are known among them"
        )
        one.notes.append(
            'a table of trips is: [[flows]], file = "…", origin = "…", dest = "…", count = "…" if it has one'
        )
        return
    if lon is not None and not shapes:
        one.keys |= {"lon": lon, "lat": lat}
    one.notes.append(f'columns: {", ".join(one.columns)}. If a row may come twice, name what tells: key = "…"')
    stem = normal(Path(one.path).name.split(".")[0]) or "rows"
    if dates:
        one.role, one.name = "labels", stem if stem[0].isalpha() else f"task_{stem}"
        one.keys["date"] = dates[0]
        one.notes.append("taken for incidents to predict, for its rows have dates; else make it [points.…]")
        return
    one.role, one.name = "points", "poi"
    classes = [column for column in one.columns if normal(column) in CATEGORY]
    if classes:
        one.keys |= {"category": classes[0], "categories": "own"}
        one.notes.append('its own categories; for models of several cities name a vocabulary: vocabulary = "osm"')


def _system(one: _Found, path: Path, shapes: str) -> None:
    """Say what a vector file lacks: its reference system, a choice of layers."""
    if not shapes or not one.role:
        return
    pyogrio = geo_library("pyogrio")
    layers = [str(name) for name in pyogrio.list_layers(path)[:, 0]]
    if len(layers) > 1:
        one.keys["layer"] = layers[0]
        one.notes.append(f"layers: {', '.join(layers)}")
    if pyogrio.read_info(path, layer=layers[0])["crs"] is None:
        one.keys["crs"] = "EPSG:…"
        one.notes.append("the file states no reference system: fill in crs; it is never guessed")


def _only_one_of_regions(found: list[_Found]) -> None:
    """Of several files of areas the first known one is the regions'."""
    regions = sorted((one for one in found if one.role == "regions"), key=lambda one: one.publisher is None)
    for one in regions[1:]:
        one.role = ""
        one.notes.insert(0, f"areas too; {regions[0].path} was taken for the regions")


def _table(head: str, one: _Found) -> list[str]:
    title = [f"# {one.publisher.title}"] if one.publisher else []
    keys: Mapping[str, Any] = {"file": one.path, **one.keys}
    return [*title, *(f"# {note}" for note in one.notes), head, *(f"{k} = {_toml(v)}" for k, v in keys.items()), ""]


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _actual(name: str, columns: list[str]) -> str:
    return next((column for column in columns if normal(column) == normal(name)), name)
