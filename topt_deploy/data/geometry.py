"""Region shapes: GeoParquet and GIS files in, centroids and GIS files out; always longitude, latitude.

A coordinate reference system is read, never guessed: a geometry that states none is refused. The libraries of
the ``geo`` extra are imported where they are used, for most predictions need only the columns lon and lat.
"""

import importlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.errors import BadConfig, BadData, BadRows
from topt_deploy.hardening.wkb_depth import is_shallow

from .columns import GEOMETRY
from .parquet import ParquetFile
from .parquet_parts import ParquetParts

Array = np.ndarray[Any, Any]
LONLAT_CRS = {"OGC:CRS84", "EPSG:4326"}
"""Accepted systems: x is the longitude in both, for GeoParquet overrides the authority's axis order."""
FARTHEST = (360.0, 90.0)
"""Degrees of longitude and latitude beyond which a shape is in another system, whatever its file says. Some count
longitudes from 0 to 360."""


def centroids(table: pa.Table, name: str, ids: Array) -> Array:
    """Planar centroids of a table's GeoParquet geometry.

    Args:
        table: Has a WKB geometry column, and the ``geo`` key of GeoParquet 1.0 to 2.0 in its schema metadata
            (:func:`with_geo_key` derives it from Parquet's own GEOMETRY type where it is absent).
        name: The table's name in errors.
        ids: str (N,), the region id of each row.

    Returns:
        float64 (N, 2), longitude and latitude in degrees.

    Raises:
        BadData: If the reference system is unstated or not CRS84, or a geometry is null, empty or invalid.
    """
    return lonlat_of(read_shapes(table, name, ids))


def read_shapes(table: pa.Table, name: str, ids: Array) -> Array:
    """The shapes (N,) of a table's GeoParquet geometry, none of them null, empty or invalid.

    Args, Raises: Of :func:`centroids`.
    """
    column = check_geo_key(table, name)
    return checked_shapes(table.column(column), name, column, ids)


def with_geo_key(table: pa.Table, file: ParquetFile | ParquetParts) -> pa.Table:
    """Describe native GEOMETRY columns in the table's ``geo`` key, as GeoParquet does.

    pyarrow reads Parquet's GEOMETRY and GEOGRAPHY types (GeoParquet 2.0, whose ``geo`` key is optional) as
    plain binary and drops their reference system; only the file's own schema still tells it.
    """
    metadata = table.schema.metadata or {}
    if b"geo" in metadata:
        return table
    columns: dict[str, dict[str, object]] = {}
    for name, logical in file.logical_types().items():
        native = json.loads(logical)
        if native["Type"] in {"Geometry", "Geography"} and name in table.column_names:
            crs = native.get("crs") or "OGC:CRS84"
            if crs.startswith("projjson:"):  # names a key of the file's metadata
                crs = file.metadata.get(crs.removeprefix("projjson:").encode(), b"null").decode(errors="replace")
            columns[name] = {"encoding": "WKB", "geometry_types": [], "crs": crs}
    if not columns:
        return table
    primary = GEOMETRY if GEOMETRY in columns else next(iter(columns))
    geo = {"version": "2.0.0", "primary_column": primary, "columns": columns}
    return table.replace_schema_metadata({**metadata, b"geo": json.dumps(geo).encode()})


