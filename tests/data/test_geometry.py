import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from topt_deploy.data.city import Schema, read_city
from topt_deploy.data.geometry import centroids, geo_metadata, geometry_types, with_geo_key
from topt_deploy.data.gis_files import read_geometry, write_geo
from topt_deploy.data.parquet import ParquetFile
from topt_deploy.errors import BadConfig, BadData, NoInput, UsageError

shapely = pytest.importorskip("shapely", reason="needs the geo extra")
pyogrio = pytest.importorskip("pyogrio", reason="needs the geo extra")
pytest.importorskip("pyproj", reason="needs the geo extra")

IDS = np.array(["01", "02"])
SQUARES = shapely.box([-87.7, -87.6], [41.8, 41.9], [-87.6, -87.4], [41.9, 42.0])
CENTRES = np.array([[-87.65, 41.85], [-87.5, 41.95]])
UTM16 = "EPSG:26916"


def wkb(shapes):
    return pa.array(shapely.to_wkb(shapes), pa.binary())


GEO = geo_metadata(["Polygon"])


def geo_table(shapes=SQUARES, geo=GEO):
    table = pa.table({"region_id": IDS, "geometry": wkb(shapes)})
    return table.replace_schema_metadata({"geo": geo} if geo else None)


def geo_key(version="1.1.0", column="geometry", **meta):
    meta = {"encoding": "WKB", "geometry_types": [], **meta}
    return json.dumps({"version": version, "primary_column": column, "columns": {column: meta}})


def gis_file(path, shapes=SQUARES, crs="EPSG:4326", **columns):
    pyogrio.write_arrow(
        pa.table({**(columns or {"area": IDS}), "geometry": wkb(shapes)}),
        path,
        geometry_name="geometry",
        geometry_type="Unknown",
        crs=crs,
    )
    return path


class TestCentroids:
    @pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "2.0.0"])
    @pytest.mark.parametrize(
        "crs",
        [
            {},
            {"crs": {"type": "GeographicCRS", "id": {"authority": "OGC", "code": "CRS84"}}},
            {"crs": {"type": "GeographicCRS", "id": {"authority": "EPSG", "code": 4326}}},
        ],
        ids=["absent", "crs84", "epsg4326"],
    )
    def test_accepts_longitude_latitude(self, tmp_path, version, crs):
        pq.write_table(geo_table(geo=geo_key(version, **crs)), tmp_path / "r.parquet")
        table = pq.read_table(tmp_path / "r.parquet", columns=["geometry"])
        np.testing.assert_allclose(centroids(table, "r", IDS), CENTRES)

    def test_the_reader_of_cities_uses_it(self):
        city = read_city(geo_table(), None, Schema(views={}, mobility=False))
        np.testing.assert_allclose(city.lonlat, CENTRES)

    def test_reads_what_geopandas_writes(self, tmp_path):
        geopandas = pytest.importorskip("geopandas", reason="only to prove that its files are read")
        frame = geopandas.GeoDataFrame({"region_id": IDS}, geometry=list(SQUARES), crs="EPSG:4326")
        for version in ("1.0.0", "1.1.0"):
            frame.to_parquet(tmp_path / "r.parquet", schema_version=version)
            np.testing.assert_allclose(centroids(pq.read_table(tmp_path / "r.parquet"), "r", IDS), CENTRES)
        frame.to_crs(UTM16).to_parquet(tmp_path / "r.parquet")
        with pytest.raises(BadData, match=UTM16):
            centroids(pq.read_table(tmp_path / "r.parquet"), "r", IDS)

    def test_primary_column_of_another_name(self):
        table = geo_table().rename_columns(["region_id", "shape"])
        table = table.replace_schema_metadata({"geo": geo_key(column="shape")})
        np.testing.assert_allclose(centroids(table, "r", IDS), CENTRES)

    @pytest.mark.parametrize(
        ("geo", "parts"),
        [
            (None, ["reference system is not stated", "never guessed"]),
            (geo_key(crs=None), ["unknown (null)", "reproject"]),
            (geo_key(crs={"id": {"authority": "EPSG", "code": 26916}}), [UTM16, "OGC:CRS84", "reproject"]),
            (geo_key(crs={"name": "local grid"}), ["local grid", "reproject"]),
            (geo_key(encoding="polygon"), ["encoding", "WKB", "polygon"]),
            (b"not json", ["cannot be read", "GeoParquet"]),
            (b"[]", ["cannot be read"]),
            (geo_key(column="shape"), ["is absent", "shape"]),
        ],
    )
    def test_refuses_what_is_not_stated_as_crs84(self, geo, parts):
        with pytest.raises(BadData) as caught:
            centroids(geo_table(geo=geo), "regions.parquet", IDS)
        assert all(part in str(caught.value) for part in ["regions.parquet", *parts])

    @pytest.mark.parametrize(
        ("shape", "found"),
        [
            (None, "null"),
            (shapely.Polygon(), "empty"),
            (shapely.Polygon([(0, 0), (1, 1), (1, 0), (0, 1)]), "crosses itself"),
        ],
    )
    def test_names_the_regions_whose_geometry_is_bad(self, shape, found):
        with pytest.raises(BadData, match=found) as caught:
            centroids(geo_table([SQUARES[0], shape]), "r", IDS)
        assert caught.value.ids == ["02"]

    def test_bytes_that_are_no_wkb(self):
        table = pa.table({"geometry": [b"\x01\x02", wkb(SQUARES)[0].as_py()]})
        with pytest.raises(BadData, match="not WKB") as caught:
            centroids(table.replace_schema_metadata({"geo": geo_key()}), "r", IDS)
        assert caught.value.ids == ["01"]

    def test_text_is_no_geometry(self):
        table = pa.table({"geometry": ["POINT (1 2)"] * 2}).replace_schema_metadata({"geo": geo_key()})
        with pytest.raises(BadData, match=r"binary \(WKB\)"):
            centroids(table, "r", IDS)

    def test_without_shapely_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "shapely", None)
        with pytest.raises(BadConfig, match=r"pip install 'topt-deploy\[geo\]'"):
            centroids(geo_table(), "r", IDS)


