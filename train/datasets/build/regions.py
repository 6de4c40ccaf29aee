"""The regions: read from a file of areas or laid out as a grid, repaired, dissolved, and in one frame of longitudes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.geometry import geo_library
from topt_deploy.errors import BadConfig, BadData

from .layers import layer_columns, polygons, read_features
from .recipe import Recipe, RegionsSource, files_of

Array = np.ndarray[Any, Any]

OVERLAP = 1e-6
"""The share of the smaller region that two may have in common without a warning: borders differ in the last digits."""
ID_COLUMNS = ("area_numbe", "area_num_1", "area_number", "locationid", "geoid", "geoid10", "geoid20", "boroct2020",
              "boroct2010", "ct_id", "nta2020", "nta2010", "ntacode", "nhood", "region_id")  # fmt: skip
"""Columns of ids that publishers are known by, in the order in which they are looked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
    """The regions of a city, sorted by id. N regions.

    Attributes:
        ids: str (N,).
        names: str (N,), or None where there are none.
        shapes: shapely polygons and multipolygons (N,), degrees, in the frame from ``west`` to ``west + 360``.
        west: Where the frame of longitudes begins: -180, unless the city lies across the antimeridian.
        overlap: Whether any two have more than a border in common, be it as little as the last digit.
        facts: What was read, repaired and dissolved, by name.
        warnings: What the user should know.
    """

    ids: Array
    names: Array | None
    shapes: Array
    west: float
    overlap: bool
    facts: dict[str, int]
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def frame(self, lon: Array) -> Array:
        """Longitudes in the regions' own frame."""
        if self.west == -180:
            return lon
        return np.asarray(self.west + np.mod(lon - self.west, 360))

    @property
    def lonlat(self) -> Array:
        """Centroids, float64 (N, 2), from -180 to 180 degrees."""
        shapely = geo_library("shapely")
        points = shapely.get_coordinates(shapely.centroid(self.shapes))
        points[:, 0] = np.where(points[:, 0] > 180, points[:, 0] - 360, points[:, 0])
        return points

    def published(self) -> Array:
        """The shapes (N,) as GeoJSON has them: split where they cross 180 degrees."""
        if self.west == -180:
            return self.shapes
        shapely = geo_library("shapely")
        low, _, high, _ = shapely.bounds(self.shapes).T
        split = self.shapes.copy()
        for place in np.flatnonzero((low < 180) & (high > 180)):
            east = shapely.intersection(self.shapes[place], shapely.box(-180, -90, 180, 90))
            west = shapely.intersection(self.shapes[place], shapely.box(180, -90, 540, 90))
            parts = [*shapely.get_parts(east), *shapely.get_parts(_shifted(west, -360))]
            split[place] = shapely.multipolygons([part for part in parts if part.geom_type == "Polygon"])
        beyond = np.flatnonzero(low >= 180)
        split[beyond] = _shifted(split[beyond], -360)
        return split


def read_regions(recipe: Recipe) -> Regions:
    """The regions of a recipe.

    Raises:
        NoInput, BadData, BadConfig: Naming file, column and what to do.
    """
    source = recipe.regions
    if source.grid is not None:
        from .grids import grid_regions

        assert source.boundary is not None
        (path,) = files_of(recipe, [source.boundary])
        outline, facts = _areas(path, source, [])
        shapes, west = unwrapped(np.array([shape for shape in outline[1] if shape is not None], dtype=object))
        cell_ids, cells = grid_regions(source.grid, geo_library("shapely").union_all(shapes))
        return make_regions(cell_ids, cells, None, west=west, facts=facts)
    assert source.file is not None
    (path,) = files_of(recipe, [source.file])
    id_col = source.id or _id_column(path, source)
    columns = [id_col, *([source.name] if source.name else [])]
    (table, shapes), facts = _areas(path, source, columns)
    ids = as_ids(table.column(id_col))
    kept = np.array([shape is not None and value is not None for shape, value in zip(shapes, ids, strict=True)], bool)
    facts |= {"without_id": sum(value is None for value in ids)}
    if not kept.any():
        raise BadData("no feature has an id and an area", file=path, column=id_col, found=f"{len(kept)} features")
    names = np.array(table.column(source.name).to_pylist(), dtype=object)[kept] if source.name else None
    shapes, west = unwrapped(shapes[kept])
    named = np.array(ids, dtype=object)[kept].astype(str)
    regions = make_regions(named, shapes, names, west=west, facts=facts)
    if facts["without_id"]:
        regions.warnings.append(f"{path}: {facts['without_id']} features have no {id_col} and are left out")
    return regions


