"""Cities that are made of a golden one: the same on every machine, for bundles hold what is predicted of them."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from topt_deploy.bundle.enlarged_city import enlarged
from topt_deploy.data.city import Schema, read_city

GOLDEN = pa.table(
    {
        "region_id": ["a", "b", "c", "d"],
        "lon": [0.0, 0.25, 0.5, 0.125],
        "lat": [45.0, 45.5, 45.25, 45.125],
        "poi_food": [1.0, 2.0, 3.0, 4.0],
        "prompt_crime": pa.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]], pa.list_(pa.float32(), 2)),
    }
)
FLOWS = pa.table({"origin_id": ["a", "b"], "dest_id": ["b", "c"], "flow": [5.0, 7.0]})
SCHEMA = Schema(views={"poi": ("food",)}, mobility=True, prompts={"prompt_crime": 2})
FOOD = [3.0, 3.0, 3.0, 2.0, 4.0, 1.0, 4.0, 3.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0, 3.0, 4.0, 4.0, 4.0, 1.0, 4.0]
LON = [-0.0031469736176216734, 0.7041928649817435, 0.36323817985171586]
DIGEST = "d9400f29d9d7606cb8a29f1fdc059cbc584aa890f253a5d9f31ad6a271b253e5"


def test_it_must_not_change():
    """Bundles hold PyTorch's predictions of these very numbers: another draw would fail every older one's self-test."""
    regions, flows = enlarged(GOLDEN, FLOWS, 20)
    assert regions.column("poi_food").to_pylist() == FOOD
    assert regions.column("lon").to_pylist()[:3] == LON
    digest = hashlib.sha256(repr([regions.to_pylist(), flows.to_pylist()]).encode()).hexdigest()
    assert digest == DIGEST


@pytest.mark.parametrize("n", [4, 31, 725])
def test_it_is_a_city_of_the_golden_ones_values(n):
    regions, flows = enlarged(GOLDEN, FLOWS, n)
    city = read_city(regions, flows, SCHEMA)
    assert len(city) == n
    assert len(flows) == n // 2
    assert set(regions.column("poi_food").to_pylist()) <= {1.0, 2.0, 3.0, 4.0}
    assert set(flows.column("flow").to_pylist()) <= {5.0, 7.0}
    if n > 100:
        sides = [np.ptp(regions.column(axis).to_numpy()) for axis in ("lon", "lat")]
        np.testing.assert_allclose(sides, 0.5 * np.sqrt(n / 4), rtol=0.02)
        neighbours = regions.column("poi_food").to_numpy()
        assert 0.6 < (neighbours[1:] != neighbours[:-1]).mean() < 0.9, "else a tile off by one would not be seen"


def test_a_model_without_flows():
    assert enlarged(GOLDEN, None, 9)[1] is None
