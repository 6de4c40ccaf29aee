"""A grid of cells over regions: most lie wholly in one, and the others know the few edges that run through them.

A point in a cell with edges is compared with the cell's middle, of which it is known once and for all which regions
hold it. On the way there, first along the parallel and then along the meridian, it changes sides with every edge that
it crosses: two regions at once where the edge is their common border. Where a crossing is so close that rounding could
matter, the answer is :data:`UNSURE`.
"""

from typing import Any

import numpy as np

from .edges import Edges

Array = np.ndarray[Any, Any]

OUTSIDE, UNSURE = -1, -2
NEAR = 1e-10
"""Degrees: what is nearer than that is not decided here. Rounding errs by less than a thousandth of it."""
_SHIFT = 2
BLOCK = 1 << _SHIFT
"""Cells along each side of a block: blocks that lie wholly in one region need no cells, and most do."""
_MIXED = -3
"""Of a cell with edges: this, less its place among such cells."""
_REGIONS_MOST, _EDGES_MOST = 64, 512
"""In one cell. More of them are decided by the exact test, which asks a tree for the regions."""
_NEAR_CELL = 1e-4  # of a cell: what is nearer along a row, whose crossings are kept with less precision
_PAD = 1e-6  # of a cell: by how much a segment's cells are taken too wide, for its crossings are rounded
_AT_ONCE = 1 << 14


