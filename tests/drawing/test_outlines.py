"""Outlines: places come out where they are on Earth, and polygons keep their borders, parts and holes."""

import re

import numpy as np
import pytest
import shapely

from topt_deploy.data.features import local_position_m
from topt_deploy.drawing.outlines import HEIGHT, WIDTH, east_north_m, point_outlines, polygon_outlines, project_m

CITIES = [(-87.65, 41.85), (151.2, -33.9), (0.0, 0.0), (-0.01, 64.1), (179.99, -17.7), (-78.5, -0.2)]


@pytest.mark.parametrize("centre", CITIES)
@pytest.mark.parametrize("degrees", [0.02, 0.4])
def test_positions_become_metres_east_and_north(centre: tuple[float, float], degrees: float) -> None:
    """The centre is not stored; float32 positions still tell which way is north."""
    offsets = np.random.default_rng(0).uniform(-degrees, degrees, (30, 2))
    lonlat = np.array(centre) + offsets
    position = local_position_m(lonlat).astype(np.float32).astype(np.float64)
    expected = project_m(lonlat, centre=lonlat.mean(axis=0))
    tolerance = 0.01 * np.abs(expected).max()
    points, north_up = east_north_m(position)
    assert north_up
    np.testing.assert_allclose(points, expected - expected.mean(axis=0), atol=tolerance)


def spread(lonlat: np.ndarray) -> np.ndarray:
    """What does not change when a map is turned or mirrored: extents along the principal directions."""
    metres = project_m(lonlat, centre=lonlat.mean(axis=0))
    return np.linalg.svd(metres - metres.mean(axis=0))[1]


@pytest.mark.parametrize("n", [2, 3, 30])
def test_too_few_regions_or_a_row_of_them_do_not_tell_where_north_is(n: int) -> None:
    """Three points lie in a plane whichever way they are turned, and so do any along a parallel."""
    rng = np.random.default_rng(n)
    lonlat = np.array([10.0, 48.0]) + rng.uniform(-0.1, 0.1, (n, 2)) * ([1, 0] if n > 3 else [1, 1])
    points, north_up = east_north_m(local_position_m(lonlat).astype(np.float32).astype(np.float64))
    assert not north_up
    np.testing.assert_allclose(np.linalg.svd(points)[1], spread(lonlat), rtol=2e-3, atol=20)


def test_four_regions_are_enough() -> None:
    lonlat = np.array([[10.0, 48.0], [10.2, 48.0], [10.1, 48.2], [10.08, 48.05]])
    points, north_up = east_north_m(local_position_m(lonlat).astype(np.float32).astype(np.float64))
    expected = project_m(lonlat, centre=lonlat.mean(axis=0))
    assert north_up
    np.testing.assert_allclose(points, expected - expected.mean(axis=0), atol=0.01 * np.abs(expected).max())


def test_projection_has_a_degree_of_latitude_and_crosses_the_antimeridian() -> None:
    east, north = project_m(np.array([[-179.9, 61.0]]), centre=np.array([179.9, 60.0]))[0]
    assert north == pytest.approx(111_195, rel=1e-4)
    assert east == pytest.approx(0.2 * 111_195 / 2, rel=1e-4)


@pytest.mark.parametrize("lonlat", [[[0, 0], [0.01, 0], [0.03, 0]], [[5, 50]] * 3], ids=["in a row", "in one place"])
def test_places_without_an_extent_still_have_finite_outlines(lonlat: list[list[float]]) -> None:
    drawn = point_outlines(east_north_m(local_position_m(np.array(lonlat, float)))[0])
    assert len(drawn.paths) == 3
    assert "nan" not in "".join(drawn.paths)


def start(path: str) -> tuple[float, float]:
    x, y = re.match(r"M(\S+) ([^\sa]+)", path).groups()  # type: ignore[union-attr]
    return float(x), float(y)


def test_points_lie_within_the_drawing_north_up_and_do_not_cover_each_other() -> None:
    lon, lat = np.meshgrid(np.linspace(0, 0.1, 6), np.linspace(50, 50.1, 5))
    lonlat = np.stack([lon.ravel(), lat.ravel()], axis=1)
    drawn = point_outlines(project_m(lonlat, centre=lonlat[0]))
    x, y = np.array([start(path) for path in drawn.paths]).T.reshape(2, 5, 6)
    assert (np.diff(x, axis=1) > 0).all()
    assert (np.diff(y, axis=0) < 0).all()
    assert drawn.points
    assert 0 <= x.min() <= x.max() <= drawn.width == WIDTH
    assert 0 <= y.min() <= y.max() <= drawn.height <= HEIGHT


def test_polygons_keep_holes_and_parts() -> None:
    whole = shapely.box(0, 0, 0.1, 0.1)
    holed = shapely.difference(whole, shapely.box(0.03, 0.03, 0.06, 0.06))
    parts = shapely.MultiPolygon([shapely.box(0.1, 0, 0.2, 0.1), shapely.box(0.3, 0, 0.4, 0.1)])
    drawn = polygon_outlines(np.array([holed, parts]))
    assert [path.count("M") for path in drawn.paths] == [2, 2]
    assert not drawn.points
    assert drawn.bar == pytest.approx((WIDTH - 16) / 0.4 / 111.195 * drawn.bar_km, rel=1e-3)


def corners(path: str) -> set[tuple[str, str]]:
    flat = re.findall(r"-?\d+\.\d", path)
    return set(zip(flat[::2], flat[1::2], strict=True))


def test_simplified_neighbours_keep_their_common_border() -> None:
    t = np.linspace(0, 1, 400)
    wave = np.stack([1 + 0.004 * np.sin(60 * t), t], axis=1)
    left = shapely.Polygon([(0, 0), *wave, (0, 1)])
    right = shapely.Polygon([(2, 0), *wave, (2, 1)])
    drawn = polygon_outlines(np.array([left, right]))
    first, second = map(corners, drawn.paths)
    assert len(first) < 200, "nothing was simplified"
    outer = {c for c in first | second if float(c[0]) in (8.0, WIDTH - 8)}
    assert first - outer == second - outer
