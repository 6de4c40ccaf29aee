"""The edges of regions, and the borders that they make, each of them once."""

from typing import Any

import numpy as np

from topt_deploy.data.geometry import geo_library

Array = np.ndarray[Any, Any]


class Edges:
    """The edges of all rings of all shapes. S edges, U borders: edges of two regions with the same ends are one.

    Attributes:
        a, b: float64 (S, 2), the edges' ends.
        region: int64 (S,), whose they are, in order.
        begin: int64 (N + 1,), where each region's begin.
        ends: float64 (U, 4), the borders: x and y of one end, x and y of the other.
        owner: int64 (S,), the regions whose edge a border is, border by border.
        owner_begin: int64 (U + 1,), where each border's begin.
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
        self._borders()

    def _borders(self) -> None:
        a, b = self.a, self.b
        swap = (a[:, 0] > b[:, 0]) | ((a[:, 0] == b[:, 0]) & (a[:, 1] > b[:, 1]))
        ends = np.where(swap[:, None], np.hstack([b, a]), np.hstack([a, b])) + 0.0  # -0.0 is 0.0
        order = np.argsort(_hashed(ends), kind="stable")
        ends = ends[order]
        # Two borders of one hash, should there be such, come apart here.
        new = np.append(True, (ends[1:] != ends[:-1]).any(axis=1))[: len(ends)]
        self.ends = ends[new]
        self.owner = self.region[order]
        self.owner_begin = np.append(np.flatnonzero(new), len(ends))


def _hashed(rows: Array) -> Array:
    """A number for each row of numbers, the same for the same rows. (S, 4) → uint64 (S,)"""
    found = np.zeros(len(rows), np.uint64)
    for column in np.ascontiguousarray(rows.T).view(np.uint64):
        found = (found ^ column) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(29)
    return found
