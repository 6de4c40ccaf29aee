"""The region of each of millions of points: exact, and each point in one region at most.

A grid of cells answers for nearly all points (:mod:`.cells`). Points very near a border are tested by GEOS, whose test
is robust. Points that lie exactly on a border are decided in rational numbers, by one rule that does not depend on the
order of anything:

1. A point belongs to the region that holds it once it is moved to the east by less than any distance, and north by
   still less (the half-open rule of ray crossing: each border is part of one of its two sides).
2. Where that leads out of every region, it belongs to the first region by id on whose border it lies.
3. Where regions overlap, it belongs to the first by id.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from topt_deploy.data.geometry import geo_library

from .cells import OUTSIDE, UNSURE, Cells
from .edges import Edges
from .regions import Regions

Array = np.ndarray[Any, Any]

__all__ = ["CELLS", "CELLS_MOST", "OUTSIDE", "Located", "Locator"]

AT_ONCE = 1 << 14
"""Points that go through the grid together: what is made of them stays in the processor's cache."""
CELLS = 1024
"""Along each side, by default."""
CELLS_MOST = 2048
THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where points lie. P points.

    Attributes:
        region: int32 (P,), places in the regions, :data:`OUTSIDE` for none.
        on_border: How many lie exactly on a border.
    """

    region: Array
    on_border: int


class Locator:
    """Finds the region of points.

    Args:
        regions: N regions.
        cells: Cells along each side. More of them take more time to make, and leave fewer points for a closer look.
    """

    def __init__(self, regions: Regions, *, cells: int = CELLS) -> None:
        shapely = geo_library("shapely")
        self.regions = regions
        self.shapes = regions.shapes
        self._tree = shapely.STRtree(self.shapes)
        west, south, east, north = shapely.total_bounds(self.shapes).tolist()
        self.bounds: tuple[float, float, float, float] = (west, south, east, north)
        self._edges = Edges(self.shapes)
        self._cells = Cells(self._edges, len(self.shapes), self.bounds, cells)
        if regions.overlap:
            self._cells.exclude(self._doubly())
        self._pool = ThreadPoolExecutor(THREADS)

    def locate(self, lon: Array, lat: Array) -> Located:
        """The regions of points.

        Args:
            lon, lat: float64 (P,), degrees; NaN lies nowhere.
        """
        region = np.empty(len(lon), np.int32)

        def some(start: int) -> int:
            part = slice(start, start + AT_ONCE)
            return self._part(self.regions.frame(lon[part]), lat[part], region[part])

        starts = range(0, len(lon), AT_ONCE)
        borders = sum(self._pool.map(some, starts) if len(starts) > 1 else map(some, starts))
        return Located(region=region, on_border=borders)

    def _part(self, x: Array, y: Array, out: Array) -> int:
        out[:] = self._cells.decide(x, y)
        unsure = np.flatnonzero(out == UNSURE)
        if len(unsure) == 0:
            return 0
        out[unsure], borders = self._exact(x[unsure], y[unsure])
        return borders

    def _doubly(self) -> Array:
        """Cells with edges that some region holds whole, for it overlaps with another: they do not know of it."""
        points = geo_library("shapely").points(self._cells.middle(self._cells.mixed))
        cell, region = self._tree.query(points, predicate="within")
        key = self._cells.mixed[cell] * len(self.shapes) + region
        known = np.repeat(self._cells.mixed, np.diff(self._cells.begin)) * len(self.shapes) + self._cells.touching
        return np.unique(key[~np.isin(key, known)] // len(self.shapes))

    def _exact(self, x: Array, y: Array) -> tuple[Array, int]:
        """The regions of points near borders, and how many points lie on one."""
        if len(x) == 0:
            return np.empty(0, np.int64), 0
        shapely = geo_library("shapely")
        point, region = self._tree.query(shapely.points(x, y), predicate="intersects")
        inside = shapely.contains_xy(self.shapes[region], x[point], y[point])
        found = np.full(len(x), len(self.shapes), np.int64)
        np.minimum.at(found, point[inside], region[inside])
        lost = np.zeros(len(x), bool)
        lost[point[~inside & (found[point] == len(self.shapes))]] = True
        on_border = np.flatnonzero(lost)
        for one in on_border:
            found[one] = self._border(float(x[one]), float(y[one]), region[point == one])
        found[found == len(self.shapes)] = OUTSIDE
        return found, len(on_border)

    def _border(self, x: float, y: float, touching: Array) -> int:
        """The region of a point on the border of ``touching``, places in the regions."""
        inside = [int(region) for region in touching if self._holds(int(region), x, y)]
        return min(inside) if inside else int(touching.min())

    def _holds(self, region: int, x: float, y: float) -> bool:
        """True if a region holds the point, moved to the east and, by far less, to the north; in exact arithmetic."""
        part = slice(self._edges.begin[region], self._edges.begin[region + 1])
        a, b = self._edges.a[part], self._edges.b[part]
        across = (a[:, 1] > y) != (b[:, 1] > y)
        a, b = a[across], b[across]
        certain = np.minimum(a[:, 0], b[:, 0]) > x
        crossings = int(certain.sum())
        unsure = ~certain & (np.maximum(a[:, 0], b[:, 0]) > x)
        for (ax, ay), (bx, by) in zip(a[unsure].tolist(), b[unsure].tolist(), strict=True):
            share = (Fraction(y) - Fraction(ay)) / (Fraction(by) - Fraction(ay))
            crossings += Fraction(ax) + share * (Fraction(bx) - Fraction(ax)) > Fraction(x)
        return crossings % 2 == 1
