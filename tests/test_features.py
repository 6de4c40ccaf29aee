import subprocess
import sys

import numpy as np
import pytest
from builders import LAND_USE, POI, fixed_lists, replaced, tiny_city, tiny_city_tables
from hypothesis import given, settings
from hypothesis import strategies as st

from topt_deploy.features import (
    EARTH_RADIUS_M,
    MOBILITY,
    POSITION,
    feature_widths,
    features,
    flow_features,
    local_position_m,
    range_columns,
)
from topt_deploy.table import Flows, Schema, read_city

SCHEMA = Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=True)


def sparse(dense):
    origin, dest = np.nonzero(dense)
    return Flows(origin=origin, dest=dest, flow=dense[origin, dest], target=dense[origin, dest])


def by_matrix(dense, x):
    """The mobility view from the full N × N matrix."""
    outflow, inflow = dense.sum(axis=1), dense.sum(axis=0)
    out = dense / np.where(outflow == 0, 1, outflow)[:, None]
    into = dense.T / np.where(inflow == 0, 1, inflow)[:, None]
    return np.concatenate([out @ x, into @ x, np.log1p(outflow)[:, None], np.log1p(inflow)[:, None]], axis=1)


class TestFlowFeatures:
    @settings(max_examples=40, derandomize=True, deadline=None)
    @given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 1000))
    def test_match_the_dense_matrix(self, n, density, seed):
        rng = np.random.default_rng(seed)
        dense = rng.uniform(0.5, 1e4, (n, n)) * (rng.random((n, n)) < density)
        x = rng.normal(size=(n, 3))
        np.testing.assert_allclose(flow_features(sparse(dense), x), by_matrix(dense, x), rtol=1e-10, atol=1e-10)

    def test_a_region_without_flows_gets_zeros(self):
        dense = np.zeros((4, 4))
        dense[0, 1] = 5
        x = np.ones((4, 2))
        found = flow_features(sparse(dense), x)
        assert (found[2:] == 0).all()
        np.testing.assert_allclose(found[0], [1, 1, 0, 0, np.log1p(5), 0])
        np.testing.assert_allclose(found[1], [0, 0, 1, 1, 0, np.log1p(5)])

    def test_zero_flows_are_no_flows(self):
        flows = Flows(origin=np.array([0]), dest=np.array([1]), flow=np.zeros(1), target=np.zeros(1))
        assert (flow_features(flows, np.ones((2, 1))) == 0).all()

    def test_direction_matters(self):
        dense = np.random.default_rng(0).uniform(1, 9, (5, 5))
        x = np.random.default_rng(1).normal(size=(5, 2))
        there, back = flow_features(sparse(dense), x), flow_features(sparse(dense.T), x)
        np.testing.assert_allclose(there[:, [2, 3, 0, 1, 5, 4]], back)

    @pytest.mark.parametrize("n", [2, 50])
    def test_width_does_not_depend_on_the_number_of_regions(self, n):
        city = tiny_city(n)
        assert features(city)[MOBILITY].shape == (n, feature_widths(SCHEMA)[MOBILITY])


