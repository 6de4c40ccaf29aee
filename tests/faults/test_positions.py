"""Positions and shapes that cannot be true are refused with the regions named; those on the date line are read."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import replaced, tiny_city_tables

from topt_deploy.data.city import Schema, read_city
from topt_deploy.errors import BadData, BadRows

shapely = pytest.importorskip("shapely", reason="needs the geo extra")
from topt_deploy.data.geometry import centroids, geo_metadata  # noqa: E402

SCHEMA = Schema(views={}, mobility=False)


def moved(lon: float, lat: float, row: int = 3) -> pa.Table:
    """A city with one region elsewhere."""
    regions, _ = tiny_city_tables()
    places = {"lon": regions.column("lon").to_pylist(), "lat": regions.column("lat").to_pylist()}
    places["lon"][row], places["lat"][row] = lon, lat
    return replaced(regions, **places)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ((0.0, 0.0), "stands for no position"),
        ((41.85, -87.65), "where no city does"),
        ((87.65, 41.85), "absurdly far"),
        ((0.0, 41.85), "absurdly far"),
        ((-87.65, -41.85), "absurdly far"),
    ],
)
def test_a_region_that_lies_where_it_cannot_is_named(place, said):
    table = moved(*place)
    with pytest.raises(BadRows, match=said) as caught:
        read_city(table, None, SCHEMA)
    assert caught.value.ids == [table.column("region_id")[3].as_py()]
    assert caught.value.code == "bad_position"


def test_a_whole_table_with_lon_and_lat_swapped():
    regions, _ = tiny_city_tables()
    table = replaced(regions, lon=regions.column("lat"), lat=regions.column("lon"))
    with pytest.raises(BadData, match="may be swapped"):
        read_city(table, None, SCHEMA)


def test_swapped_columns_beside_a_geometry_that_is_not():
    """In Lisbon neither column leaves its range when they change places."""
    regions, _ = tiny_city_tables()
    lon, lat = (np.array(regions.column(axis).to_pylist()) for axis in ("lon", "lat"))
    lon, lat = lon + 78.5, lat - 3.1
    shapes = pa.array(shapely.to_wkb(shapely.box(lon - 0.01, lat - 0.01, lon + 0.01, lat + 0.01)), pa.binary())
    table = replaced(regions, lon=lon, lat=lat, geometry=shapes)
    described = {"geo": geo_metadata(["Polygon"])}
    assert len(read_city(table.replace_schema_metadata(described), None, SCHEMA)) == 12
    table = replaced(table, lon=lat, lat=lon).replace_schema_metadata(described)
    with pytest.raises(BadData, match="lon and lat are swapped") as caught:
        read_city(table, None, SCHEMA)
    assert len(caught.value.ids) == 12


def test_an_island_of_the_city_is_warned_of(caplog):
    """As Ogasawara is Tokyo's, a thousand kilometres away."""
    table = moved(-80.0, 34.0)
    with caplog.at_level(logging.WARNING, logger="topt_deploy"):
        assert len(read_city(table, None, SCHEMA)) == 12
    assert table.column("region_id")[3].as_py() in caplog.text


def test_a_city_across_the_date_line_is_one_city():
    regions, _ = tiny_city_tables()
    lon = np.where(np.arange(12) % 2, 179.99, -179.99)
    assert len(read_city(replaced(regions, lon=lon), None, SCHEMA)) == 12


def test_a_polygon_that_is_cut_at_180_degrees_has_its_middle_there():
    halves = shapely.MultiPolygon([shapely.box(179.8, -17, 180, -16), shapely.box(-180, -17, -179.6, -16)])
    column = pa.array([shapely.to_wkb(halves)], pa.binary())
    table = pa.table({"geometry": column}).replace_schema_metadata({"geo": geo_metadata(["MultiPolygon"])})
    np.testing.assert_allclose(centroids(table, "r", np.array(["a"])), [[-179.9, -16.5]])


def shapes_of(regions: pa.Table) -> pa.Array:
    lon, lat = (np.array(regions.column(axis).to_pylist()) for axis in ("lon", "lat"))
    return pa.array(shapely.to_wkb(shapely.box(lon - 0.01, lat - 0.01, lon + 0.01, lat + 0.01)), pa.binary())


def test_the_primary_column_may_be_called_otherwise(tmp_path):
    regions, _ = tiny_city_tables()
    expected = read_city(regions, None, SCHEMA).lonlat
    bbox = pa.array([{"xmin": 0.0}] * 12)
    table = replaced(regions.drop_columns(["lon", "lat"]), geom=shapes_of(regions), bbox=bbox)
    geo = {
        "version": "1.1.0", "primary_column": "geom",
        "columns": {"geom": {"encoding": "WKB", "geometry_types": [], "covering": {"bbox": {}}}},
    }  # fmt: skip
    table = table.replace_schema_metadata({"geo": json.dumps(geo)})
    pq.write_table(table, tmp_path / "r.parquet")
    for given in (table, tmp_path / "r.parquet"):
        city = read_city(given, None, SCHEMA)
        np.testing.assert_allclose(city.lonlat, expected)
        column, described = city.geometry
        assert column.to_pylist() == table.column("geom").to_pylist()
        assert json.loads(described)["columns"] == {"geometry": {"encoding": "WKB", "geometry_types": []}}
        assert json.loads(described)["primary_column"] == "geometry"


def projected() -> bytes:
    key = json.loads(geo_metadata(["Polygon"]))
    key["columns"]["geometry"]["crs"] = {"type": "ProjectedCRS", "id": {"authority": "EPSG", "code": 26916}}
    return json.dumps(key).encode()


MAPS = {
    "projected": (lambda c: c, projected(), "EPSG:26916"),
    "unstated": (lambda c: c, None, "reference system is not stated"),
    "well-known text": (lambda c: pa.array(["POINT (1 2)"] * len(c)), geo_metadata([]), "binary (WKB)"),
    "a struct": (lambda c: pa.array([{"x": 1.0, "y": 2.0}] * len(c)), geo_metadata([]), "binary (WKB)"),
    "a list": (lambda c: pa.array([[1.0, 2.0]] * len(c)), geo_metadata([]), "binary (WKB)"),
    "projected, and labelled as degrees": (
        lambda c: pa.array([shapely.to_wkb(shapely.box(5e5, 4e6, 5e5 + 9, 4e6 + 9))] * len(c), pa.binary()),
        geo_metadata(["Polygon"]),
        "no degrees",
    ),
    "one null": (lambda c: pa.array([None, *c.to_pylist()[1:]], pa.binary()), geo_metadata(["Polygon"]), "'D001'"),
}


@pytest.mark.parametrize("case", MAPS)
def test_a_map_is_made_of_longitudes_and_latitudes_or_not_at_all(case, desk, topt_run):
    pytest.importorskip("pyogrio", reason="needs the geo extra")
    change, geo, said = MAPS[case]
    table = pq.read_table(desk.regions)
    metadata = {k: v for k, v in table.schema.metadata.items() if k != b"geo"} | ({b"geo": geo} if geo else {})
    pq.write_table(
        replaced(table, geometry=change(table.column("geometry"))).replace_schema_metadata(metadata), desk.regions
    )
    done = topt_run("predict", desk.regions, "--geo", desk.folder / "map.geojson")
    assert (done.code, "geometry" in done.err) == (65, True), done.err
    assert said in done.err
    assert not (desk.folder / "map.geojson").exists()
    assert topt_run("predict", desk.regions).code == 0
