"""GIS files in and out: GeoJSON, GeoPackage and shapefiles, and tables with geometries."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.errors import BadConfig, BadData, NoInput, UsageError
from topt_deploy.storage.atomic import atomic_file
from topt_deploy.storage.os_errors import reading

from .columns import GEOMETRY
from .geometry import check_geo_key, checked_shapes, geo_library, geometry_types, lonlat_of, with_geo_key, wkb_of
from .parquet import ParquetFile

Array = np.ndarray[Any, Any]
DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON"}


@dataclass(frozen=True, kw_only=True)
class Places:
    """The features of a file, in its order. N features.

    Attributes:
        ids: str (N,), the id column as text; None where none was asked for.
        lonlat: float64 (N, 2), centroids in degrees, CRS84.
        wkb: Shapes as WKB, CRS84; None where the file has only points in columns lon and lat.
        names: Their names for people (N,), None where a feature has no name; None where no column was asked for.
    """

    ids: Array | None
    lonlat: Array
    wkb: pa.Array | None
    names: list[str | None] | None = None


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
            column = check_geo_key(table, name)
            shapes = checked_shapes(table.column(column), name, column, labels)
            lonlat, wkb = lonlat_of(shapes), wkb_of(shapes)
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
        wkb = wkb_of(shapely.points(table.column("lon").to_numpy(), table.column("lat").to_numpy()))
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
    shapes = shapely.force_2d(checked_shapes(table.column(column), name, column, labels))
    shapes = shapely.transform(shapes, to_lonlat.transform, interleaved=False)
    return Places(ids=ids, lonlat=lonlat_of(shapes), wkb=wkb_of(shapes), names=_names(table, name, name_col))


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