def make_regions(ids: Array, shapes: Array, names: Array | None, *, west: float, facts: dict[str, int]) -> Regions:
    """Regions from features: parts of one id become one region, and the regions are sorted."""
    shapely = geo_library("shapely")
    unique, first, where = np.unique(ids, return_index=True, return_inverse=True)
    whole = shapes[first].copy()
    twice = np.flatnonzero(np.bincount(where) > 1)
    for place in twice:
        whole[place] = shapely.union_all(shapes[where == place])
    facts |= {"dissolved": len(ids) - len(unique), "regions": len(unique)}
    labels = None if names is None else np.array([str(n) if n is not None else "" for n in names[first]])
    overlap, warnings = _overlaps(unique, whole)
    return Regions(ids=unique, names=labels, shapes=whole, west=west, overlap=overlap, facts=facts, warnings=warnings)


def as_ids(column: pa.ChunkedArray) -> list[str | None]:
    """Ids as text: a whole number that a file stores as 7.0 is "7"; blank ones are None."""
    return [id_text(value) for value in column.to_pylist()]


def id_text(value: object) -> str | None:
    """One id as text."""
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None if value != value else value
    text = "" if value is None else str(value).strip()
    return text or None


def unwrapped(shapes: Array) -> tuple[Array, float]:
    """Shapes in one frame of longitudes: a city across the antimeridian lies in one piece, beyond 180.

    Returns:
        The shapes, and where their frame begins.
    """
    shapely = geo_library("shapely")
    bounds = shapely.bounds(shapes)
    low, high = float(bounds[:, 0].min()), float(bounds[:, 2].max())
    if low >= -180 and high <= 180 and high - low <= 180:
        return shapes, -180.0
    # Rings that jump from 179 to -179, or parts on both sides: seen from the other side they are close together.
    moved = shapely.transform(shapes, lambda xy: np.column_stack([np.mod(xy[:, 0], 360), xy[:, 1]]))
    around = shapely.bounds(moved)
    if around[:, 2].max() - around[:, 0].min() >= high - low:
        return shapes, -180.0  # as wide as the world: no city
    mended, _ = polygons(moved)
    return mended, 0.0


def _shifted(shapes: Any, by: float) -> Any:
    return geo_library("shapely").transform(shapes, lambda xy: xy + np.array([by, 0.0]))


def _areas(path: Path, source: RegionsSource, columns: Sequence[str]) -> tuple[tuple[pa.Table, Array], dict[str, int]]:
    """A file's features that have an area, and how many were repaired or have none."""
    tables, shapes, repaired = [], [], 0
    for part in read_features(path, columns, layer=source.layer, crs=source.crs):
        areas, mended = polygons(part.shapes)
        tables.append(part.table)
        shapes.append(areas)
        repaired += int(mended.sum())
    if not tables:
        raise BadData("the file is empty", file=path, expected="at least one area")
    found = np.concatenate(shapes)
    missing = sum(shape is None for shape in found)
    if missing == len(found):
        raise BadData("no feature is an area", file=path, expected="polygons", found=f"{len(found)} features without")
    return (pa.concat_tables(tables), found), {"features": len(found), "repaired": repaired, "without_area": missing}


def _id_column(path: Path, source: RegionsSource) -> str:
    """The column of ids by which a publisher is known; a guess is not made."""
    columns = layer_columns(path, source.layer)
    by_name = {column.lower(): column for column in columns}
    for known in ID_COLUMNS:
        if known in by_name:
            return by_name[known]
    raise BadConfig(
        "which column holds the regions' ids is not stated", file=path, expected="one of its columns",
        found=", ".join(columns), fix='name it: id = "…" under [regions], or --id-col',
    )  # fmt: skip


def _overlaps(ids: Array, shapes: Array) -> tuple[bool, list[str]]:
    """Warn if regions overlap: a point there belongs to the first by id."""
    shapely = geo_library("shapely")
    if shapely.coverage_is_valid(shapes):  # much the faster question
        return False, []
    tree = shapely.STRtree(shapes)
    one, other = np.concatenate([tree.query(shapes, predicate=name) for name in ("overlaps", "covers")], axis=1)
    one, other = one[one != other], other[one != other]
    if len(one) == 0:
        return False, []
    common = shapely.area(shapely.intersection(shapes[one], shapes[other]))
    much = common > OVERLAP * np.minimum(shapely.area(shapes[one]), shapely.area(shapes[other]))
    if not much.any():
        return True, []
    pairs = {tuple(sorted(pair)) for pair in zip(ids[one[much]].tolist(), ids[other[much]].tolist(), strict=True)}
    pair = " and ".join(map(repr, min(pairs)))
    told = f"{len(pairs)} pairs of regions overlap, such as {pair}: what lies in both counts for the first by id"
    return True, [told]
