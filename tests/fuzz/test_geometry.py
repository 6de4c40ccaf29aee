"""Shapes and their description as anyone may write them: centroids come of them, or an error that says why."""

import json

import numpy as np
import pyarrow as pa
import pytest
from fuzzing import contained, guided, mutations
from hypothesis import given

from topt_deploy.data.geometry import centroids, geometry_types

pytest.importorskip("shapely", reason="shapely is not installed (extra geo)")
import shapely

GEO = {
    "version": "1.1.0", "primary_column": "geometry",
    "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon"], "bbox": [0, 0, 1, 1]}},
}  # fmt: skip
SHAPES = [
    shapely.box(0, 0, 1, 1), shapely.Point(1, 2),
    shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(2, 2, 3, 3)]),
    shapely.GeometryCollection([shapely.Point(0, 0)]), shapely.Polygon(),
]  # fmt: skip


def seeds() -> list[bytes]:
    """A byte that says what the rest is: 0 a shape, 1 the description."""
    return [b"\0" + shapely.to_wkb(shape) for shape in SHAPES] + [b"\1" + json.dumps(GEO).encode()]


def target(data: bytes) -> None:
    """Find the centre of a shape beside a sound one, so described."""
    shape, geo = shapely.to_wkb(SHAPES[0]), json.dumps(GEO).encode()
    if data[:1] == b"\1":
        geo = data[1:]
    else:
        shape = data[1:]
    column = pa.array([shapely.to_wkb(SHAPES[0]), shape], pa.binary())
    table = pa.table({"geometry": column}).replace_schema_metadata({b"geo": geo})
    found = centroids(table, "table", np.array(["a", "b"]))
    assert found.shape == (2, 2)
    geometry_types(column)


def test_a_seed_is_sound():
    target(seeds()[0])


@given(mutations(seeds()))
def test_bytes(data):
    contained(target, data)


def test_guided():
    guided(__file__)
