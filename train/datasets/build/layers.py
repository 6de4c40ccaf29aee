"""Areas from vector files: any format that GDAL reads, and GeoParquet.

A reference system is read or given, never guessed.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from topt_deploy.data.geometry import geo_library, with_geo_key
from topt_deploy.data.parquet import ParquetFile
from topt_deploy.errors import BadConfig, BadData, NoInput
from topt_deploy.storage.os_errors import reading

Array = np.ndarray[Any, Any]

ONE_LAYER = {".geojson", ".shp"}
GIS_SUFFIXES = {
    ".geojson",
    ".json",
    ".gpkg",
    ".shp",
    ".kml",
    ".kmz",
    ".fgb",
    ".gml",
    ".zip",
    ".gdb",
    ".tab",
    ".geojsonl",
}
FEATURES_AT_ONCE = 20_000
LONLAT = "OGC:CRS84"
GEOMETRY = "geometry"


@dataclass(frozen=True, kw_only=True)
class Features:
    """Some features of a file, one after the other.

    Attributes:
        first: The number of the first one, from 1.
        table: Their columns, without the geometry.
        shapes: shapely geometries (F,) in degrees, x the longitude, without heights; None where there is none.
    """

    first: int
    table: pa.Table
    shapes: Array


def split_layer(given: str) -> tuple[str, str | None]:
    """``FILE:LAYER`` as its two parts; a file whose own name has a colon stays whole."""
    name, colon, layer = given.rpartition(":")
    if colon and len(name) > 1 and not Path(given).exists():
        return name, layer
    return given, None


def is_parquet(path: Path) -> bool:
    """True if a file's name says that it is Parquet."""
    return path.suffix.lower() in {".parquet", ".geoparquet", ".pq"}


def layer_columns(path: Path, layer: str | None = None) -> list[str]:
    """The names of a file's columns, the geometry aside."""
    if is_parquet(path):
        file = ParquetFile(path)
        return [name for name in file.names if name != _primary(file.metadata)]
    with _gdal(path):
        about = geo_library("pyogrio").read_info(path, layer=_layer(path, layer), force_feature_count=False)
    return list(about["fields"])


def read_features(
    path: Path,
    columns: Sequence[str],
    *,
    layer: str | None = None,
    crs: str | None = None,
    at_once: int = FEATURES_AT_ONCE,
    **options: str,
) -> Iterator[Features]:
    """Read a file's features, reprojected to longitude and latitude.

    Args:
        path: The file.
        columns: Columns to read besides the geometry.
        layer: Its layer, where it has several.
        crs: The system of a file that states none.
        at_once: How many features are held at a time.
        options: What GDAL's driver takes to open the file.

    Raises:
        NoInput, BadData: If the file, its layer, a column or its reference system is absent.
        BadConfig: If ``crs`` is not the system that the file states.
    """
    batches = _parquet(path, columns, at_once) if is_parquet(path) else _vector(path, layer, columns, at_once, options)
    first, move = 1, None
    for stated, table, wkb in batches:
        if move is None:
            move = to_lonlat(path, stated, crs)
        shapes = geo_library("shapely").from_wkb(wkb, on_invalid="ignore")
        yield Features(first=first, table=table, shapes=_moved(shapes, move, path))
        first += len(table)


