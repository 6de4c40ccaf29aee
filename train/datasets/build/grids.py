"""Regions as the cells of a grid that covers an outline: H3's hexagons, or squares."""

import re
from typing import Any

import numpy as np

from topt_deploy.data.geometry import geo_library
from topt_deploy.errors import BadConfig

from .libraries import library

Array = np.ndarray[Any, Any]

_H3 = re.compile(r"h3:(\d{1,2})\Z")
_SQUARE = re.compile(r"square:(\d+(?:\.\d+)?)m\Z")
CELLS_MOST = 200_000


def grid_regions(grid: str, outline: Any) -> tuple[Array, Array]:
    """The cells that an outline touches, whole, so that no place of it is in none.

    Args:
        grid: ``h3:RESOLUTION`` (0 to 15) or ``square:METRESm``.
        outline: A polygon or multipolygon in degrees.

    Returns:
        Ids, str (N,): H3's own, or of squares the UTM zone and the number of metres' steps to the east and north, so
        that the same square has the same id whatever outline it is asked for; and polygons (N,).

    Raises:
        BadConfig: If ``grid`` is neither, or makes more than :data:`CELLS_MOST` cells.
    """
    if found := _H3.match(grid):
        return _hexagons(int(found[1]), outline)
    if found := _SQUARE.match(grid):
        return _squares(float(found[1]), outline)
    raise BadConfig("unknown grid", column="grid", expected="h3:8 or square:500m", found=grid)


def _hexagons(resolution: int, outline: Any) -> tuple[Array, Array]:
    h3, shapely = library("h3"), geo_library("shapely")
    if resolution > 15:
        raise BadConfig("H3 has no such resolution", column="grid", expected="h3:0 to h3:15", found=f"h3:{resolution}")
    area_km2 = h3.average_hexagon_area(resolution, unit="km^2")
    _check_number(_km2(outline) / area_km2)
    cells = sorted(h3.h3shape_to_cells_experimental(h3.geo_to_h3shape(outline), resolution, contain="overlap"))
    rings = [np.array(h3.cell_to_boundary(cell))[:, ::-1] for cell in cells]  # (lat, lon) as H3 has it
    return np.array(cells), np.array([shapely.polygons(ring) for ring in rings], dtype=object)


def _squares(size_m: float, outline: Any) -> tuple[Array, Array]:
    shapely, pyproj = geo_library("shapely"), geo_library("pyproj")
    lon, lat = shapely.get_coordinates(shapely.centroid(outline))[0].tolist()
    lon = (lon + 180) % 360 - 180
    zone, south = int((lon + 180) // 6) + 1, lat < 0
    crs = f"EPSG:{327 if south else 326}{zone:02d}"
    forward = pyproj.Transformer.from_crs("OGC:CRS84", crs, always_xy=True).transform
    back = pyproj.Transformer.from_crs(crs, "OGC:CRS84", always_xy=True).transform
    if size_m <= 0:
        raise BadConfig("squares need a size", column="grid", expected="square:500m", found=f"square:{size_m}m")
    _check_number(_km2(outline) * 1e6 / size_m**2)
    ground = shapely.transform(outline, forward, interleaved=False)
    west, low, east, high = (shapely.bounds(ground) / size_m).tolist()
    columns = np.arange(np.floor(west), np.floor(east) + 1)
    rows = np.arange(np.floor(low), np.floor(high) + 1)
    _check_number(len(columns) * len(rows) / 50)
    x, y = (axis.ravel() for axis in np.meshgrid(columns, rows))
    cells = shapely.box(x * size_m, y * size_m, (x + 1) * size_m, (y + 1) * size_m)
    shapely.prepare(ground)
    # Cells that only touch the outline hold no place of it.
    held = shapely.intersects(ground, cells) & ~shapely.touches(ground, cells)
    side = "S" if south else "N"
    ids = [f"{zone}{side}_{column:.0f}_{row:.0f}" for column, row in zip(x[held], y[held], strict=True)]
    return np.array(ids), shapely.transform(cells[held], back, interleaved=False)


def _km2(outline: Any) -> float:
    """Roughly the size of the outline's box."""
    west, south, east, north = geo_library("shapely").bounds(outline).tolist()
    return float((east - west) * np.cos(np.radians((south + north) / 2)) * (north - south) * 111.32**2)


def _check_number(cells: float) -> None:
    if cells > CELLS_MOST:
        raise BadConfig(
            "the grid is too fine for this outline", column="grid", expected=f"at most {CELLS_MOST:,} cells",
            found=f"about {cells:,.0f}", fix="take a coarser one",
        )  # fmt: skip