class Cells:
    """The grid.

    Args:
        edges: Of N regions.
        regions: N.
        bounds: West, south, east, north of all of them.
        cells: Cells along each side, roughly.

    Attributes:
        size: Cells along each side with a margin of two or more at both ends: what lies beyond, or nowhere, is put
            into the outermost, which no edge comes near.
        mixed: The cells with edges, sorted. M cells.
        touching: The regions whose edges run through them, cell by cell.
        begin: Where each cell's begin, (M + 1,).
    """

    def __init__(self, edges: Edges, regions: int, bounds: tuple[float, float, float, float], cells: int) -> None:
        west, south, east, north = bounds
        self._edges, self._many = edges, regions
        self.size = -(-(cells + 4) // BLOCK) * BLOCK
        self._scale = np.array([cells / max(east - west, 1e-9), cells / max(north - south, 1e-9)])
        self._origin = np.array([west, south]) - 2 / self._scale
        self._middle = self._origin[:, None] + (np.arange(self.size) + 0.5) / self._scale[:, None]  # (2, size)
        cell, edge = self._entries()
        owner = self._index(cell, edge)
        line = self._scan()
        self._prepare(edge, *self._middles(owner, line))
        self._blocks(self._fill(line))

    def decide(self, x: Array, y: Array) -> Array:
        """The first region by id that holds each point; :data:`OUTSIDE`, or :data:`UNSURE`. NaN lies outside.

        *Shape:* (P,), (P,) → int32 (P,)
        """
        column = _bin(x, self._origin[0], self._scale[0], self.size)
        row = _bin(y, self._origin[1], self._scale[1], self.size)
        block = row >> _SHIFT  # of 64-bit numbers, shifts are far faster than divisions
        block *= self.size // BLOCK
        block += column >> _SHIFT
        found = self._block.take(block)
        at = np.flatnonzero(found < OUTSIDE)
        column, row = column.take(at), row.take(at)
        within = ((OUTSIDE - 1 - found.take(at)) << _SHIFT) + (row & (BLOCK - 1))
        code = self._cell.take((within << _SHIFT) + (column & (BLOCK - 1)))
        mixed = np.flatnonzero(code <= _MIXED)
        if len(mixed):
            place = at.take(mixed)
            code[mixed] = self._side(x.take(place), y.take(place), column.take(mixed), _MIXED - code.take(mixed))
        found[at] = code
        return found

    def middle(self, cell: Array) -> Array:
        """The middles of cells, (K,) → (K, 2)."""
        return np.stack([self._middle[0][cell % self.size], self._middle[1][cell // self.size]], axis=1)

    def exclude(self, cell: Array) -> None:
        """Leave the points of cells, some of :attr:`mixed`, to the exact test."""
        self._write(cell, np.full(len(cell), UNSURE, np.int32))

    def _side(self, x: Array, y: Array, column: Array, place: Array) -> Array:
        """The same of points in cells with edges; ``place`` is the cells' among them."""
        first = self._first.take(place)
        many = self._first.take(place + 1) - first
        point, entry = _expand(first, many)
        x0, y0, y1, slope, height = self._border.take(entry, axis=0).T
        px, py = (x - self._middle[0].take(column)).take(point), y.take(point)
        at = (py - y0) * slope + x0  # where the edge crosses the parallel, from the middle
        across = (y0 <= py) & (py < y1)
        flips = ((at > px) != (at > 0)) & across
        flips ^= height > py  # the meridian
        unsure = (np.abs(at - px) < NEAR) | (np.abs(at) < NEAR)
        unsure &= across
        for level in (y0, y1, height):
            unsure |= np.abs(level - py) < NEAR
        offset = np.cumsum(many) - many
        inside = self._inside.take(place) ^ np.bitwise_xor.reduceat(self._sides.take(entry) * flips, offset)
        # A bit is a region that touches the cell, the lowest the first by id.
        bit = np.where(inside == 0, 0, np.bitwise_count(inside ^ (inside - np.uint64(1))) - 1)
        found = self.touching.take(self.begin.take(place) + bit)
        found[inside == 0] = OUTSIDE
        found[point[unsure]] = UNSURE
        return found

    def _entries(self) -> tuple[Array, Array]:
        """The cells that borders run through, rather too many than too few: pairs of a cell and a border, by cell."""
        cells, edges = [], []
        for start in range(0, len(self._edges.ends), _AT_ONCE):
            ends = self._edges.ends[start : start + _AT_ONCE]
            edge, cell = self._through(ends[:, :2].copy(), ends[:, 2:].copy())
            cells.append(cell.astype(np.int32))
            edges.append((edge + start).astype(np.int32))
        cell, edge = np.concatenate(cells), np.concatenate(edges)
        order = np.argsort(cell, kind="stable")
        return cell[order], edge[order]

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

    def _index(self, cell: Array, edge: Array) -> Array:
        """Sort out which cells there are, which regions touch them, and which of those each border divides.

        Returns:
            int64 (Q,): of each pair of a cell and a region that touches it, the cell.
        """
        new = np.append(True, cell[1:] != cell[:-1])
        self.mixed = cell[new].astype(np.int64)
        self._first = np.append(np.flatnonzero(new), len(cell)).astype(np.int32)
        # A border is the edge of one region, of two, or of more where regions overlap.
        first = self._edges.owner_begin[edge]
        many = self._edges.owner_begin[edge + 1] - first
        entry, owner = _expand(first, many)
        key = cell[entry].astype(np.int64) * self._many + self._edges.owner[owner]
        pairs = np.sort(key)  # np.unique asks a hash table, which is slower
        pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
        self.touching = (pairs % self._many).astype(np.int32)
        of_cell = pairs // self._many
        self.begin = np.searchsorted(of_cell, np.append(self.mixed, self.size**2)).astype(np.int32)
        place = np.cumsum(new) - 1
        bit = np.searchsorted(pairs, key) - self.begin[place[entry]]
        bits = np.left_shift(np.uint64(1), np.minimum(bit, 63).astype(np.uint64))
        self._sides = np.bitwise_xor.reduceat(bits, np.cumsum(many) - many)
        return of_cell

    def _scan(self) -> Array:
        """Where edges cross the middle of each row: sorted by region, row and position."""
        a, b, middles = self._edges.a, self._edges.b, self._middle[1]
        low, high = np.minimum(a[:, 1], b[:, 1]), np.maximum(a[:, 1], b[:, 1])
        # A corner on the line counts as below it, as everywhere here: rows with low <= middle < high.
        first = np.searchsorted(middles, low, side="left")
        edge, row = _expand(first, np.searchsorted(middles, high, side="left") - first)
        share = (middles[row] - a[edge, 1]) / (b[edge, 1] - a[edge, 1])
        x = a[edge, 0] + share * (b[edge, 0] - a[edge, 0])
        group = self._edges.region[edge] * self.size + row
        return np.sort(group * (2.0 * self.size) + (x - self._origin[0]) * self._scale[0])

    def _middles(self, cell: Array, line: Array) -> tuple[Array, Array]:
        """Of every pair of a cell and a region that touches it: whether that holds its middle, and if that is sure."""
        column, row = cell % self.size, cell // self.size
        group = (self.touching.astype(np.int64) * self.size + row) * (2.0 * self.size)
        place = group + column + 0.5
        before = np.searchsorted(line, place)
        padded = np.concatenate([[-np.inf], line, [np.inf]])
        near = np.minimum(place - padded[before], padded[before + 1] - place) < _NEAR_CELL
        return (before - np.searchsorted(line, group)) % 2 == 1, ~near

    def _prepare(self, edge: Array, inside: Array, sure: Array) -> None:
        """What a point asks of its cell: its borders, seen from the middle, and which regions hold that."""
        x0, y0, x1, y1 = self._edges.ends.take(edge, axis=0).T
        up = y0 > y1
        x0, y0, x1, y1 = (np.where(up, one, other) for one, other in ((x1, x0), (y1, y0), (x0, x1), (y0, y1)))
        entries = np.diff(self._first)
        cell = np.repeat(self.mixed, entries)
        qx, qy = self._middle[0][cell % self.size], self._middle[1][cell // self.size]
        slope = np.divide(x1 - x0, y1 - y0, out=np.zeros(len(x0)), where=y1 > y0)
        meets = (x0 > qx) != (x1 > qx)
        height = np.full(len(x0), -np.inf)  # where the border crosses the middle's meridian
        height[meets] = (y0 + (qx - x0) * ((y1 - y0) / np.where(x1 == x0, 1, x1 - x0)))[meets]
        self._border = np.stack([x0 - qx, y0, y1, slope, height], axis=1)
        bit = np.arange(len(self.touching)) - np.repeat(self.begin[:-1], np.diff(self.begin))
        bits = np.left_shift(np.uint64(1), np.minimum(bit, 63).astype(np.uint64)) * inside
        # From the middle down to below all borders of the cell: from there each point comes up to its own height.
        self._inside = np.bitwise_xor.reduceat(bits, self.begin[:-1])
        self._inside ^= np.bitwise_xor.reduceat(self._sides * (height > qy), self._first[:-1])
        hard = np.diff(self.begin) > _REGIONS_MOST
        hard |= entries > _EDGES_MOST
        hard |= np.logical_or.reduceat(~sure, self.begin[:-1])
        hard |= np.logical_or.reduceat(np.abs(height - qy) < NEAR, self._first[:-1])
        self._hard = hard

    def _fill(self, line: Array) -> Array:
        """The first region by id that holds each cell's middle, (size, size): between an odd crossing and the next."""
        group = line // (2.0 * self.size)
        at = line - group * (2.0 * self.size) - 0.5  # in cells, from middle to middle
        # Each region's crossings of a row are even in number.
        enter, leave = np.ceil(at[::2]).astype(np.int64), np.ceil(at[1::2]).astype(np.int64)
        region, row = np.divmod(group[::2].astype(np.int64), self.size)
        begin, end = row * self.size + enter, row * self.size + leave
        kind = np.int16 if self._many < 1 << 15 else np.int32
        order = np.argsort(begin)
        bounds = np.stack([begin[order], end[order]], axis=1).ravel()
        gaps = np.diff(bounds, prepend=0, append=self.size**2)
        if (gaps >= 0).all():
            values = np.full(len(gaps), OUTSIDE, kind)
            values[1::2] = region[order]
            return np.repeat(values, gaps).reshape(self.size, self.size)
        label = np.full(self.size * self.size, OUTSIDE, kind)  # some overlap
        for i in range(len(region) - 1, -1, -1):  # the first by id is written last
            label[begin[i] : end[i]] = region[i]
        return label.reshape(self.size, self.size)

    def _blocks(self, label: Array) -> None:
        """Keep cells of those blocks only that do not lie in one region."""
        side = self.size // BLOCK
        tiles = label.reshape(side, BLOCK, side, BLOCK)
        low, high = tiles.min(axis=(1, 3)), tiles.max(axis=(1, 3))
        split = low != high
        split[self.mixed // self.size // BLOCK, self.mixed % self.size // BLOCK] = True
        row, column = np.nonzero(split)
        self._cell = tiles[row, :, column, :].astype(np.int32).ravel()
        self._block = low.astype(np.int32)
        self._block[split] = OUTSIDE - 1 - np.arange(len(row))
        self._block = self._block.ravel()
        self._write(self.mixed, np.where(self._hard, UNSURE, _MIXED - np.arange(len(self.mixed))))

    def _write(self, cell: Array, code: Array) -> None:
        row, column = cell // self.size, cell % self.size
        block = OUTSIDE - 1 - self._block[row // BLOCK * (self.size // BLOCK) + column // BLOCK]
        self._cell[(block * BLOCK + row % BLOCK) * BLOCK + column % BLOCK] = code


def _expand(first: Array, many: Array) -> tuple[Array, Array]:
    """Ranges ``first[i] … first[i] + many[i] - 1``, one after the other: whose each number is, and the number."""
    owner = np.repeat(np.arange(len(first)), many)
    return owner, np.arange(len(owner)) + (first - (np.cumsum(many) - many)).take(owner)


def _bin(value: Array, origin: float, scale: float, size: int) -> Array:
    """The cell along one axis: a function that never falls, so that a cell's points lie between its borders."""
    where = value - origin
    where *= scale
    np.fmax(where, 0, out=where)  # NaN too
    np.fmin(where, size - 1, out=where)
    return where.astype(np.intp)