class _Wkb(pa.ExtensionType):
    """Enough of geoarrow.wkb to make pyarrow write Parquet's GEOMETRY type."""

    def __init__(self, meta="{}"):
        self.meta = meta
        super().__init__(pa.binary(), "geoarrow.wkb")

    def __arrow_ext_serialize__(self):
        return self.meta.encode()

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, meta):
        return cls(meta.decode())


@pytest.fixture
def native(tmp_path):
    """Write a file with Parquet's own GEOMETRY column and no ``geo`` key, and read it back."""

    def roundtrip(meta, registered=False):
        path = tmp_path / "native.parquet"
        pa.register_extension_type(_Wkb())
        try:
            geometry = pa.ExtensionArray.from_storage(_Wkb(meta), wkb(SQUARES))
            pq.write_table(pa.table({"region_id": IDS, "geometry": geometry}), path, store_schema=False)
        finally:
            pa.unregister_extension_type("geoarrow.wkb")
        file = ParquetFile(path)
        assert "Geom" in file.logical_types()["geometry"]
        return with_geo_key(file.read(), file)

    return roundtrip


class TestNativeGeometry:
    @pytest.mark.parametrize("meta", ["{}", '{"crs": "OGC:CRS84"}', '{"crs": "EPSG:4326"}', '{"crs": "srid:4326"}'])
    def test_crs84_is_read(self, native, meta):
        np.testing.assert_allclose(centroids(native(meta), "r", IDS), CENTRES)

    def test_another_system_is_refused(self, native):
        with pytest.raises(BadData, match=UTM16):
            centroids(native(json.dumps({"crs": UTM16, "crs_type": "authority_code"})), "r", IDS)

    def test_plain_binary_stays_unstated(self, tmp_path):
        pq.write_table(geo_table(geo=None), tmp_path / "r.parquet")
        file = ParquetFile(tmp_path / "r.parquet")
        with pytest.raises(BadData, match="not stated"):
            centroids(with_geo_key(file.read(), file), "r", IDS)

    def test_registered_geoarrow_columns_are_unwrapped(self):
        geometry = pa.ExtensionArray.from_storage(_Wkb(), wkb(SQUARES))
        table = pa.table({"geometry": geometry}).replace_schema_metadata({"geo": geo_key()})
        np.testing.assert_allclose(centroids(table, "r", IDS), CENTRES)


