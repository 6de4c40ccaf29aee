"""The recipe: which files a city is made from, and how each is read. A TOML file, or the options of the command."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

from topt_deploy.arguments import Location
from topt_deploy.errors import BadConfig, NoInput
from topt_deploy.storage.os_errors import reading

ON_BAD_ROW = ("fail", "quarantine")
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
_RESERVED = {"region_id", "city_id", "name", "lon", "lat", "geometry", "text", "address", "images", "prompt", "history"}


@dataclass(frozen=True, kw_only=True)
class RegionsSource:
    """Where the regions come from: a file of areas, or a grid.

    Attributes:
        file: Any vector file that GDAL reads, or GeoParquet; None with a grid.
        layer: Its layer; needed where it has several.
        id: The column of region ids.
        name: A column of names for people.
        crs: The reference system of a file that states none.
        grid: ``h3:RESOLUTION`` or ``square:METRESm``.
        boundary: The file whose outline a grid covers.
    """

    file: str | None = None
    layer: str | None = None
    id: str | None = None
    name: str | None = None
    crs: str | None = None
    grid: str | None = None
    boundary: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of rows, and how they are read. What is not named is found by the publisher's columns, where it is known.

    Attributes:
        file: Files or globs, below the recipe's folder.
        layer, crs: As of :class:`RegionsSource`.
        encoding, delimiter, decimal, header: Of CSV and TSV files; ``header`` names the columns of a file without any.
        lon, lat: Columns of positions in degrees.
        x, y: Columns of positions in the system ``crs``.
        point: A column of positions as WKT or WKB, in degrees.
        region: A column of region ids, in place of positions.
        category: The column of categories.
        categories: ``shared`` (the vocabulary that cities have in common), ``own`` (the publisher's), or a table from
            the publisher's to others.
        vocabulary: Whose categories they are, of :data:`topt_deploy.data.vocabulary.PUBLISHERS`; found where it can be.
        weight: A column of how many each row counts for.
        where: Which rows count, as SQL has it.
        date, date_format, timezone: The column of dates, their format as ``strptime`` has it, and the zone of dates
            that name none; the city's by default.
        key: Columns that are equal in rows that are the same thing told twice.
        history: Of labels: also count the period before, as the view ``history``.
        origin, dest: Of flows: columns of region ids.
        origin_lon, origin_lat, dest_lon, dest_lat: Of flows: columns of positions.
        count: Of flows: the column of trips; each row is one without it.
        id: Of embeddings: the column of region ids.
        columns: Of embeddings: the columns of numbers, as a glob.
        by: Of images: ``name`` or ``position``.
    """

    file: tuple[str, ...]
    layer: str | None = None
    crs: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    decimal: str | None = None
    header: tuple[str, ...] | None = None
    lon: str | None = None
    lat: str | None = None
    x: str | None = None
    y: str | None = None
    point: str | None = None
    region: str | None = None
    category: str | None = None
    categories: str | Mapping[str, str] | None = None
    vocabulary: str | None = None
    weight: str | None = None
    where: str | None = None
    date: str | None = None
    date_format: str | None = None
    timezone: str | None = None
    key: tuple[str, ...] | None = None
    history: bool = False
    origin: str | None = None
    dest: str | None = None
    origin_lon: str | None = None
    origin_lat: str | None = None
    dest_lon: str | None = None
    dest_lat: str | None = None
    count: str | None = None
    id: str | None = None
    columns: str | None = None
    by: str | None = None


_FILES = {"file", "layer", "crs", "encoding", "delimiter", "decimal", "header"}
_ROWS = _FILES | {"where", "date", "date_format", "timezone", "key"}
_PLACES = {"lon", "lat", "x", "y", "point", "region"}
KEYS = {
    "points": _ROWS | _PLACES | {"category", "categories", "vocabulary", "weight"},
    "labels": _ROWS | _PLACES | {"weight", "history"},
    "areas": {"file", "layer", "crs", "where", "category", "categories", "vocabulary"},
    "flows": _ROWS | {"origin", "dest", "origin_lon", "origin_lat", "dest_lon", "dest_lat", "count"},
    "embeddings": _FILES | {"id", "columns"},
    "images": _FILES | {"by", "lon", "lat"},
}
"""The keys of a source, by its kind."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The sources that a city is made from.

    Attributes:
        city: Its name.
        folder: Where its files are looked for.
        regions: Where its regions come from.
        points, areas, labels, embeddings: Sources by the name of their view or task.
        flows, images: Sources.
        since, until: The period, whose end does not belong to it, in the city's own time.
        timezone: The city's, as the IANA database names it.
        on_bad_row: What to do with rows that cannot be read: ``fail`` or ``quarantine``.
    """

    city: str
    regions: RegionsSource
    folder: Path = Path()
    points: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)
    areas: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)
    flows: tuple[Source, ...] = ()
    labels: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)
    embeddings: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)
    images: tuple[Source, ...] = ()
    since: datetime | None = None
    until: datetime | None = None
    timezone: str | None = None
    on_bad_row: str = "fail"

    def __post_init__(self) -> None:
        _check(self)


