"""The regions' outlines on a map: polygons where the city's table has them, or else discs at their positions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from topt_deploy.data.features import EARTH_RADIUS_M
from topt_deploy.data.geometry import geo_library

Array = np.ndarray[Any, Any]

WIDTH, HEIGHT = 320.0, 360.0
"""The box that a map is fitted into, in its own units."""
MARGIN = 8.0
TOLERANCE = 0.5
"""The tolerance of simplified outlines, in the map's units: about half a pixel of a screen."""
RADIUS = (1.5, 9.0)
"""Smallest and largest disc."""
LOOKED_AT = 512
"""Points whose nearest neighbours are looked for, to know how large discs may be."""
FLATTEST = 1e-6
"""Height over length of the flattest cap whose curvature float32 positions still tell: a city of some 100 m."""


@dataclass(frozen=True, kw_only=True)
class Outlines:
    """A map's geometry, which every map of the page shares. N regions.

    Attributes:
        width, height: Of the drawing, in the map's units; north is up.
        paths: SVG path data, one per region.
        line: Width of the lines between regions, in the map's units: thinner where there are many.
        points: True if the paths are discs.
        bar, bar_km: Length of the scale bar in the map's units and in kilometres.
    """

    width: float
    height: float
    paths: tuple[str, ...]
    line: float
    points: bool
    bar: float
    bar_km: float


def polygon_outlines(shapes: Array) -> Outlines:
    """Outlines of polygons, simplified together so that neighbours keep their common border.

    Args:
        shapes: shapely Polygons and MultiPolygons (N,), longitude and latitude in degrees.
    """
    shapely = geo_library("shapely")
    corners = shapely.get_coordinates(shapes)
    fit = _Fit(project_m(corners, centre=corners[0]), margin=MARGIN)
    drawn = shapely.transform(shapes, lambda lonlat: fit(project_m(lonlat, centre=corners[0])))
    drawn = shapely.coverage_simplify(drawn, TOLERANCE)
    return fit.outlines([" ".join(_ring(ring) for ring in _rings(shape)) for shape in drawn], points=False)


def point_outlines(points: Array) -> Outlines:
    """Discs, large enough to be read and small enough to be told apart.

    Args:
        points: float64 (N, 2), metres east and north of anywhere.
    """
    fit = _Fit(points, margin=MARGIN + RADIUS[1])
    drawn = fit(points)
    radius = float(np.clip(0.6 * np.median(_gaps(drawn)), *RADIUS))
    arc = f"a{radius:.1f} {radius:.1f} 0 1 0"
    discs = [f"M{x - radius:.1f} {y:.1f}{arc} {2 * radius:.1f} 0{arc} {-2 * radius:.1f} 0z" for x, y in drawn]
    return fit.outlines(discs, points=True)


def _gaps(points: Array) -> Array:
    """How far it is to the nearest other point, from up to :data:`LOOKED_AT` of them, evenly spread over the rows."""
    looked = np.unique(np.linspace(0, len(points) - 1, min(len(points), LOOKED_AT)).round().astype(int))
    gaps = np.full(len(looked), np.inf)
    for place, row in enumerate(looked):
        distance = np.hypot(*(points - points[row]).T)
        distance[row] = np.inf
        gaps[place] = distance.min()
    return gaps


def project_m(lonlat: Array, centre: Array) -> Array:
    """Metres east and north of ``centre``: an equirectangular projection, true to scale there.

    *Shape:* (..., 2), (2,), degrees → (..., 2)
    """
    east = (lonlat[..., 0] - centre[0] + 180) % 360 - 180  # across the antimeridian too
    north = lonlat[..., 1] - centre[1]
    return EARTH_RADIUS_M * np.radians(np.stack([east * np.cos(np.radians(centre[1])), north], axis=-1))


def east_north_m(position: Array) -> tuple[Array, bool]:
    """Metres east and north of positions whose longitude and latitude are no longer known.

    Where on Earth their centre is was not recorded, but the sphere's curvature tells it: every point p is on the
    sphere, |p + c| = R, with c from the Earth's centre to theirs. As the p add up to zero, p·c = (mean|p|² − |p|²) / 2,
    which is linear in c. It takes four regions that do not lie on one circle, as those along a parallel do.

    Args:
        position: float64 (N, 3), :func:`topt_deploy.data.features.local_position_m`, to float32's precision.

    Returns:
        (N, 2) in the plane that touches the sphere at the centre, and whether north is up. Where that cannot be told:
        along the two directions in which the regions extend furthest.
    """
    distance2 = np.square(position).sum(axis=1)
    up, _, rank, _ = np.linalg.lstsq(position, (distance2.mean() - distance2) / 2, rcond=FLATTEST)
    if rank < 3:
        return position @ np.linalg.svd(position, full_matrices=False)[2][:2].T, False
    east = _unit(np.cross([0.0, 0.0, 1.0], up))
    north = _unit(np.cross(up, east))
    return np.stack([position @ east, position @ north], axis=1), True


def _unit(vector: Array) -> Array:
    """Scaled to length one."""
    unit: Array = vector / np.linalg.norm(vector)
    return unit


class _Fit:
    """Fits metres east and north into the box: scaled, moved, and turned over, for SVG's y grows downwards.

    *Shape:* (..., 2) → (..., 2)
    """

    def __init__(self, points: Array, *, margin: float) -> None:
        low, high = points.min(axis=0), points.max(axis=0)
        extent = np.maximum(high - low, 1.0)  # metres
        self.scale = float(((np.array([WIDTH, HEIGHT]) - 2 * margin) / extent).min())
        self.origin = np.array([(low[0] + high[0]) / 2, high[1]])
        self.height = float(extent[1] * self.scale + 2 * margin)
        self.margin = margin

    def __call__(self, points: Array) -> Array:
        moved = (points - self.origin) * self.scale
        return np.stack([WIDTH / 2 + moved[..., 0], self.margin - moved[..., 1]], axis=-1)

    def outlines(self, paths: list[str], *, points: bool) -> Outlines:
        """With a scale bar of a round length, at most a quarter of the width."""
        longest_km = WIDTH / 4 / self.scale / 1000
        power = 10.0 ** np.floor(np.log10(longest_km))
        bar_km = float(max(step * power for step in (1, 2, 5) if step * power <= longest_km))
        return Outlines(
            width=WIDTH,
            height=self.height,
            paths=tuple(paths),
            line=min(0.6, 6 / len(paths) ** 0.5),
            points=points,
            bar=bar_km * 1000 * self.scale,
            bar_km=bar_km,
        )


def _rings(shape: Any) -> Iterator[Array]:
    """Every ring of a polygon or multipolygon, holes included, as (K, 2)."""
    for polygon in geo_library("shapely").get_parts(shape):
        for ring in (polygon.exterior, *polygon.interiors):
            yield np.asarray(ring.coords)[:, :2]


def _ring(points: Array) -> str:
    """SVG path data of a closed ring; a tenth of a unit is finer than a screen shows."""
    return "M" + " ".join(f"{x:.1f} {y:.1f}" for x, y in points[:-1]) + "z"
