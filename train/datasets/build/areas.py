"""Land use and other areas: hectares of each class in each region, by intersection in an equal-area projection."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.geometry import geo_library
from topt_deploy.data.vocabulary import LAND_USE
from topt_deploy.errors import BadConfig

from .categories import Categories
from .find import find, resolve
from .layers import GIS_SUFFIXES, is_parquet, layer_columns, polygons, read_features
from .recipe import Source
from .regions import Regions, unwrapped
from .tally import Tally
from .where import Where

Array = np.ndarray[Any, Any]

SQUARE_METRES = 10_000.0
"""Of a hectare."""
TWICE = 1.01
"""More of a region than this is covered: some areas lie on each other."""


class EqualArea:
    """Lambert's azimuthal equal-area projection around the middle of a city, in metres.

    Args:
        regions: The city's.
    """

    def __init__(self, regions: Regions) -> None:
        shapely, pyproj = geo_library("shapely"), geo_library("pyproj")
        low_x, low_y, high_x, high_y = shapely.total_bounds(regions.shapes).tolist()
        self.crs = (
            f"+proj=laea +lat_0={(low_y + high_y) / 2!r} +lon_0={(low_x + high_x) / 2!r} +datum=WGS84 +units=m +no_defs"
        )
        self._transform = pyproj.Transformer.from_crs("OGC:CRS84", self.crs, always_xy=True).transform

    def of(self, shapes: Array) -> Array:
        """Shapes (F,) in degrees, in metres. Edges stay straight between their ends."""
        return np.asarray(geo_library("shapely").transform(shapes, self._transform, interleaved=False))


def measure(
    source: Source,
    regions: Regions,
    tally: Tally,
    files: Sequence[Path],
    told: Callable[[Path, float], None],
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Hectares by region and class of a source's files.

    Args:
        source: As the recipe says.
        regions: N regions.
        tally: Where is written down what became of the areas: assigned where some region has a part of one.
        files: The files.
        told: Told of a file and the share of it that is done.
    """
    shapely = geo_library("shapely")
    project = EqualArea(regions)
    ground = project.of(regions.shapes)
    shapely.prepare(ground)
    tree = shapely.STRtree(ground)
    categories: Categories | None = None
    hectares = np.zeros((len(regions), 0))
    for path in files:
        parts, columns, chosen = _open(source, path)
        if categories is None:
            mode = "none" if chosen.category is None else chosen.categories
            vocabulary = chosen.vocabulary or ("osm" if _is_osm(path) else None)
            categories = Categories(LAND_USE, mode, vocabulary, f"{tally.name}.categories")
        where = None if chosen.where is None else Where(chosen.where, f"{tally.name}.where")
        for part in parts(columns):
            tally.read += len(part.table)
            keep = np.ones(len(part.table), bool)
            if where is not None:
                keep = where(pa.table({c: part.table.column(find(c, columns, path)) for c in where.columns}))
                tally.reasons["filtered"] += int((~keep).sum())
            shapes, _ = polygons(unwrapped_like(regions, part.shapes[keep]))
            lines = np.arange(part.first, part.first + len(keep))[keep]
            missing = shapely.is_missing(shapes)
            tally.reject(path, lines[missing], "blank", ["no area"] * int(missing.sum()))
            area, region = tree.query(moved := project.of(shapes), predicate="intersects")
            common = shapely.area(shapely.intersection(ground[region], moved[area])) / SQUARE_METRES
            inside = common > 0
            area, region, common = area[inside], region[inside], common[inside]
            held = np.unique(area)
            tally.assigned += len(held)
            outside = np.setdiff1d(np.flatnonzero(~missing), held)
            tally.reject(path, lines[outside], "outside", [None] * len(outside))
            owner, code = np.arange(len(shapes)), np.zeros(len(shapes), np.int64)
            if chosen.category is not None:
                kinds = part.table.column(chosen.category).filter(pa.array(keep))
                rows, code = categories.codes(kinds, len(shapes))
                owner = owner[rows]
            hectares = _added(hectares, categories, area, region, common, owner, code)
            told(path, 0.5)
    names = categories.names if categories is not None else []
    hectares = _wide(hectares, len(names))
    _say(tally, hectares, shapely.area(ground) / SQUARE_METRES)
    unknown = categories.unknown if categories is not None else {}
    return {"values": hectares}, {"categories": names, "unknown": unknown}