def read_recipe(path: Path, **changes: Any) -> Recipe:
    """Read a recipe.

    Args:
        path: Its TOML file.
        changes: Values in place of its own, by its keys, such as ``timezone``.

    Raises:
        NoInput, NoPermission: If it cannot be read.
        BadConfig: Naming the key that is wrong.
    """
    path = Path(path)
    with reading(path):
        text = path.read_bytes()
    try:
        raw = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"not a recipe in TOML ({error})", file=path) from error
    try:
        return recipe_of({**raw, **changes}, folder=path.parent, name=path.stem)
    except BadConfig as error:
        error.file = error.file or str(path)
        raise


def as_recipe(given: Recipe | Mapping[str, Any] | Location, *, name: str, changes: Mapping[str, Any]) -> Recipe:
    """A recipe from its file, or from what such a file says; a mapping's city has this name if it states none.

    Raises:
        NoInput, NoPermission, BadConfig: As :func:`read_recipe`.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    if isinstance(given, Recipe):
        fields_of = {"from": "since", "to": "until"}
        changes |= {key: moment(changes[key], key) for key in fields_of if key in changes}
        return replace(given, **{fields_of.get(key, key): value for key, value in changes.items()})
    if isinstance(given, Mapping):
        return recipe_of({**given, **changes}, folder=Path(), name=name)
    return read_recipe(Path(given), **changes)


def recipe_of(raw: Mapping[str, Any], *, folder: Path, name: str) -> Recipe:
    """A recipe from what its TOML says."""
    known = {"city", "timezone", "from", "to", "on_bad_row", "regions", *KEYS}
    _no_others(raw, known, "")
    if "regions" not in raw:
        raise BadConfig("a recipe needs regions", expected="a table [regions] with file or grid", found=", ".join(raw))
    regions = raw["regions"]
    _no_others(regions, {f.name for f in fields(RegionsSource)}, "regions")
    return Recipe(
        city=_text(raw.get("city", name), "city"),
        folder=folder,
        regions=RegionsSource(**{key: _text(value, f"regions.{key}") for key, value in regions.items()}),
        flows=_sources(raw.get("flows", ()), "flows", "flows"),
        images=_sources(raw.get("images", ()), "images", "images"),
        since=moment(raw.get("from"), "from"),
        until=moment(raw.get("to"), "to"),
        timezone=_text(raw["timezone"], "timezone") if "timezone" in raw else None,
        on_bad_row=_text(raw.get("on_bad_row", "fail"), "on_bad_row"),
        **{
            kind: {
                key: _sources(value, kind, f"{kind}.{key}") for key, value in _table(raw.get(kind, {}), kind).items()
            }
            for kind in ("points", "areas", "labels", "embeddings")
        },
    )


def moment(value: object, key: str) -> datetime | None:
    """The beginning or the end of a period: a date or a time without a zone, for it is the city's own."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError as error:
            raise BadConfig("not a date", column=key, expected="2019-01-01", found=repr(value)) from error
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime) or value.tzinfo is not None:
        raise BadConfig(
            "not a date in the city's own time", column=key, expected="2019-01-01, without a zone", found=value,
            fix="name the zone once, with timezone",
        )  # fmt: skip
    return value