def geo_metadata(geometry_types: Iterable[str]) -> bytes:
    """The ``geo`` value of a GeoParquet 1.1 file with one WKB column ``geometry``; no ``crs`` means CRS84."""
    column = {"encoding": "WKB", "geometry_types": sorted(set(geometry_types))}
    return json.dumps({"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}}).encode()


def geometry_types(wkb: pa.Array) -> list[str]:
    """The names of the geometry types that occur, as GeoParquet spells them."""
    shapely = geo_library("shapely")
    shapes = decode_wkb(wkb.to_numpy(zero_copy_only=False))
    if shapely.is_missing(shapes).any():
        raise BadData(
            "geometries cannot be used", column=GEOMETRY, expected="WKB in every row", found="null or not WKB"
        )
    flat, solid = (sorted({s.geom_type for s in shapes[shapely.has_z(shapes) == z]}) for z in (False, True))
    return flat + [f"{name} Z" for name in solid]


def map_shapes(table: pa.Table, name: str, ids: Array) -> pa.Array:
    """A table's GeoParquet geometry as WKB for a map, which is labelled as longitude and latitude.

    Args, Raises: Of :func:`centroids`; but shapes that are empty or cross themselves are drawn as they are.
    """
    try:
        column = check_geo_key(table, name)
        return wkb_of(checked_shapes(table.column(column), name, column, ids, degrees=True, usable=False))
    except BadData as error:
        error.fix = "mend the geometry, or drop the column: the map then has points at lon and lat"
        raise


def geo_library(module: str) -> Any:
    """A library of the ``geo`` extra.

    Raises:
        BadConfig: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadConfig(
            f"reading or writing geometries needs {module}, which is not installed",
            fix="pip install 'topt-deploy[geo]', or give columns lon and lat in degrees instead",
        ) from error


def check_geo_key(table: pa.Table, name: str) -> str:
    """The geometry column to read, its encoding and reference system checked."""
    described = (table.schema.metadata or {}).get(b"geo")
    if described is None:
        raise BadData(
            "the geometry's reference system is not stated",
            file=name,
            column=GEOMETRY,
            expected="GeoParquet metadata (the 'geo' key of versions 1.0 to 2.0)",
            found="none",
            fix="write it as GeoParquet in CRS84, or add columns lon and lat in degrees; it is never guessed",
        )
    try:
        geo = json.loads(described)
        column = GEOMETRY if GEOMETRY in geo["columns"] else geo["primary_column"]
        meta = geo["columns"][column]
        encoding = meta["encoding"]
        crs = _crs_name(meta.get("crs", "OGC:CRS84"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData("the 'geo' metadata cannot be read", file=name, expected="GeoParquet 1.0 to 2.0") from error
    if column not in table.column_names:
        raise BadData("the geometry column is absent", file=name, column=column, found=table.column_names)
    if encoding != "WKB":
        raise BadData(
            "unknown geometry encoding", file=name, column=column, expected="WKB", found=encoding,
            fix="write the file with encoding WKB",
        )  # fmt: skip
    if crs not in LONLAT_CRS:
        raise BadData(
            "the geometry is in another reference system",
            file=name,
            column=column,
            expected="OGC:CRS84 (longitude, latitude) or EPSG:4326",
            found=crs,
            fix="reproject it to CRS84 and write it again, or add columns lon and lat in degrees",
        )
    return str(column)


def _crs_name(crs: Any) -> str:
    """``authority:code`` of a PROJJSON object or of a string that the Parquet format allows."""
    if isinstance(crs, str):
        if crs.startswith("srid:"):
            return f"EPSG:{crs.removeprefix('srid:')}"
        if not crs.startswith("{"):
            return "unknown (null)" if crs == "null" else crs
        crs = json.loads(crs)
    if not isinstance(crs, dict):
        return "unknown (null)"
    identity = crs.get("id") or {}
    if "authority" in identity and "code" in identity:
        return f"{identity['authority']}:{identity['code']}"
    return f"{crs.get('name', 'unnamed')} (without an authority's code)"


def checked_shapes(
    column: pa.ChunkedArray, name: str, label: str, ids: Array, *, degrees: bool = False, usable: bool = True
) -> Array:
    """WKB as shapely geometries (N,), none of them null.

    Args:
        column: The shapes.
        name, label, ids: The file, the column and the regions (N,), for the error.
        degrees: Refuse coordinates that cannot be longitudes and latitudes. Positions that are taken from the shapes
            are checked by themselves.
        usable: Refuse what is empty or invalid, too.

    Raises:
        BadData: If the column does not hold WKB.
        BadRows: Naming the regions.
    """
    shapely = geo_library("shapely")
    if isinstance(column.type, pa.ExtensionType):  # where geoarrow's types are registered
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise BadData("not a geometry", file=name, column=label, expected="binary (WKB)", found=column.type)
    shapes = decode_wkb(column.to_numpy())
    far = (np.abs(shapely.bounds(shapes)) > np.array([*FARTHEST, *FARTHEST])).any(axis=1)  # False where there is none
    kinds = (
        (True, "null, a curve or not WKB", shapely.is_missing(shapes), "add the missing shapes"),
        (degrees, "coordinates that are no degrees", far, "reproject them to CRS84 (longitude, latitude)"),
        (usable, "empty", shapely.is_empty(shapes), "add the missing shapes"),
        (usable, "invalid, such as a ring that crosses itself", ~shapely.is_valid(shapes), "mend them (make_valid)"),
    )
    for matters, kind, bad, fix in kinds:
        if matters and bad.any():
            raise BadRows(
                "geometries cannot be used", table=BadRows.REGIONS, rows=bad, code="bad_geometry",
                file=name, column=label, ids=ids[bad],
                expected="a valid shape or point in every row", found=kind, fix=fix,
            )  # fmt: skip
    return shapes


def decode_wkb(wkb: Array) -> Array:
    """WKB, bytes (N,), as shapes; None for what is null, no WKB, a curve, or nested deeper than :data:`NESTING_LIMIT`.

    GEOS reads a collection within a collection by calling itself, and ends the process at some ten thousand of them.
    """
    sound = [value if value is not None and is_shallow(value) else None for value in wkb]
    return geo_library("shapely").from_wkb(np.array(sound, object), on_invalid="ignore")


def lonlat_of(shapes: Array) -> Array:
    """Centroids (N, 2). A shape that is cut at 180° is put together first: the middle of its halves is not its own."""
    shapely = geo_library("shapely")
    bounds = shapely.bounds(shapes)
    cut = bounds[:, 2] - bounds[:, 0] > 180
    if not cut.any():
        return shapely.get_coordinates(shapely.centroid(shapes))
    whole = shapes.copy()
    whole[cut] = shapely.transform(shapes[cut], _eastward)
    points = shapely.get_coordinates(shapely.centroid(whole))
    points[:, 0] = np.where(points[:, 0] > 180, points[:, 0] - 360, points[:, 0])
    return points


def _eastward(points: Array) -> Array:
    """Points (n, 2) with longitudes from 0 to 360."""
    return np.stack([np.where(points[:, 0] < 0, points[:, 0] + 360, points[:, 0]), points[:, 1]], axis=1)


def wkb_of(shapes: Array) -> pa.Array:
    return pa.array(geo_library("shapely").to_wkb(shapes), pa.binary())
