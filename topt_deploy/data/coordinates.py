"""Where regions are: their longitudes and latitudes, checked, and their geometry as it was given."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data import positions
from topt_deploy.errors import BadData

from .columns import (
    GEOMETRY,
    TableReader,
    floats,
    some,
)

Array = np.ndarray[Any, Any]


def read_lonlat(source: TableReader, ids: Array) -> Array:
    given = source.has("lon") and source.has("lat")
    if given:
        lonlat = np.stack([floats(source, ids, "lon"), floats(source, ids, "lat")], axis=1)
    elif source.geometry is not None:
        from .geometry import centroids

        lonlat = centroids(_described(source), source.name, ids)
    else:
        raise BadData(
            "the regions' positions are absent",
            file=source.name,
            expected="columns lon and lat in degrees, or a GeoParquet geometry",
            found=f"columns {some(source.everything)}",
        )
    fill = ["lon", "lat"] if given else []
    outside = ~((np.abs(lonlat[:, 0]) <= 180) & (np.abs(lonlat[:, 1]) <= 90))  # NaN too
    if outside.any():
        source.refuse(
            "positions are not degrees",
            outside,
            "bad_position",
            fill=fill,
            column="lon, lat",
            ids=ids[outside],
            expected="lon in [-180, 180], lat in [-90, 90] (CRS84)",
            found=", ".join(f"({x:g}, {y:g})" for x, y in lonlat[outside][:3]),
            fix="reproject to CRS84; the reference system is never guessed",
        )
    _check_plausible(source, ids, lonlat, fill)
    return lonlat


def _check_plausible(source: TableReader, ids: Array, lonlat: Array, fill: Sequence[str]) -> None:
    """Refuse positions that no city's regions have, and warn of such as hardly any have: one wrong region moves all."""
    for what, bad, fix in positions.implausible(lonlat):
        if bad.any():
            source.refuse(
                what,
                bad,
                "bad_position",
                fill=fill,
                column="lon, lat",
                ids=ids[bad],
                expected="lon in [-180, 180], lat in [-90, 90] (CRS84), near the city's other regions",
                found=", ".join(f"({x:g}, {y:g})" for x, y in lonlat[bad][:3]),
                fix=fix,
            )
    if fill and source.geometry is not None:
        swapped = positions.swapped(lonlat, source.column(source.geometry), _described(source).schema.metadata or {})
        if swapped.any():
            source.refuse(
                "lon and lat are swapped: the geometry lies where (lat, lon) is",
                swapped,
                "bad_position",
                fill=fill,
                column="lon, lat",
                ids=ids[swapped],
                expected="lon the longitude, lat the latitude",
                found=", ".join(f"({x:g}, {y:g})" for x, y in lonlat[swapped][:3]),
                fix="swap the two columns, or drop them: the geometry suffices",
            )
    far = positions.remote(lonlat)
    if far.any():
        import logging  # which a sound city need not import

        logging.getLogger(__name__).warning(
            "%s: %d regions lie far from all others, which moves every region's position: %s",
            source.name, int(far.sum()), some(ids[far].tolist()),
        )  # fmt: skip


def described_geometry(source: TableReader) -> tuple[pa.ChunkedArray, bytes | None] | None:
    if source.geometry is None:
        return None
    geo = (_described(source).schema.metadata or {}).get(b"geo")
    return source.column(source.geometry), None if geo is None else _alone(geo, source.geometry)


def _alone(geo: bytes, column: str) -> bytes:
    """GeoParquet's key of a table that has this column alone, as ``geometry``; as it is where it is that already."""
    try:
        described = json.loads(geo)
        own = described["columns"][column]
        if set(described["columns"]) == {GEOMETRY} and "covering" not in own:
            return geo
        own = {key: value for key, value in own.items() if key != "covering"}  # which names columns that stay behind
        return json.dumps({**described, "primary_column": GEOMETRY, "columns": {GEOMETRY: own}}).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return geo  # whoever reads the shapes refuses it


def _described(source: TableReader) -> pa.Table:
    """The table with GeoParquet's key, which a file of Parquet's own GEOMETRY type may lack."""
    if source.file is None or b"geo" in source.metadata:
        return source.table
    from .geometry import with_geo_key

    return with_geo_key(source.table, source.file)