def files_of(recipe: Recipe, patterns: Sequence[str]) -> list[Path]:
    """The files that patterns name, sorted, each once.

    Raises:
        NoInput: If a pattern names none.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = recipe.folder / pattern
        if any(letter in pattern for letter in "*?["):
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            matches = sorted(anchor.glob(str(path.relative_to(anchor)) if path.is_absolute() else str(path)))
            if not matches:
                raise NoInput("no file fits the pattern", file=path)
        else:
            matches = [path]
            with reading(path):
                path.stat()
        found |= dict.fromkeys(matches)
    return list(found)


def _sources(raw: Any, kind: str, place: str) -> tuple[Source, ...]:
    tables = raw if isinstance(raw, list | tuple) else [raw]
    return tuple(_source(table, kind, place) for table in tables)


def _source(raw: Any, kind: str, place: str) -> Source:
    raw = {"file": raw} if isinstance(raw, str) else dict(_table(raw, place))
    _no_others(raw, KEYS[kind], place)
    if "file" not in raw:
        raise BadConfig("a source needs its file", column=place, expected='file = "…"', found=", ".join(raw))
    for key in ("file", "key", "header"):
        if key in raw:
            values = [raw[key]] if isinstance(raw[key], str) else raw[key]
            if not isinstance(values, list | tuple) or not values or not all(isinstance(v, str) for v in values):
                raise BadConfig("not a text or a list of texts", column=f"{place}.{key}", found=raw[key])
            raw[key] = tuple(values)
    for key, value in raw.items():
        if key == "history":
            if not isinstance(value, bool):
                raise BadConfig("not true or false", column=f"{place}.{key}", found=value)
        elif key == "categories" and isinstance(value, Mapping):
            raw[key] = {str(old): _text(new, f"{place}.categories") for old, new in value.items()}
        elif key not in {"file", "key", "header"}:
            _text(value, f"{place}.{key}")
    return Source(**raw)


def _no_others(raw: Any, known: set[str], place: str) -> None:
    for key in _table(raw, place):
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, known, n=1)
            raise BadConfig(
                "there is no such key",
                column=f"{place}.{key}".lstrip("."),
                expected=", ".join(sorted(known)),
                fix=f"did you mean {near[0]!r}?" if near else None,
            )


def _table(raw: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise BadConfig("not a table", column=place or None, expected="[…] with keys", found=repr(raw))
    return raw


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise BadConfig("not a text", column=place, expected='"…"', found=repr(value))
    return value


def _check(recipe: Recipe) -> None:
    """Check that keys go together, which single keys cannot tell."""
    regions = recipe.regions
    if (regions.file is None) == (regions.grid is None):
        raise BadConfig("regions come from a file or from a grid", column="regions", expected="one of file and grid")
    if regions.grid is not None and regions.boundary is None:
        raise BadConfig(
            "a grid needs the outline that it covers", column="regions.boundary", expected="a file of polygons"
        )
    if recipe.on_bad_row not in ON_BAD_ROW:
        raise BadConfig(
            "not a way to treat bad rows",
            column="on_bad_row",
            expected=" or ".join(ON_BAD_ROW),
            found=recipe.on_bad_row,
        )
    if recipe.since is not None and recipe.until is not None and recipe.since >= recipe.until:
        raise BadConfig("the period is empty", column="to", expected=f"after {recipe.since}", found=recipe.until)
    for sources in recipe.labels.values():
        if any(source.history for source in sources) and (recipe.since is None or recipe.until is None):
            raise BadConfig("history is the period before another", column="labels", fix="name from and to")
    _check_names(recipe)
    if recipe.timezone is not None:
        zone(recipe.timezone)


def _check_names(recipe: Recipe) -> None:
    names = [*recipe.points, *recipe.areas, *recipe.embeddings, *recipe.labels]
    views = {*recipe.points, *recipe.areas, *recipe.embeddings, "history"}
    for name in names:
        kind = "task" if name in recipe.labels else "view"
        inside = [view for view in views if name != view and name.startswith(f"{view}_")]
        if not _NAME.match(name) or name in _RESERVED or name.startswith("prompt_") or names.count(name) > 1 or inside:
            raise BadConfig(
                f"cannot be the name of a {kind}", column=name,
                expected="lower-case letters, digits and _, once, and not another view's name with something behind it",
                found=f"a column of view {inside[0]!r}" if inside else repr(name),
            )  # fmt: skip


def zone(name: str) -> Any:
    """A time zone of the IANA database.

    Raises:
        BadConfig: If there is none of this name.
    """
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError) as error:
        raise BadConfig(
            "unknown time zone", column="timezone", expected="such as America/Chicago", found=name
        ) from error