class TestFeatures:
    def test_views_are_log1p_counts_in_float32(self):
        city = tiny_city(9)
        arrays = features(city)
        assert list(arrays) == ["poi", "land_use", MOBILITY, POSITION]
        assert {a.dtype for a in arrays.values()} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(arrays["poi"], np.log1p(city.views["poi"]).astype(np.float32))

    def test_mobility_is_made_of_all_views_and_the_flows(self):
        city = tiny_city(9)
        dense = np.zeros((9, 9))
        dense[city.flows.origin, city.flows.dest] = city.flows.flow
        x = np.log1p(np.concatenate([city.views["poi"], city.views["land_use"]], axis=1))
        np.testing.assert_allclose(features(city)[MOBILITY], by_matrix(dense, x), rtol=1e-5, atol=1e-6)

    def test_widths_are_those_of_the_arrays(self):
        arrays = features(tiny_city(7))
        assert feature_widths(SCHEMA) == {view: arrays[view].shape[1] for view in ("poi", "land_use", MOBILITY)}

    def test_without_mobility(self):
        regions, _ = tiny_city_tables(7)
        schema = Schema(views={"poi": POI}, mobility=False)
        assert list(features(read_city(regions, None, schema))) == ["poi", POSITION]
        assert feature_widths(schema) == {"poi": len(POI)}

    def test_prompts_pass_through_unchanged(self):
        regions, mobility = tiny_city_tables(7)
        vectors = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
        regions = replaced(regions, prompt_crime=fixed_lists(vectors))
        schema = Schema(views=SCHEMA.views, mobility=True, prompts={"prompt_crime": 5})
        city = read_city(regions, mobility, schema)
        np.testing.assert_array_equal(features(city)["prompt_crime"], vectors[city.input_row])

    def test_shuffled_rows_give_the_same_bits(self):
        regions, mobility = tiny_city_tables(40)
        rng = np.random.default_rng(0)
        first = features(read_city(regions, mobility, SCHEMA))
        for _ in range(3):
            shuffled = regions.take(rng.permutation(40)), mobility.take(rng.permutation(len(mobility)))
            for name, array in features(read_city(*shuffled, SCHEMA)).items():
                np.testing.assert_array_equal(array, first[name])


class TestPosition:
    def test_lies_on_the_sphere_around_the_citys_centre(self):
        lonlat = np.array([[0, 0], [90, 0], [0, 90.0]])
        corners = np.eye(3) * EARTH_RADIUS_M
        np.testing.assert_allclose(local_position_m(lonlat), corners - corners.mean(axis=0), atol=1e-6)

    def test_is_of_the_citys_size_and_not_of_the_earths(self):
        city = tiny_city(30)
        position = local_position_m(city.lonlat)
        assert np.abs(position).max() < 20_000
        np.testing.assert_allclose(position.mean(axis=0), 0, atol=1e-6)

    def test_does_not_care_on_which_side_of_the_antimeridian_a_point_is_written(self):
        here = local_position_m(np.array([[180.0, -17], [179.99, -17]]))
        there = local_position_m(np.array([[-180.0, -17], [179.99, -17]]))
        np.testing.assert_allclose(here, there, atol=1e-6)


def test_ranges_name_every_count_and_both_totals():
    city = tiny_city(15)
    columns = range_columns(city, SCHEMA)
    assert list(columns) == [
        *(f"poi_{name}" for name in POI),
        *(f"land_use_{name}" for name in LAND_USE),
        "outflow",
        "inflow",
    ]
    np.testing.assert_array_equal(columns["poi_café"], city.views["poi"][:, 1])
    for name, ends in (("outflow", city.flows.origin), ("inflow", city.flows.dest)):
        expected = [city.flows.flow[ends == i].sum() for i in range(15)]
        np.testing.assert_allclose(columns[name], expected)


def test_reading_a_city_does_not_load_pyarrow_compute(tmp_path):
    """It would cost the runtime more start-up time than all else: the promise in table.py's first lines."""
    import pyarrow.parquet as pq

    regions, mobility = tiny_city_tables(6)
    pq.write_table(regions, tmp_path / "r.parquet")
    pq.write_table(mobility, tmp_path / "m.parquet")
    code = f"""
import sys
sys.modules["pandas"] = None  # absent where predictions are made; where present, pyarrow loads it by itself
from pathlib import Path
from topt_deploy.features import features
from topt_deploy.table import Schema, read_city
schema = Schema(views={{"poi": {POI!r}, "land_use": {LAND_USE!r}}}, mobility=True)
features(read_city(Path({str(tmp_path / "r.parquet")!r}), Path({str(tmp_path / "m.parquet")!r}), schema))
print(*sorted(name for name in sys.modules if name in ("pyarrow.compute", "pyarrow.dataset", "torch")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
