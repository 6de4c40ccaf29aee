"""Region shapes: GeoParquet and GIS files in, centroids and GIS files out; always longitude, latitude.

A coordinate reference system is read, never guessed: a geometry that states none is refused. The libraries of
the ``geo`` extra are imported where they are used, for most predictions need only the columns lon and lat.
"""

import importlib
import io
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.errors import BadConfig, BadData, BadRows, NoInput, UsageError
from topt_deploy.storage.atomic import atomic_file, reading

from .columns import GEOMETRY
from .parquet import ParquetFile

Array = np.ndarray[Any, Any]

LONLAT_CRS = {"OGC:CRS84", "EPSG:4326"}
"""Accepted systems: x is the longitude in both, for GeoParquet overrides the authority's axis order."""
DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON"}
NESTING_LIMIT = 16
"""Of collections in a geometry."""
_POINT, _LINE, _POLYGON, _COLLECTION = 1, 2, 3, 7  # WKB's codes; what is above is a curve, or none
_SIMPLE = {struct.pack(f"{order}BI", order == "<", kind) for order in "<>" for kind in (1, 2, 3)}
"""The first bytes of geometries that cannot contain others."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """The features of a file, in its order. N features.

    Attributes:
        ids: str (N,), the id column as text; None where none was asked for.
        lonlat: float64 (N, 2), centroids in degrees, CRS84.
        wkb: Shapes as WKB, CRS84; None where the file has only points in columns lon and lat.
        names: What people call them (N,), None where a feature has no name; None where no column was asked for.
    """

    ids: Array | None
    lonlat: Array
    wkb: pa.Array | None
    names: list[str | None] | None = None


def centroids(table: pa.Table, name: str, ids: Array) -> Array:
    """Planar centroids of a table's GeoParquet geometry.

    Args:
        table: Has a WKB geometry column, and the ``geo`` key of GeoParquet 1.0 to 2.0 in its schema metadata
            (:func:`with_geo_key` derives it from Parquet's own GEOMETRY type where it is absent).
        name: What errors call the table.
        ids: str (N,), the region id of each row.

    Returns:
        float64 (N, 2), longitude and latitude in degrees.

    Raises:
        BadData: If the reference system is unstated or not CRS84, or a geometry is null, empty or invalid.
    """
    return _points(read_shapes(table, name, ids))


def read_shapes(table: pa.Table, name: str, ids: Array) -> Array:
    """The shapes (N,) of a table's GeoParquet geometry, none of them null, empty or invalid.

    Args, Raises: Of :func:`centroids`.
    """
    column = _check_geo_key(table, name)
    return _shapes(table.column(column), name, column, ids)


def with_geo_key(table: pa.Table, file: ParquetFile) -> pa.Table:
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
    shapes = _decode(wkb.to_numpy(zero_copy_only=False))
    if shapely.is_missing(shapes).any():
        raise BadData(
            "geometries cannot be used", column=GEOMETRY, expected="WKB in every row", found="null or not WKB"
        )
    flat, solid = (sorted({s.geom_type for s in shapes[shapely.has_z(shapes) == z]}) for z in (False, True))
    return flat + [f"{name} Z" for name in solid]


def read_geometry(path: Path, id_col: str | None, *, name_col: str | None = None, crs: str | None = None) -> Places:
    """Read the features of a GIS file (GeoJSON, GeoPackage, shapefile), Parquet or CSV table.

    A GIS file is reprojected to CRS84 from the system that it states; a table has GeoParquet geometry or
    columns lon and lat in degrees.

    Args:
        path: The file.
        id_col: Its column of ids.
        name_col: Its column of names for people.
        crs: The system of a GIS file that states none, such as EPSG:3435.

    Raises:
        NoInput, BadData: Naming the file and what it lacks.
        BadConfig: If ``crs`` is given for a file that states its own.
    """
    path = Path(path)
    name = str(path)
    with reading(path):
        path.stat()
    suffix = path.suffix.lower()
    if suffix in {".csv", ".parquet"}:
        table = _read_csv(path, id_col) if suffix == ".csv" else _read_parquet(path)
        wkb = None
        ids = _ids(table, name, id_col)
        labels = np.array([f"row {row}" for row in range(len(table))]) if ids is None else ids
        if {"lon", "lat"} <= set(table.column_names):
            lonlat = np.stack([_degrees(table, name, axis) for axis in ("lon", "lat")], axis=1)
        else:
            column = _check_geo_key(table, name)
            shapes = _shapes(table.column(column), name, column, labels)
            lonlat, wkb = _points(shapes), _wkb(shapes)
        return Places(ids=ids, lonlat=lonlat, wkb=wkb, names=_names(table, name, name_col))
    return _read_gis(path, id_col, name_col, crs)


def write_geo(path: Path, table: pa.Table, *, layer: str | None = None) -> None:
    """Write a table as .gpkg or .geojson for GIS users, atomically.

    Args:
        path: Its suffix chooses the format.
        table: Has WKB ``geometry``, CRS84, or columns lon and lat. A list column ``name`` becomes ``name_0``,
            ``name_1``, … since these formats have no lists.
        layer: The layer's name; the file's by default.

    Raises:
        UsageError: If the suffix is neither.
        BadData: If the table has no positions.
    """
    shapely, pyogrio = geo_library("shapely"), geo_library("pyogrio")
    path = Path(path)
    driver = DRIVERS.get(path.suffix.lower())
    if driver is None:
        raise UsageError("unknown GIS format", file=path, expected=" or ".join(DRIVERS), found=path.suffix)
    columns = set(table.column_names)
    if GEOMETRY in columns:
        wkb = table.column(GEOMETRY).combine_chunks()
        types = geometry_types(wkb)
    elif {"lon", "lat"} <= columns:
        wkb = _wkb(shapely.points(table.column("lon").to_numpy(), table.column("lat").to_numpy()))
        types = ["Point"]
    else:
        raise BadData("the regions' positions are absent", expected="column geometry, or lon and lat")
    flat = {}
    for field in table.schema:
        column = table.column(field.name)
        if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
            values = [value or [] for value in column.to_pylist()]
            for item in range(max((len(value) for value in values), default=0)):
                entries = [value[item] if item < len(value) else None for value in values]
                flat[f"{field.name}_{item}"] = pa.array(entries, field.type.value_type)
        elif field.name != GEOMETRY:
            flat[field.name] = column
    data = io.BytesIO()  # for GDAL's own errors of a full disk are as many as its formats
    pyogrio.write_arrow(
        pa.table({**flat, GEOMETRY: wkb}),
        data,
        driver=driver,
        layer=layer or path.stem,
        geometry_name=GEOMETRY,
        geometry_type=types[0] if len(types) == 1 else "Unknown",
        crs="EPSG:4326",
    )
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.getbuffer())


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


def _check_geo_key(table: pa.Table, name: str) -> str:
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


def _shapes(column: pa.ChunkedArray, name: str, label: str, ids: Array) -> Array:
    """WKB as shapely geometries (N,), none of them null, empty or invalid."""
    shapely = geo_library("shapely")
    if isinstance(column.type, pa.ExtensionType):  # where geoarrow's types are registered
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise BadData("not a geometry", file=name, column=label, expected="binary (WKB)", found=column.type)
    shapes = _decode(column.to_numpy())
    kinds = (
        ("null, a curve or not WKB", shapely.is_missing(shapes), "add the missing shapes"),
        ("empty", shapely.is_empty(shapes), "add the missing shapes"),
        ("invalid, such as a ring that crosses itself", ~shapely.is_valid(shapes), "mend them (make_valid)"),
    )
    for kind, bad, fix in kinds:
        if bad.any():
            raise BadRows(
                "geometries cannot be used", table=BadRows.REGIONS, rows=bad, code="bad_geometry",
                file=name, column=label, ids=ids[bad],
                expected="a valid shape or point in every row", found=kind, fix=fix,
            )  # fmt: skip
    return shapes


def _decode(wkb: Array) -> Array:
    """WKB, bytes (N,), as shapes; None for what is null, no WKB, a curve, or nested deeper than :data:`NESTING_LIMIT`.

    GEOS reads a collection within a collection by calling itself, and ends the process at some ten thousand of them.
    """
    sound = [value if value is not None and _shallow(value) else None for value in wkb]
    return geo_library("shapely").from_wkb(np.array(sound, object), on_invalid="ignore")


def _shallow(wkb: bytes) -> bool:
    """True if there is no curve and no collection is nested deeper than the limit. Reading stops where the bytes end or
    are invalid."""
    if wkb[:5] in _SIMPLE:
        return True
    position, left = 0, [1]  # geometries still to come, per level
    try:
        while left:
            if not left[-1]:
                left.pop()
                continue
            left[-1] -= 1
            if wkb[position] > 1:
                return False
            order = "<" if wkb[position] else ">"
            (code,) = struct.unpack_from(f"{order}I", wkb, position + 1)
            kind, iso = (code & 0xFFFF) % 1000, (code & 0xFFFF) // 1000
            if kind > _COLLECTION:
                return False
            solid, measured = code >> 31 or iso in (1, 3), code >> 30 & 1 or iso in (2, 3)
            width = 8 * (2 + bool(solid) + bool(measured))
            position += 9 if code >> 29 & 1 else 5
            if kind == _POINT:
                position += width
                continue
            (count,) = struct.unpack_from(f"{order}I", wkb, position)
            position += 4
            if kind == _LINE:
                position += count * width
            elif kind == _POLYGON:
                for _ in range(count):
                    position += 4 + width * struct.unpack_from(f"{order}I", wkb, position)[0]
            else:
                left.append(count)
                if len(left) > NESTING_LIMIT:
                    return False
    except (IndexError, struct.error):  # cut off: GEOS will say so, and not go deeper before
        pass
    return True


def _points(shapes: Array) -> Array:
    shapely = geo_library("shapely")
    return shapely.get_coordinates(shapely.centroid(shapes))


def _wkb(shapes: Array) -> pa.Array:
    return pa.array(geo_library("shapely").to_wkb(shapes), pa.binary())


def _read_csv(path: Path, id_col: str | None) -> pa.Table:
    from pyarrow import csv

    # Read as text, or the id 007 becomes the number 7.
    options = csv.ConvertOptions(column_types={id_col: pa.string()} if id_col else None)
    with reading(path):
        try:
            return csv.read_csv(path, convert_options=options)
        except pa.ArrowInvalid as error:
            raise BadData(f"not a CSV table ({error})", file=path, expected="a header and columns") from error


def _read_parquet(path: Path) -> pa.Table:
    file = ParquetFile(path)
    return with_geo_key(file.read(), file)


def _read_gis(path: Path, id_col: str | None, name_col: str | None, crs: str | None) -> Places:
    shapely, pyogrio, pyproj = geo_library("shapely"), geo_library("pyogrio"), geo_library("pyproj")
    name = str(path)
    try:
        layers = pyogrio.list_layers(path)[:, 0]
        if len(layers) == 0:
            raise NoInput("holds no layer", file=name)
        if len(layers) > 1:
            raise BadData(
                "holds several layers", file=name, expected="one", found=", ".join(layers),
                fix="export the layer of the regions to a file of its own",
            )  # fmt: skip
        meta, table = pyogrio.read_arrow(path)
    except pyogrio.errors.DataSourceError as error:
        raise BadData(
            f"not a readable GIS file ({error})", file=name, expected="GeoJSON, GeoPackage, shapefile"
        ) from error
    if meta["crs"] is None and crs is None:
        raise BadData(
            "the file states no reference system", file=name, expected="a stated one (a shapefile's .prj)",
            found="none", fix="name the system that the coordinates are in: --src-crs EPSG:…; it is never guessed",
        )  # fmt: skip
    if meta["crs"] is not None and crs is not None:
        raise BadConfig(
            "the file states its reference system, and another is given", file=name, expected=meta["crs"], found=crs,
            fix="leave --src-crs out",
        )  # fmt: skip
    try:
        to_lonlat = pyproj.Transformer.from_crs(meta["crs"] or crs, "OGC:CRS84", always_xy=True)
    except pyproj.exceptions.CRSError as error:
        raise BadConfig("no such reference system", file=name, expected="such as EPSG:3435", found=crs) from error
    ids = _ids(table, name, id_col)
    column = meta["geometry_name"] or "wkb_geometry"
    labels = np.array([f"feature {row}" for row in range(len(table))]) if ids is None else ids
    shapes = shapely.force_2d(_shapes(table.column(column), name, column, labels))
    shapes = shapely.transform(shapes, to_lonlat.transform, interleaved=False)
    return Places(ids=ids, lonlat=_points(shapes), wkb=_wkb(shapes), names=_names(table, name, name_col))


def _names(table: pa.Table, file: str, column: str | None) -> list[str | None] | None:
    if column is None:
        return None
    if column not in table.column_names:
        raise BadData("the column of names is absent", file=file, column=column, found=", ".join(table.column_names))
    return [None if value is None else str(value) for value in table.column(column).to_pylist()]


def _ids(table: pa.Table, name: str, id_col: str | None) -> Array | None:
    """The id column as text (N,); a whole number that a shapefile stores as 7.0 is "7"."""
    if id_col is None:
        return None
    if id_col not in table.column_names:
        raise BadData("the id column is absent", file=name, column=id_col, found=", ".join(table.column_names))
    values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in table.column(id_col).to_pylist()]
    blank = [f"row {row}" for row, value in enumerate(values) if value is None]
    if blank:
        raise BadData("ids are missing", file=name, column=id_col, ids=blank, expected="an id in every row")
    ids = np.array([str(value) for value in values], dtype=np.str_)
    unique, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise BadData("ids occur more than once", file=name, column=id_col, ids=unique[counts > 1])
    return ids


def _degrees(table: pa.Table, name: str, axis: str) -> Array:
    column = table.column(axis)
    if column.null_count or not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise BadData(
            "not degrees in every row", file=name, column=axis, expected="a number in every row",
            found=f"{column.type} with {column.null_count} empty",
        )  # fmt: skip
    return column.cast(pa.float64()).to_numpy()