def unwrapped_like(regions: Regions, shapes: Array) -> Array:
    """Shapes in the regions' own frame of longitudes."""
    if regions.west == -180:
        return shapes
    there = ~geo_library("shapely").is_missing(shapes)
    shapes = shapes.copy()
    shapes[there] = [unwrapped(np.array([shape], dtype=object))[0][0] for shape in shapes[there]]
    low = geo_library("shapely").bounds(shapes)[:, 0]
    west = there & (low < 0)
    shapes[west] = geo_library("shapely").transform(shapes[west], lambda xy: xy + np.array([360.0, 0.0]))
    return shapes


def _open(source: Source, path: Path) -> tuple[Callable[[Sequence[str]], Any], list[str], Source]:
    """A way to read a file's areas, the columns that are needed, and the source with its columns found."""
    if _is_osm(path):
        from .osm import LAND_CATEGORY, read_land

        return lambda _: read_land(path), [LAND_CATEGORY], _with(source, LAND_CATEGORY)
    if path.suffix.lower() not in GIS_SUFFIXES and not is_parquet(path):
        raise BadConfig(
            "areas come from a vector file", file=path, expected="GeoPackage, GeoJSON, shapefile, …", found=path.suffix
        )
    names = layer_columns(path, source.layer)
    chosen = resolve(source, names, path, role="areas", placed=True)
    columns = [chosen.category] if chosen.category else []
    if chosen.where is not None:
        columns += [find(column, names, path) for column in Where(chosen.where, "where").columns]
    columns = list(dict.fromkeys(columns))
    return lambda asked: read_features(path, asked, layer=source.layer, crs=source.crs), columns, chosen


def _with(source: Source, category: str) -> Source:
    from dataclasses import replace

    return source if source.categories == "none" else replace(source, category=category)


def _is_osm(path: Path) -> bool:
    return path.suffix.lower() in {".pbf", ".osm"}


def _added(
    hectares: Array, categories: Categories, area: Array, region: Array, common: Array, owner: Array, code: Array
) -> Array:
    """Hectares with those of some areas; an area of several classes is shared evenly among them."""
    many = max(len(categories.names), 1)
    times = np.bincount(owner, minlength=int(area.max()) + 1 if len(area) else 0)
    begin = np.cumsum(times) - times
    repeat = times[area]
    pair = np.repeat(np.arange(len(area)), repeat)
    nth = np.arange(len(pair)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    classes = code[np.repeat(begin[area], repeat) + nth]
    cell = region[pair] * many + classes
    found = np.bincount(cell, common[pair] / repeat[pair], len(hectares) * many).reshape(len(hectares), many)
    return found + _wide(hectares, many)


def _wide(values: Array, many: int) -> Array:
    wide = np.zeros((len(values), many))
    wide[:, : values.shape[1]] = values
    return wide


def _say(tally: Tally, hectares: Array, whole: Array) -> None:
    if tally.read and not tally.assigned:
        tally.warnings.append(f"none of {tally.read:,} areas lies in a region")
    covered = hectares.sum(axis=1)
    twice = covered > TWICE * whole
    if twice.any():
        share = float(np.max(covered[twice] / whole[twice]))
        tally.warnings.append(
            f"{int(twice.sum()):,} of {len(whole):,} regions are covered more than once, up to {share:.2f} times:"
            " areas of this source lie on each other, and each counts"
        )
