"""Areas as they are published: without a system, in feet, invalid, in parts, as collections, and on a grid."""

import json
import zipfile

import numpy as np
import pytest
from open_data import chicago, opendata, squares

from topt_deploy.errors import BadConfig, BadData
from topt_deploy.train.datasets.build.recipe import Recipe, RegionsSource
from topt_deploy.train.datasets.build.regions import read_regions

shapely = pytest.importorskip("shapely", reason="needs the geo extra")
pyogrio = pytest.importorskip("pyogrio", reason="needs the geo extra")
pyproj = pytest.importorskip("pyproj", reason="needs the geo extra")


def read(file, **more):
    return read_regions(Recipe(city="x", regions=RegionsSource(file=str(file), **more)))


def collection(path, features):
    made = [{"type": "Feature", "properties": p, "geometry": g} for p, g in features]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": made}))
    return path


def ring(x, y, size=1.0):
    return [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]


def test_feet_without_a_system_are_refused_and_with_one_are_chicago():
    with pytest.raises(BadData, match="states no reference system") as told:
        read(chicago(), id="AREA_NUMBE")
    assert "--src-crs" in told.value.fix
    regions = read(chicago(), id="AREA_NUMBE", name="COMMUNITY", crs="EPSG:3435")
    assert len(regions) == 77
    assert regions.names[regions.ids.tolist().index("32")] == "LOOP"
    raw = pyogrio.raw.read(chicago(), columns=["AREA_NUMBE"])
    move = pyproj.Transformer.from_crs("EPSG:3435", "OGC:CRS84", always_xy=True).transform
    shapes = shapely.transform(shapely.from_wkb(raw[2]), move, interleaved=False)
    of = {str(int(number)): shape for number, shape in zip(raw[3][0], shapes, strict=True)}
    for name, shape in zip(regions.ids, regions.shapes, strict=True):
        assert shapely.equals_exact(shape, of[name], tolerance=1e-12)


def test_a_system_that_is_not_the_files_is_refused(tmp_path):
    with pytest.raises(BadConfig, match="another reference system"):
        read(squares(tmp_path), crs="EPSG:3435")
    with pytest.raises(BadConfig, match="no such reference system"):
        read(chicago(), id="AREA_NUMBE", crs="EPSG:nothing")


def test_a_wrong_system_puts_coordinates_beyond_the_earth(tmp_path):
    collection(tmp_path / "a.geojson", [({"id": "a"}, {"type": "Polygon", "coordinates": [ring(1e6, 1e6)]})])
    with pytest.raises(BadData, match="not degrees"):
        read(tmp_path / "a.geojson", id="id")


def test_parts_of_one_id_are_dissolved_and_ids_stay_text(tmp_path):
    """As taxi zones 56 (twice) and 103 (three times)."""
    areas = [("056", 0), ("056", 1), ("103", 5), ("103", 7), ("103", 9), ("07", 20), ("8", 30)]
    file = collection(
        tmp_path / "z.geojson", [({"zone": i}, {"type": "Polygon", "coordinates": [ring(x, 0)]}) for i, x in areas]
    )
    regions = read(file, id="zone")
    assert regions.ids.tolist() == ["056", "07", "103", "8"]
    assert regions.facts["dissolved"] == 3
    assert shapely.area(regions.shapes).tolist() == [2, 1, 3, 1]
    assert regions.shapes[0].geom_type == "Polygon"
    assert regions.shapes[2].geom_type == "MultiPolygon"
    numbers = [({"zone": float(i)}, {"type": "Polygon", "coordinates": [ring(i, 0)]}) for i in range(2)]
    assert read(collection(tmp_path / "n.geojson", numbers), id="zone").ids.tolist() == ["0", "1"]


def test_invalid_shapes_collections_and_heights_are_mended_and_counted(tmp_path):
    bow = {"type": "Polygon", "coordinates": [[[0, 0], [2, 2], [2, 0], [0, 2], [0, 0]]]}
    mixed = {
        "type": "GeometryCollection",
        "geometries": [
            {"type": "Polygon", "coordinates": [ring(5, 0)]},
            {"type": "LineString", "coordinates": [[0, 0], [9, 9]]},
            {"type": "Point", "coordinates": [5, 5]},
        ],
    }
    high = {"type": "Polygon", "coordinates": [[[*xy, 9.5] for xy in ring(8, 0)]]}
    line = {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}
    features = [
        ({"id": "a"}, bow),
        ({"id": "b"}, mixed),
        ({"id": "c"}, high),
        ({"id": "d"}, line),
        ({"id": None}, high),
    ]
    regions = read(collection(tmp_path / "a.geojson", features), id="id")
    assert regions.ids.tolist() == ["a", "b", "c"]
    assert shapely.area(regions.shapes).tolist() == [2, 1, 1]
    assert not shapely.has_z(regions.shapes).any()
    assert shapely.is_valid(regions.shapes).all()
    assert {k: regions.facts[k] for k in ("features", "repaired", "without_area", "without_id")} == {
        "features": 5, "repaired": 1, "without_area": 1, "without_id": 1,
    }  # fmt: skip
    assert "1 features have no id" in regions.warnings[0]


