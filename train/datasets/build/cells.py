"""A grid of cells over regions: most lie wholly in one, and the others know the few edges that run through them.

A point in a cell with edges is compared with the cell's middle, of which it is known once and for all which regions
hold it. On the way there, first along the parallel and then along the meridian, it changes sides with every edge that
it crosses. Where a crossing is so close that rounding could matter, the answer is :data:`UNSURE`.
"""

from typing import Any

import numpy as np

from topt_deploy.data.geometry import geo_library

Array = np.ndarray[Any, Any]

OUTSIDE, MIXED, UNSURE = -1, -2, -3
NEAR = 1e-10
"""Degrees: what is nearer than that is not decided here. Rounding errs by less than a thousandth of it."""
_NEAR_CELL = 1e-4  # of a cell: the same along a row, whose crossings are kept with less precision
_PAD = 1e-6  # of a cell: by how much a segment's cells are taken too wide, for its crossings are rounded
_AT_ONCE = 1 << 14


class Edges:
    """The edges of all rings of all shapes. S edges.

    Attributes:
        a, b: float64 (S, 2), their ends.
        region: int64 (S,), whose they are, in order.
        begin: int64 (N + 1,), where each region's begin.
    """

    def __init__(self, shapes: Array) -> None:
        shapely = geo_library("shapely")
        parts, owner = shapely.get_parts(shapes, return_index=True)
        rings, of_part = shapely.get_rings(parts, return_index=True)
        corners, ring = shapely.get_coordinates(rings, return_index=True)
        same = ring[1:] == ring[:-1]
        self.a, self.b = corners[:-1][same], corners[1:][same]
        self.region = owner[of_part][ring[:-1][same]]
        self.begin = np.searchsorted(self.region, np.arange(len(shapes) + 1))


