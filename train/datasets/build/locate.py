"""Which region a point lies in, for millions of points: exact, and each point in one region at most.

A grid of cells lies over the city. Most cells lie wholly in one region or in none, and their points need no more than
a look at the cell. The others know the regions that they touch, and their points are tested by GEOS, whose test is
robust. Points that lie exactly on a border are decided in rational numbers, by one rule that does not depend on the
order of anything:

1. A point belongs to the region that holds it once it is moved to the east by less than any distance, and north by
   still less (the half-open rule of ray crossing: each border is part of one of its two sides).
2. Where that leads out of every region, it belongs to the first region by id on whose border it lies.
3. Where regions overlap, it belongs to the first by id.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from topt_deploy.geometry import geo_library

from .regions import Regions

Array = np.ndarray[Any, Any]

AT_ONCE = 1 << 15
"""Points that go through the grid together: what is made of them stays in the processor's cache."""
CELLS = 1024
"""Along each side, by default."""
CELLS_MOST = 4096
MIXED = -2
OUTSIDE = -1
_PAD = 1e-6  # of a cell: by how much a segment's cells are taken too wide, for its crossings are rounded
_SEGMENTS_AT_ONCE = 1 << 16


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
        cells: Cells along each side. More of them take more time to make, and leave fewer points for exact tests.
    """

    def __init__(self, regions: Regions, *, cells: int = CELLS) -> None:
        shapely = geo_library("shapely")
        self.regions = regions
        self.shapes = regions.shapes
        shapely.prepare(self.shapes)
        self._tree = shapely.STRtree(self.shapes)
        low_x, low_y, high_x, high_y = shapely.total_bounds(self.shapes).tolist()
        # One cell of margin on each side: whatever lies beyond is put there, and found outside.
        self._size = cells + 2
        self._scale = np.array([cells / max(high_x - low_x, 1e-9), cells / max(high_y - low_y, 1e-9)])
        self._origin = np.array([low_x, low_y]) - 1 / self._scale
        self.bounds = (low_x, low_y, high_x, high_y)
        self._rings = _Edges(self.shapes)
        cell, region = self._touched()
        self._cell = self._fill(_different(cell))
        self._candidates(cell, region)

    def locate(self, lon: Array, lat: Array) -> Located:
        """The regions of points.

        Args:
            lon, lat: float64 (P,), degrees; NaN lies nowhere.
        """
        region = np.empty(len(lon), np.int32)
        borders = 0
        for start in range(0, len(lon), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            borders += self._part(self.regions.frame(lon[part]), lat[part], region[part])
        return Located(region=region, on_border=borders)

    def _part(self, x: Array, y: Array, out: Array) -> int:
        cell = self._row(y) * self._size + self._column(x)
        held = self._cell.take(cell)
        out[:] = held
        mixed = np.flatnonzero(held == MIXED)
        if len(mixed) == 0:
            return 0
        found, borders = self._exact(x[mixed], y[mixed], cell[mixed])
        out[mixed] = found
        return borders

    def _column(self, x: Array) -> Array:
        return _bin(x, self._origin[0], self._scale[0], self._size)

    def _row(self, y: Array) -> Array:
        return _bin(y, self._origin[1], self._scale[1], self._size)

    def _exact(self, x: Array, y: Array, cell: Array) -> tuple[Array, int]:
        """The regions of points in cells that touch several, and how many points lie on a border."""
        shapely = geo_library("shapely")
        place = np.searchsorted(self._mixed, cell)
        begin, count = self._begin[place], self._begin[place + 1] - self._begin[place]
        point = np.repeat(np.arange(len(x)), count)
        nth = np.arange(len(point)) - np.repeat(np.cumsum(count) - count, count)
        region = self._touching[np.repeat(begin, count) + nth]
        inside = shapely.contains_xy(self.shapes[region], x[point], y[point])
        found = np.full(len(x), len(self.shapes), np.int64)
        np.minimum.at(found, point[inside], region[inside])
        open_ = found == len(self.shapes)
        left = open_[point]
        touches = np.zeros(len(point), bool)
        touches[left] = shapely.intersects_xy(self.shapes[region[left]], x[point[left]], y[point[left]])
        on_border = np.unique(point[touches])
        for one in on_border:
            found[one] = self._border(float(x[one]), float(y[one]), region[touches & (point == one)])
        found[found == len(self.shapes)] = OUTSIDE
        return found.astype(np.int32), len(on_border)

    def _border(self, x: float, y: float, touching: Array) -> int:
        """The region of a point on the border of ``touching``, places in the regions."""
        inside = [int(region) for region in touching if self._rings.holds(int(region), x, y)]
        return min(inside) if inside else int(touching.min())

    def _touched(self) -> tuple[Array, Array]:
        """Which cells the borders of which regions run through: pairs, (K,) and (K,), each once."""
        keys = [np.empty(0, np.int64)]
        many = len(self.shapes)
        for start in range(0, len(self._rings.region), _SEGMENTS_AT_ONCE):
            part = slice(start, start + _SEGMENTS_AT_ONCE)
            segment, cell = self._crossed(self._rings.a[part], self._rings.b[part])
            keys.append(_different(cell * many + self._rings.region[part][segment]))
        key = _different(np.concatenate(keys))
        return key // many, key % many

    def _crossed(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Which cells segments run through, rather too many than too few: pairs of a segment and a cell.

        *Shape:* (S, 2), (S, 2) → (K,), (K,)
        """
        a, b = (a - self._origin) * self._scale, (b - self._origin) * self._scale  # in cells
        swap = a[:, 1] > b[:, 1]
        a[swap], b[swap] = b[swap], a[swap]
        row = np.floor(a[:, 1] - _PAD).astype(np.int64)
        rows = np.floor(b[:, 1] + _PAD).astype(np.int64) - row + 1
        segment = np.repeat(np.arange(len(a)), rows)
        row = row[segment] + np.arange(len(segment)) - np.repeat(np.cumsum(rows) - rows, rows)
        height = (b - a)[:, 1]
        slope = np.divide(b[:, 0] - a[:, 0], height, out=np.zeros(len(a)), where=height > 0)
        ends = []
        for border in (row - _PAD, row + 1 + _PAD):  # where the segment enters the row, and where it leaves it
            y = np.clip(border, a[segment, 1], b[segment, 1])
            ends.append(a[segment, 0] + (y - a[segment, 1]) * slope[segment])
        level = (height <= 0)[segment]
        low = np.where(level, np.minimum(a, b)[segment, 0], np.minimum(*ends))
        high = np.where(level, np.maximum(a, b)[segment, 0], np.maximum(*ends))
        first = np.floor(low - _PAD).astype(np.int64)
        columns = np.floor(high + _PAD).astype(np.int64) - first + 1
        again = np.repeat(np.arange(len(segment)), columns)
        column = first[again] + np.arange(len(again)) - np.repeat(np.cumsum(columns) - columns, columns)
        last = self._size - 1
        return segment[again], np.clip(row[again], 0, last) * self._size + np.clip(column, 0, last)

    def _fill(self, mixed: Array) -> Array:
        """The region of every cell (size²): runs of cells that no border crosses lie in one, or in none."""
        kind = np.int16 if len(self.shapes) < 1 << 15 else np.int32
        cells = np.full(self._size * self._size, MIXED, kind)
        clear = np.ones(len(cells), bool)
        clear[mixed] = False
        new_row = np.arange(len(cells)) % self._size == 0
        begins = np.flatnonzero(clear & (new_row | ~np.roll(clear, 1)))
        change = np.flatnonzero(~clear | new_row)
        ends = np.append(change, len(cells))[np.searchsorted(change, begins, side="right")]
        middle = (begins + ends - 1) // 2
        held = self._holding(middle)
        for begin, end, region in zip(begins.tolist(), ends.tolist(), held.tolist(), strict=True):
            cells[begin:end] = region
        return cells

    def _centres(self, cell: Array) -> Array:
        return self._origin + (np.stack([cell % self._size, cell // self._size], axis=1) + 0.5) / self._scale

    def _holding(self, cell: Array) -> Array:
        """The first region by id that holds cells' middles, or :data:`OUTSIDE`."""
        shapely = geo_library("shapely")
        held = np.full(len(cell), len(self.shapes), np.int64)
        point, region = self._tree.query(shapely.points(self._centres(cell)), predicate="within")
        np.minimum.at(held, point, region)
        return np.where(held == len(self.shapes), OUTSIDE, held)

    def _candidates(self, cell: Array, region: Array) -> None:
        """For cells that borders cross: the regions that touch them, those that hold them whole as well."""
        self._mixed = _different(cell)
        many = len(self.shapes)
        key = cell * many + region
        if self.regions.overlap:  # else no region holds what another's border runs through
            points = geo_library("shapely").points(self._centres(self._mixed))
            middle, holds = self._tree.query(points, predicate="within")
            key = _different(np.concatenate([key, self._mixed[middle] * many + holds]))
        self._touching = key % many
        self._begin = np.searchsorted(key // many, self._mixed)
        self._begin = np.append(self._begin, len(key))


def _different(values: Array) -> Array:
    """The different values, sorted: ten times as fast as ``numpy.unique`` where most are near each other."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


def _bin(value: Array, origin: float, scale: float, size: int) -> Array:
    """The cell along one axis: a function that never falls, so that a cell's points lie between its borders."""
    where = value - origin
    where *= scale
    np.fmax(where, 0, out=where)  # NaN too
    np.fmin(where, size - 1, out=where)
    return where.astype(np.int64)


class _Edges:
    """The edges of all rings of all shapes. S edges.

    Attributes:
        a, b: float64 (S, 2), their ends.
        region: int64 (S,), whose they are, in order.
    """

    def __init__(self, shapes: Array) -> None:
        shapely = geo_library("shapely")
        parts, owner = shapely.get_parts(shapes, return_index=True)
        rings, of_part = shapely.get_rings(parts, return_index=True)
        corners, ring = shapely.get_coordinates(rings, return_index=True)
        same = ring[1:] == ring[:-1]
        self.a, self.b = corners[:-1][same], corners[1:][same]
        self.region = owner[of_part][ring[:-1][same]]
        self._begin = np.searchsorted(self.region, np.arange(len(shapes) + 1))

    def holds(self, region: int, x: float, y: float) -> bool:
        """Whether a region holds the point, moved to the east and, by far less, to the north; in exact arithmetic."""
        part = slice(self._begin[region], self._begin[region + 1])
        a, b = self.a[part], self.b[part]
        across = (a[:, 1] > y) != (b[:, 1] > y)
        a, b = a[across], b[across]
        certain = np.minimum(a[:, 0], b[:, 0]) > x
        crossings = int(certain.sum())
        unsure = ~certain & (np.maximum(a[:, 0], b[:, 0]) > x)
        for (ax, ay), (bx, by) in zip(a[unsure].tolist(), b[unsure].tolist(), strict=True):
            rise = Fraction(by) - Fraction(ay)
            at = Fraction(ax) + (Fraction(y) - Fraction(ay)) * (Fraction(bx) - Fraction(ax)) / rise
            crossings += at > Fraction(x)
        return crossings % 2 == 1
