"""Positions that cannot be true. One region at (0, 0) moves the centre, and with it every region's position."""

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]

SOUTH, NORTH = -60.0, 84.0
"""Degrees of latitude that no city lies beyond: Antarctica begins at -60, and land ends at 83.7."""
FAR_KM, FAR_TIMES = 300.0, 20.0
"""How far from the others' middle a region is warned of: so many km, and so many times the median distance."""
ABSURD_KM, ABSURD_TIMES = 2000.0, 50.0
"""From where on it is refused. Tokyo's farthest island is 1,860 km from the city; the farthest of a country's parts
is less than 50 times as far as its parts are on the median."""
LOOKED_AT = 3
"""Rows whose geometry is looked at first: columns are swapped in all rows or in none."""
EARTH_KM = 6371.0
NEAR_DEGREES, APART_DEGREES = 1.0, 5.0
_POINT, _LINE, _POLYGON, _LAST = 1, 2, 3, 7  # WKB's codes


def implausible(lonlat: Array) -> Iterator[tuple[str, Array, str]]:
    """Find faults of positions (N, 2) in degrees: the fault, bool (N,) of the regions that have it, and the remedy."""
    yield (
        "positions are (0, 0), which stands for no position",
        (lonlat == 0).all(axis=1),
        "give these regions their positions",
    )
    yield (
        "positions lie where no city does; lon and lat may be swapped",
        (lonlat[:, 1] < SOUTH) | (lonlat[:, 1] > NORTH),
        "write the longitude into lon and the latitude into lat",
    )
    yield (
        "positions lie absurdly far from all other regions",
        _beyond(lonlat, ABSURD_KM, ABSURD_TIMES),
        "correct them (a sign, a zero, swapped columns), or write one file per city",
    )


def remote(lonlat: Array) -> Array:
    """Tell the regions that lie far from the others, bool (N,): possible, and rarely meant."""
    return _beyond(lonlat, FAR_KM, FAR_TIMES)


def _beyond(lonlat: Array, km: float, times: float) -> Array:
    if len(lonlat) < 3:  # of two, neither is the one that is wrong
        return np.zeros(len(lonlat), bool)
    lon, lat = np.radians(lonlat).T
    unit = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    away = EARTH_KM * np.linalg.norm(unit - _median(unit), axis=1)
    return np.asarray(away > max(km, times * float(_median(away))))


def _median(values: Array) -> Array:
    """``np.median(values, axis=0)``, which would import numpy.ma at every start of topt-run."""
    low, high = (len(values) - 1) // 2, len(values) // 2
    ordered = np.partition(values, (low, high), axis=0)
    return np.asarray((ordered[low] + ordered[high]) / 2)


def swapped(lonlat: Array, geometry: pa.ChunkedArray, metadata: Mapping[bytes, bytes]) -> Array:
    """Tell the regions whose geometry lies at (lat, lon) and not at (lon, lat), bool (N,).

    Only a geometry that says of itself that it is in degrees is looked at, and only a corner of each.
    """
    found = np.zeros(len(lonlat), bool)
    if len(lonlat) == 0 or not _in_degrees(metadata) or not _is_wkb(geometry.type):
        return found

    def is_swapped(row: int) -> bool:
        corner = first_corner(geometry[row].as_py())
        if corner is None:
            return False
        off, off_swapped = (np.abs(np.array(corner) - place).max() for place in (lonlat[row], lonlat[row][::-1]))
        return bool(off > APART_DEGREES and off_swapped < NEAR_DEGREES)

    if any(is_swapped(row) for row in range(0, len(lonlat), max(1, len(lonlat) // LOOKED_AT))):
        found = np.array([is_swapped(row) for row in range(len(lonlat))])
    return found


def _is_wkb(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _in_degrees(metadata: Mapping[bytes, bytes]) -> bool:
    try:
        columns = json.loads(metadata[b"geo"])["columns"].values()
        return all("crs" not in facts or (facts["crs"] or {}).get("type") == "GeographicCRS" for facts in columns)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def first_corner(wkb: bytes | None) -> tuple[float, float] | None:
    """The first pair of coordinates of a shape in WKB; None where there is none."""
    position = 0
    if wkb is None:
        return None
    try:
        for _ in range(4):  # a polygon of a multipolygon of a collection
            order = "<" if wkb[position] else ">"
            (code,) = struct.unpack_from(f"{order}I", wkb, position + 1)
            kind = (code & 0xFFFF) % 1000
            position += 9 if code >> 29 & 1 else 5
            if kind in (_POINT, _LINE, _POLYGON):
                x, y = struct.unpack_from(f"{order}dd", wkb, position + 4 * (kind - _POINT))
                return (x, y) if np.isfinite([x, y]).all() else None
            if kind > _LAST:
                return None
            position += 4
    except (IndexError, struct.error, TypeError):
        pass
    return None