class Cells:
    """The grid.

    Args:
        edges: Of N regions.
        regions: N.
        bounds: West, south, east, north of all of them.
        cells: Cells along each side.

    Attributes:
        size: Cells along each side with two of margin at both ends: what lies beyond, or nowhere, is put into the
            outermost, which no edge comes near.
        label: Of every cell, the first region that holds it whole, :data:`OUTSIDE` or :data:`MIXED`.
        mixed: The cells with edges, sorted.
        touching: The regions whose edges run through them, cell by cell.
        begin: Where each cell's begin.
    """

    def __init__(self, edges: Edges, regions: int, bounds: tuple[float, float, float, float], cells: int) -> None:
        west, south, east, north = bounds
        self._edges, self._many = edges, regions
        self.size = cells + 4
        self._scale = np.array([cells / max(east - west, 1e-9), cells / max(north - south, 1e-9)])
        self._origin = np.array([west, south]) - 2 / self._scale
        self._middle = self._origin[:, None] + (np.arange(self.size) + 0.5) / self._scale[:, None]  # (2, size)
        cell, edge = self._entries()
        self._index(cell, edge)
        self._scan()
        self._fill()
        self._middles()

    def of(self, x: Array, y: Array) -> Array:
        """The cells of points, int64 (P,); NaN is in the margin."""
        column = _bin(x, self._origin[0], self._scale[0], self.size)
        row = _bin(y, self._origin[1], self._scale[1], self.size)
        row *= self.size
        row += column
        return row

    def middle(self, cell: Array) -> Array:
        """The middles of cells, (K,) → (K, 2)."""
        return np.stack([self._middle[0][cell % self.size], self._middle[1][cell // self.size]], axis=1)

    def decide(self, x: Array, y: Array, cell: Array) -> Array:
        """The first region by id that holds each point of cells with edges; :data:`OUTSIDE`, or :data:`UNSURE`.

        *Shape:* (P,), (P,), (P,) → (P,)
        """
        place = self._place.take(cell)
        first, many = self._first[place], self._first[place + 1] - self._first[place]
        point, entry = _expand(first, many)
        ax, ay, bx, by = self._ends.take(entry, axis=1)
        px, py = x[point], y[point]
        qx, qy = self._middle[0][cell % self.size][point], self._middle[1][cell // self.size][point]
        flips, unsure = _crossed(px, py, qx, qy, ax, ay, bx, by)
        # A slot is a region of a cell; the slots of a point follow each other.
        slots = self.begin[place + 1] - self.begin[place]
        offset = np.cumsum(slots) - slots
        slot = self._entry_slot[entry] - self.begin[place][point] + offset[point]
        total = int(slots.sum())
        owner, at = _expand(self.begin[place], slots)
        inside = self._inside[at] ^ (np.bincount(slot[flips], minlength=total) % 2).astype(bool)
        lost = np.zeros(len(x), bool)
        lost[point[unsure]] = True
        lost[owner[self._unknown[at]]] = True
        found = np.full(len(x), self._many, np.int64)
        np.minimum.at(found, owner[inside], self.touching[at[inside]])
        found[found == self._many] = OUTSIDE
        found[lost] = UNSURE
        return found

    def _entries(self) -> tuple[Array, Array]:
        """The cells that edges run through, rather too many than too few: pairs of a cell and an edge."""
        cells, edges = [], []
        for start in range(0, len(self._edges.region), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            edge, cell = self._through(self._edges.a[part], self._edges.b[part])
            cells.append(cell)
            edges.append(edge + start)
        return np.concatenate(cells), np.concatenate(edges)

    def _through(self, a: Array, b: Array) -> tuple[Array, Array]:
        """The cells of segments, row by row: pairs of a segment and a cell.

        *Shape:* (S, 2), (S, 2) → (K,), (K,)
        """
        a, b = (a - self._origin) * self._scale, (b - self._origin) * self._scale  # in cells
        swap = a[:, 1] > b[:, 1]
        a[swap], b[swap] = b[swap], a[swap]
        row = np.floor(a[:, 1] - _PAD).astype(np.int64)
        rows = np.floor(b[:, 1] + _PAD).astype(np.int64) - row + 1
        segment, row = _expand(row, rows)
        height = (b - a)[:, 1]
        slope = np.divide((b - a)[:, 0], height, out=np.zeros(len(a)), where=height > 0)
        ends = []
        for border in (row - _PAD, row + 1 + _PAD):  # where the segment enters the row, and where it leaves it
            y = np.clip(border, a[segment, 1], b[segment, 1])
            ends.append(a[segment, 0] + (y - a[segment, 1]) * slope[segment])
        level = (height <= 0)[segment]
        low = np.where(level, np.minimum(a, b)[segment, 0], np.minimum(*ends))
        high = np.where(level, np.maximum(a, b)[segment, 0], np.maximum(*ends))
        first = np.floor(low - _PAD).astype(np.int64)
        again, column = _expand(first, np.floor(high + _PAD).astype(np.int64) - first + 1)
        last = self.size - 1
        return segment[again], np.clip(row[again], 0, last) * self.size + np.clip(column, 0, last)

    def _index(self, cell: Array, edge: Array) -> None:
        """Sort the edges by cell and region."""
        key = cell * self._many + self._edges.region[edge]
        order = np.argsort(key, kind="stable")
        key, edge = key[order], edge[order]
        new = np.append(True, key[1:] != key[:-1])
        slots = key[new]
        self.touching, owner = slots % self._many, slots // self._many
        new_cell = np.append(True, owner[1:] != owner[:-1])
        self.mixed = owner[new_cell]
        self.begin = np.append(np.flatnonzero(new_cell), len(slots))
        self._slot_cell = owner
        self._entry_slot = (np.cumsum(new) - 1).astype(np.int32)
        # Edge by edge as the cells ask for them: ax, ay, bx, by.
        self._ends = np.stack([*self._edges.a.T, *self._edges.b.T]).take(edge, axis=1)
        self._place = np.zeros(self.size * self.size, np.int32)
        self._place[self.mixed] = np.arange(len(self.mixed))
        self._first = np.append(np.flatnonzero(new)[self.begin[:-1]], len(key))

    def _scan(self) -> None:
        """Where borders cross the middle of each row: sorted by region, row and position."""
        a, b, middles = self._edges.a, self._edges.b, self._middle[1]
        low, high = np.minimum(a[:, 1], b[:, 1]), np.maximum(a[:, 1], b[:, 1])
        # A corner on the line counts as below it, as everywhere here: rows with low <= middle < high.
        first = np.searchsorted(middles, low, side="left")
        edge, row = _expand(first, np.searchsorted(middles, high, side="left") - first)
        share = (middles[row] - a[edge, 1]) / (b[edge, 1] - a[edge, 1])
        x = a[edge, 0] + share * (b[edge, 0] - a[edge, 0])
        group = self._edges.region[edge] * self.size + row
        self._line = np.sort(group * (2.0 * self.size) + (x - self._origin[0]) * self._scale[0])

    def _fill(self) -> None:
        """The region of every cell, from the crossings: between an odd one and the next, cells' middles lie inside."""
        kind = np.int16 if self._many < 1 << 15 else np.int32
        label = np.full(self.size * self.size, OUTSIDE, kind)
        group = self._line // (2.0 * self.size)
        at = self._line - group * (2.0 * self.size) - 0.5  # in cells, from middle to middle
        # Each region's crossings of a row are even in number.
        enter = np.ceil(at[::2]).astype(np.int64)
        leave = np.ceil(at[1::2]).astype(np.int64)
        region, row = np.divmod(group[::2].astype(np.int64), self.size)
        begin, end = row * self.size + enter, row * self.size + leave
        for i in range(len(region) - 1, -1, -1):  # the first by id is written last
            label[begin[i] : end[i]] = region[i]
        label[self.mixed] = MIXED
        self.label = label

    def _middles(self) -> None:
        """Of every cell with edges, and every region that touches it: whether that holds its middle."""
        column, row = self._slot_cell % self.size, self._slot_cell // self.size
        group = (self.touching * self.size + row) * (2.0 * self.size)
        begin = np.searchsorted(self._line, group)
        before = np.searchsorted(self._line, group + column + 0.5)
        self._inside = (before - begin) % 2 == 1
        padded = np.concatenate([[-np.inf], self._line, [np.inf]])
        place = group + column + 0.5
        self._unknown = np.minimum(place - padded[before], padded[before + 1] - place) < _NEAR_CELL


def _crossed(
    px: Array, py: Array, qx: Array, qy: Array, ax: Array, ay: Array, bx: Array, by: Array
) -> tuple[Array, Array]:
    """Find the edges a-b that are crossed on the way from p along the parallel to q's meridian and along that to q.

    *Shape:* (K,) each → places of an odd number of crossings, bool (K,): too close to tell
    """
    flips = np.zeros(len(px), bool)
    close = (np.abs(ay - py) < NEAR) | (np.abs(by - py) < NEAR)
    unsure = close & (px > np.minimum(ax, bx) - NEAR) & (px < np.maximum(ax, bx) + NEAR)
    ways = ((ax, ay, bx, by, py, px, qx), (ay, ax, by, bx, qx, py, qy))  # along the parallel, along the meridian
    for u, v, u2, v2, level, one, other in ways:
        across = np.flatnonzero((v > level) != (v2 > level))
        share = (level[across] - v[across]) / (v2[across] - v[across])
        at = u[across] + share * (u2[across] - u[across])
        one, other = one[across], other[across]
        flips[across] ^= (at > one) != (at > other)
        unsure[across] |= (np.abs(at - one) < NEAR) | (np.abs(at - other) < NEAR)
    return flips, unsure


def _expand(first: Array, many: Array) -> tuple[Array, Array]:
    """Ranges ``first[i] … first[i] + many[i] - 1``, one after the other: whose each number is, and the number."""
    owner = np.repeat(np.arange(len(first)), many)
    return owner, first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(many) - many, many)


def _bin(value: Array, origin: float, scale: float, size: int) -> Array:
    """The cell along one axis: a function that never falls, so that a cell's points lie between its borders."""
    where = value - origin
    where *= scale
    np.fmax(where, 0, out=where)  # NaN too
    np.fmin(where, size - 1, out=where)
    return where.astype(np.int64)