class TestReadGeometry:
    @pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".shp"])
    def test_gis_formats(self, tmp_path, suffix):
        places = read_geometry(gis_file(tmp_path / f"r{suffix}"), "area")
        assert places.ids.tolist() == ["01", "02"]
        np.testing.assert_allclose(places.lonlat, CENTRES, atol=1e-9)
        assert shapely.equals(shapely.from_wkb(places.wkb.to_pylist()), SQUARES).all()

    def test_reprojects_from_the_stated_system(self, tmp_path):
        import pyproj

        to_utm = pyproj.Transformer.from_crs("OGC:CRS84", UTM16, always_xy=True).transform
        metres = shapely.transform(SQUARES, to_utm, interleaved=False)
        places = read_geometry(gis_file(tmp_path / "r.gpkg", metres, crs=UTM16), None)
        assert places.ids is None
        np.testing.assert_allclose(places.lonlat, CENTRES, atol=1e-4)

    def test_refuses_a_shapefile_without_prj(self, tmp_path):
        path = gis_file(tmp_path / "r.shp")
        (tmp_path / "r.prj").unlink()
        with pytest.raises(BadData, match="states no reference system"):
            read_geometry(path, None)

    def test_geojson_without_crs_is_crs84(self, tmp_path):
        feature = {
            "type": "Feature",
            "properties": {"area": 7},
            "geometry": {"type": "Point", "coordinates": [1, 2]},
        }
        path = tmp_path / "r.geojson"
        path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
        places = read_geometry(path, "area")
        assert places.ids.tolist() == ["7"]
        assert places.lonlat.tolist() == [[1, 2]]

    def test_whole_floats_are_ids_without_fraction(self, tmp_path):
        path = gis_file(tmp_path / "r.gpkg", area=pa.array([7.0, 12.0]))
        assert read_geometry(path, "area").ids.tolist() == ["7", "12"]

    def test_tables_with_lon_and_lat(self, tmp_path):
        (tmp_path / "r.csv").write_text("GEOID,lon,lat\n007,-87.65,41.85\n010,-87.5,42\n")
        places = read_geometry(tmp_path / "r.csv", "GEOID")
        assert places.ids.tolist() == ["007", "010"]
        assert places.lonlat.tolist() == [[-87.65, 41.85], [-87.5, 42]]
        assert places.wkb is None

    def test_parquet_with_geometry(self, tmp_path):
        pq.write_table(geo_table(), tmp_path / "r.parquet")
        places = read_geometry(tmp_path / "r.parquet", "region_id")
        np.testing.assert_allclose(places.lonlat, CENTRES)
        assert places.wkb.equals(wkb(SQUARES))

    @pytest.mark.parametrize(
        ("name", "content", "id_col", "error", "part"),
        [
            ("no.gpkg", None, None, NoInput, "no such file"),
            ("r.gpkg", "hello", None, BadData, "not a readable GIS file"),
            ("r.csv", "a,lon,lat\n1,2,3\n", "GEOID", BadData, "id column is absent"),
            ("r.csv", "a,lon,lat\n1,2,3\n1,2,3\n", "a", BadData, "more than once"),
            ("r.csv", "a,lon,lat\n1,,3\n", "a", BadData, "1 empty"),
            ("r.csv", "a,lon,lat\n1,x,3\n", "a", BadData, "string"),
            ("r.csv", "a,x,y\n1,2,3\n", "a", BadData, "reference system is not stated"),
            ("r.csv", "", None, BadData, "not a CSV table"),
        ],
    )
    def test_bad_files(self, tmp_path, name, content, id_col, error, part):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(error, match=part) as caught:
            read_geometry(tmp_path / name, id_col)
        assert name in str(caught.value)

    def test_several_layers(self, tmp_path):
        path = gis_file(tmp_path / "r.gpkg")
        table = pa.table({"geometry": wkb(SQUARES)})
        pyogrio.write_arrow(
            table, path, layer="more", append=True, geometry_name="geometry", geometry_type="Polygon",
            crs="EPSG:4326",
        )  # fmt: skip
        with pytest.raises(BadData, match="r, more"):
            read_geometry(path, None)


class TestWriteGeo:
    @pytest.fixture
    def table(self):
        return pa.table(
            {
                "region_id": IDS,
                "crime": pa.array([1.5, None]),
                "poi": pa.FixedSizeListArray.from_arrays(pa.array([1, 2, 3, 4]), 2),
                "images": [["a.jpg"], None],
                "geometry": wkb(SQUARES),
            }
        )

    @pytest.mark.parametrize("suffix", [".gpkg", ".geojson"])
    def test_roundtrip(self, tmp_path, table, suffix):
        path = tmp_path / f"predictions{suffix}"
        path.write_text("an older file is replaced")
        write_geo(path, table)
        meta, read = pyogrio.read_arrow(path)
        assert meta["crs"] == "EPSG:4326"
        assert read["region_id"].to_pylist() == ["01", "02"]
        assert read["crime"].to_pylist() == [1.5, None]
        assert (read["poi_0"].to_pylist(), read["poi_1"].to_pylist()) == ([1, 3], [2, 4])
        assert read["images_0"].to_pylist() == ["a.jpg", None]
        np.testing.assert_allclose(read_geometry(path, "region_id").lonlat, CENTRES, atol=1e-9)
        assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing temporary is left"

    def test_points_from_lon_and_lat(self, tmp_path):
        lon, lat = CENTRES.T
        write_geo(tmp_path / "p.gpkg", pa.table({"region_id": IDS, "lon": lon, "lat": lat}))
        assert pyogrio.read_info(tmp_path / "p.gpkg")["geometry_type"] == "Point"
        assert read_geometry(tmp_path / "p.gpkg", "region_id").lonlat.tolist() == CENTRES.tolist()

    def test_mixed_types(self, tmp_path, table):
        mixed = [SQUARES[0], shapely.MultiPolygon([SQUARES[1]])]
        write_geo(tmp_path / "p.gpkg", table.set_column(4, "geometry", wkb(mixed)))
        assert len(read_geometry(tmp_path / "p.gpkg", None).lonlat) == 2

    def test_refuses_other_formats_and_tables_without_places(self, tmp_path, table):
        with pytest.raises(UsageError, match=r"\.gpkg or \.geojson"):
            write_geo(tmp_path / "p.kml", table)
        with pytest.raises(BadData, match="positions are absent"):
            write_geo(tmp_path / "p.gpkg", table.select(["region_id"]))
        assert not list(tmp_path.iterdir())


def test_geometry_types():
    assert geometry_types(wkb([shapely.Point(1, 2, 3), *SQUARES])) == ["Polygon", "Point Z"]