class _Move:
    """From a reference system to degrees; nothing where the coordinates are degrees already."""

    def __init__(self, crs: Any) -> None:
        pyproj = geo_library("pyproj")
        system = pyproj.CRS.from_user_input(crs)
        self.name = system.to_string()
        self._transform = None
        if not system.equals(pyproj.CRS.from_user_input(LONLAT), ignore_axis_order=True):
            self._transform = pyproj.Transformer.from_crs(system, LONLAT, always_xy=True).transform

    def __call__(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Longitudes and latitudes; infinite where there is none."""
        return (x, y) if self._transform is None else self._transform(x, y)


def to_lonlat(path: Path | str, stated: Any, given: str | None) -> _Move:
    """The way from a file's reference system to degrees.

    Args:
        path: The file, for messages.
        stated: What it states: anything that pyproj reads, or None.
        given: What the user says.

    Raises:
        BadData: If neither is there.
        BadConfig: If they differ, or ``given`` is no system.
    """
    pyproj = geo_library("pyproj")
    try:
        wanted = None if given is None else pyproj.CRS.from_user_input(given)
    except pyproj.exceptions.CRSError as error:
        raise BadConfig(
            "no such reference system", file=path, column="crs", expected="such as EPSG:3435", found=given
        ) from error
    if stated is None:
        if wanted is None:
            raise BadData(
                "the file states no reference system", file=path, expected="a stated one (a shapefile's .prj)",
                found="none",
                fix="name the system of its coordinates: crs = \"EPSG:…\" or --src-crs; it is never guessed",
            )  # fmt: skip
        return _Move(wanted)
    move = _Move(stated)
    if wanted is not None and not wanted.equals(pyproj.CRS.from_user_input(stated), ignore_axis_order=True):
        raise BadConfig(
            "the file states another reference system than the one given", file=path, column="crs",
            expected=move.name, found=given, fix="leave crs out, or mend the file",
        )  # fmt: skip
    return move


def polygons(shapes: Array) -> tuple[Array, Array]:
    """The areas among shapes, repaired where they are invalid.

    Returns:
        Polygons and multipolygons (F,), None where a shape has no area, and bool (F,): which were repaired.
    """
    shapely = geo_library("shapely")
    shapes = shapely.force_2d(shapes)
    invalid = ~shapely.is_valid(shapes) & ~shapely.is_missing(shapes)
    shapes = shapes.copy()
    if invalid.any():
        shapes[invalid] = shapely.make_valid(shapes[invalid], method="structure", keep_collapsed=False)
    kinds = shapely.get_type_id(shapes)
    for place in np.flatnonzero(kinds == shapely.GeometryType.GEOMETRYCOLLECTION):
        shapes[place] = _areas_of(shapes[place])
    has_area = np.isin(shapely.get_type_id(shapes), [shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON])
    has_area &= ~shapely.is_empty(shapes)
    return only(shapes, has_area), invalid & has_area


def only(shapes: Array, kept: Array) -> Array:
    """Shapes (F,) where bool (F,) says so, and None elsewhere."""
    shapes = shapes.copy()
    shapes[~kept] = None
    return shapes


def _areas_of(collection: Any) -> Any:
    """The parts of a collection that have an area, as one shape."""
    shapely = geo_library("shapely")
    parts = shapely.get_parts(collection)
    while (nested := shapely.get_type_id(parts) == shapely.GeometryType.GEOMETRYCOLLECTION).any():
        parts = np.concatenate([parts[~nested], shapely.get_parts(parts[nested])])
    return shapely.union_all(parts[shapely.get_dimensions(parts) == 2])


def _moved(shapes: Array, move: _Move, path: Path) -> Array:
    shapely = geo_library("shapely")
    shapes = shapely.force_2d(shapes)
    if move._transform is not None:
        shapes = shapely.transform(shapes, move, interleaved=False)
    bounds = shapely.bounds(shapes[~shapely.is_missing(shapes) & ~shapely.is_empty(shapes)])
    outside = ~((np.abs(bounds[:, ::2]) <= 360) & (np.abs(bounds[:, 1::2]) <= 90)).all(axis=1)
    if outside.any():
        raise BadData(
            "coordinates are not degrees", file=path, expected="longitudes and latitudes in the system that it states",
            found=", ".join(f"({x:g}, {y:g})" for x, y, *_ in bounds[outside][:3]),
            fix="the file states a wrong system: write it again with the right one",
        )  # fmt: skip
    return shapes


@contextmanager
def _gdal(path: Path) -> Iterator[None]:
    """GDAL's errors as the user's."""
    pyogrio = geo_library("pyogrio")
    with reading(path):
        path.stat()
        with path.open("rb") if path.is_file() else _nothing():
            pass
    try:
        yield
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, pa.ArrowException) as error:
        raise BadData(
            f"not a readable vector file ({error})", file=path, expected="GeoJSON, GeoPackage, shapefile, KML, …"
        ) from error


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@cache
def _layers(path: Path, _changed: int) -> list[str]:
    return [str(name) for name in geo_library("pyogrio").list_layers(path)[:, 0]]


def _layer(path: Path, layer: str | None) -> str | None:
    """The layer to read, None for the only one of a file that has no more: to list them would read GeoJSON whole."""
    if layer is None and path.suffix.lower() in ONE_LAYER:
        return None
    layers = _layers(path, path.stat().st_mtime_ns)
    if not layers:
        raise NoInput("holds no layer", file=path)
    if layer is not None and layer not in layers:
        raise BadConfig("has no such layer", file=path, column="layer", expected=", ".join(layers), found=layer)
    if layer is None and len(layers) > 1:
        raise BadConfig(
            "has several layers", file=path, column="layer", expected="one of them named", found=", ".join(layers),
            fix=f"name one: layer = {json.dumps(layers[0])}, or {path.name}:{layers[0]}",
        )  # fmt: skip
    return layer or layers[0]


def _vector(
    path: Path, layer: str | None, columns: Sequence[str], at_once: int, options: dict[str, str]
) -> Iterator[tuple[Any, pa.Table, Array]]:
    pyogrio = geo_library("pyogrio")
    with _gdal(path):
        opened = pyogrio.raw.open_arrow(
            path, layer=_layer(path, layer), columns=list(columns), batch_size=at_once, use_pyarrow=True, **options
        )
        with opened as (meta, reader):
            if meta["geometry_type"] is None:
                raise BadData(
                    "has no geometry", file=path, expected="shapes", found=", ".join(map(str, meta["fields"]))
                )
            _check_columns(path, layer, columns, meta["fields"])
            geometry = meta["geometry_name"] or "wkb_geometry"
            while (batch := _next(reader)) is not None:
                table = pa.Table.from_batches([batch])
                yield meta["crs"], table.select(list(columns)), table.column(geometry).to_numpy()


def _check_columns(path: Path, layer: str | None, columns: Sequence[str], there: Sequence[str]) -> None:
    """Raise BadData if a column is absent. Only then the file is asked for all of them: that reads GeoJSON whole."""
    for column in columns:
        if column not in there:
            raise BadData("column is absent", file=path, column=column, found=", ".join(layer_columns(path, layer)))


def _next(reader: Any) -> pa.RecordBatch | None:
    """The next features. What GDAL says of single shapes is left unsaid: they are repaired, and counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return reader.read_next_batch()
        except StopIteration:
            return None


def _primary(metadata: dict[bytes, bytes]) -> str:
    try:
        return str(json.loads(metadata[b"geo"])["primary_column"])
    except (KeyError, ValueError, TypeError):
        return GEOMETRY


def _parquet(path: Path, columns: Sequence[str], at_once: int) -> Iterator[tuple[Any, pa.Table, Array]]:
    file = ParquetFile(path)
    described = with_geo_key(pa.table({n: pa.array([], f.type) for n, f in zip(file.names, file.schema, strict=True)},
                                      schema=file.schema.with_metadata(file.metadata)), file)  # fmt: skip
    geo = (described.schema.metadata or {}).get(b"geo")
    try:
        meta = None if geo is None else json.loads(geo)
        column = GEOMETRY if meta is None else str(meta["primary_column"])
        # GeoParquet: absent means CRS84, null means unknown.
        crs = None if meta is None else meta["columns"][column].get("crs", LONLAT)
    except (ValueError, KeyError, TypeError) as error:
        raise BadData("the 'geo' metadata cannot be read", file=path, expected="GeoParquet 1.0 to 2.0") from error
    if column not in file.names:
        raise BadData("has no geometry", file=path, expected="GeoParquet", found=", ".join(file.names))
    _check_columns(path, None, columns, file.names)
    if isinstance(crs, dict):
        crs = json.dumps(crs)
    # Without pre_buffer=False, pyarrow holds all columns of the whole file.
    for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(at_once, columns=[*columns, column]):
        table = pa.Table.from_batches([batch])
        yield crs, table.select(list(columns)), table.column(column).to_numpy(zero_copy_only=False)