def test_layers_are_named(tmp_path):
    file = tmp_path / "a.gpkg"
    table = pyogrio.read_arrow(squares(tmp_path))[1]
    for layer in ("one", "two"):
        pyogrio.write_arrow(
            table, file, layer=layer, driver="GPKG", geometry_name="wkb_geometry", geometry_type="Polygon",
            crs="EPSG:4326", append=file.exists(),
        )  # fmt: skip
    with pytest.raises(BadConfig, match="several layers") as told:
        read(file, id="area_numbe")
    assert "one, two" in told.value.found
    assert len(read(file, id="area_numbe", layer="two")) == 9
    with pytest.raises(BadConfig, match="no such layer"):
        read(file, id="area_numbe", layer="three")


def test_a_zipped_shapefile(tmp_path):
    with zipfile.ZipFile(tmp_path / "areas.zip", "w") as packed:
        for part in chicago().parent.glob("Chicago77.*"):
            packed.write(part, part.name)
    assert len(read(tmp_path / "areas.zip", id="AREA_NUMBE", crs="EPSG:3435")) == 77


def test_geoparquet_keeps_its_system(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    frame = geopandas.read_file(chicago()).set_crs(3435, allow_override=True)
    frame.to_parquet(tmp_path / "a.parquet")
    regions = read(tmp_path / "a.parquet", id="AREA_NUMBE")
    same = read(chicago(), id="AREA_NUMBE", crs="EPSG:3435")
    assert shapely.equals_exact(regions.shapes, same.shapes, tolerance=1e-9).all()


def test_which_ids_is_never_guessed(tmp_path):
    file = collection(tmp_path / "a.geojson", [({"k": "a"}, {"type": "Polygon", "coordinates": [ring(0, 0)]})])
    with pytest.raises(BadConfig, match="ids is not stated") as told:
        read(file)
    assert told.value.found == "k"
    assert len(read(squares(tmp_path))) == 9  # a publisher's own name for them


def test_points_are_no_regions():
    with pytest.raises(BadData, match="states no reference system"):
        read(opendata("gisdata/data/bad/points_epsg2249_no_prj.shp"), id="NAME")
    with pytest.raises(BadData, match="no feature is an area"):
        read(opendata("gisdata/data/bad/points_wgs84_no_prj.shp"), id="NAME", crs="EPSG:4326")


@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("neighborhoodize/data/city_of_chicago/Boundaries - Community Areas (current).kml", 77),
        ("neighborhoodize/data/nyc/NYC - Neighborhood Tabulation Areas.kml", 195),
    ],
)
def test_real_kml_has_collections_and_invalid_rings(file, number):
    regions = read(opendata(file), id="Name")
    assert len(regions) == number
    assert regions.facts["repaired"] > 10
    assert shapely.is_valid(regions.shapes).all()


def test_kml_and_shapefile_of_chicago_are_the_same_place():
    kml = read(opendata("neighborhoodize/data/city_of_chicago/Boundaries - Community Areas (current).kml"), id="Name")
    shp = read(chicago(), id="AREA_NUMBE", crs="EPSG:3435")
    one, other = shapely.union_all(kml.shapes), shapely.union_all(shp.shapes)
    assert shapely.area(shapely.symmetric_difference(one, other)) < 0.01 * shapely.area(other)


@pytest.mark.parametrize("resolution", [7, 9])
def test_hexagons_are_h3s(resolution, tmp_path):
    h3 = pytest.importorskip("h3", reason="needs the build extra")
    outline = squares(tmp_path)
    recipe = Recipe(city="x", regions=RegionsSource(grid=f"h3:{resolution}", boundary=str(outline)))
    regions = read_regions(recipe)
    shape = shapely.union_all([shapely.from_geojson(json.dumps(f["geometry"]))
                               for f in json.loads(outline.read_text())["features"]])  # fmt: skip
    west, south, east, north = shape.bounds
    steps = np.linspace(0.001, 0.999, 60)
    touched = {h3.latlng_to_cell(south + b * (north - south), west + a * (east - west), resolution)
               for a in steps for b in steps}  # fmt: skip
    assert touched <= set(regions.ids)
    for cell, region in zip(regions.ids, regions.shapes, strict=True):
        own = shapely.Polygon([xy[::-1] for xy in h3.cell_to_boundary(cell)])
        assert shapely.equals_exact(shapely.normalize(region), shapely.normalize(own), 1e-12)
        assert shapely.intersects(region, shape)
    assert not regions.overlap


def test_squares_cover_the_outline_and_keep_their_ids(tmp_path):
    outline = str(squares(tmp_path))
    regions = read_regions(Recipe(city="x", regions=RegionsSource(grid="square:500m", boundary=outline)))
    whole = shapely.union_all(regions.shapes)
    areas = read_regions(Recipe(city="x", regions=RegionsSource(file=outline, id="area_numbe")))
    assert shapely.covers(shapely.buffer(whole, 1e-9), shapely.union_all(areas.shapes))
    area_m2, _ = pyproj.Geod(ellps="WGS84").geometry_area_perimeter(regions.shapes[4])
    assert abs(area_m2) == pytest.approx(250_000, rel=2e-3)  # UTM's scale is off by up to a thousandth
    assert all(name.startswith("16N_") for name in regions.ids)


def test_grids_that_make_no_sense(tmp_path):
    outline = str(squares(tmp_path))
    for grid, told in (("h3:16", "no such resolution"), ("hex:8", "unknown grid"), ("square:0.01m", "too fine")):
        with pytest.raises(BadConfig, match=told):
            read_regions(Recipe(city="x", regions=RegionsSource(grid=grid, boundary=outline)))
    with pytest.raises(BadConfig, match="outline"):
        Recipe(city="x", regions=RegionsSource(grid="h3:8"))
