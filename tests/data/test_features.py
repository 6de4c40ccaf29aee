import subprocess
import sys

import numpy as np
import pytest
from builders import LAND_USE, POI, fixed_lists, replaced, tiny_city, tiny_city_tables
from hypothesis import given, settings
from hypothesis import strategies as st

from topt_deploy.data import features as feature_module
from topt_deploy.data.city import Schema, read_city
from topt_deploy.data.features import (
    DESTINATIONS,
    EARTH_RADIUS_M,
    FLOW_VIEWS,
    LOG_CONTEXT,
    MOBILITY,
    POSITION,
    TRIPS,
    TWO_HOPS,
    all_widths,
    feature_widths,
    features,
    flow_features,
    local_position_m,
    range_columns,
)
from topt_deploy.data.flows import Flows

SCHEMA = Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=True)


def sparse(dense):
    origin, dest = np.nonzero(dense)
    return Flows(origin=origin, dest=dest, flow=dense[origin, dest], target=dense[origin, dest])


def by_matrix(dense, x, position_m):
    """Every flow view from the full N × N matrices, region by region where that is plainer."""

    def rows(matrix):
        total = matrix.sum(axis=1)
        return matrix / np.where(total == 0, 1, total)[:, None]

    out, into = rows(dense), rows(dense.T)
    log_out, log_into = rows(np.log1p(dense)), rows(np.log1p(dense).T)
    outflow, inflow, within = dense.sum(axis=1), dense.sum(axis=0), np.diag(dense)
    length_km = np.sqrt(((position_m[:, None] - position_m[None]) ** 2).sum(axis=2)) / 1000
    trips = []
    for i in range(len(x)):
        lengths = [np.log1p(p[i] @ length_km[i]) for p in (out, into, log_out, log_into)]
        shares = [within[i] / total[i] if total[i] else 0 for total in (outflow, inflow)]
        entropies = [-sum(s * np.log(s) for s in p[i] if s > 0) for p in (out, into)]
        totals = [np.log1p(outflow[i]), np.log1p(inflow[i])]
        trips.append([*totals, *lengths, np.log1p(within[i]), *shares, *entropies])
    return {
        MOBILITY: np.column_stack([out @ x, into @ x, np.log1p(outflow), np.log1p(inflow)]),
        LOG_CONTEXT: np.column_stack([log_out @ x, log_into @ x]),
        TWO_HOPS: np.column_stack([out @ out @ x, into @ into @ x]),
        TRIPS: np.array(trips),
        DESTINATIONS: np.column_stack([p @ position_m for p in (out, into, log_out, log_into)]),
    }


def random_city(n, density, seed, width):
    """Flows (N, N), some within a region, features (N, F) and positions in metres."""
    rng = np.random.default_rng(seed)
    dense = rng.uniform(0.5, 1e4, (n, n)) * (rng.random((n, n)) < density)
    return dense, rng.normal(size=(n, width)), rng.normal(scale=5e3, size=(n, 3))


class TestFlowFeatures:
    @settings(max_examples=40, derandomize=True, deadline=None)
    @given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 1000), st.integers(1, 5))
    def test_match_the_dense_matrix(self, n, density, seed, width):
        dense, x, position_m = random_city(n, density, seed, width)
        found, expected = flow_features(sparse(dense), x, position_m), by_matrix(dense, x, position_m)
        assert list(found) == list(expected) == list(FLOW_VIEWS)
        for view, values in expected.items():
            np.testing.assert_allclose(found[view], values, rtol=1e-9, atol=1e-9, err_msg=view)

    def test_two_regions_by_hand(self):
        """Three trips in four stay in the first region, one goes 3 km to the second; nothing leaves the second."""
        dense = np.array([[3.0, 1.0], [0, 0]])
        x, position_m = np.array([[10.0], [20.0]]), np.array([[0.0, 0, 0], [3000, 0, 0]])
        found = flow_features(sparse(dense), x, position_m)
        log_share = np.log(2) / (np.log(4) + np.log(2))  # of the flow to the second region: a third
        assert log_share == pytest.approx(1 / 3)
        np.testing.assert_allclose(found[MOBILITY][0], [12.5, 10, np.log(5), np.log(4)])
        np.testing.assert_allclose(found[LOG_CONTEXT][0], [10 + 10 / 3, 10])
        np.testing.assert_allclose(found[TWO_HOPS], [[0.75 * 12.5, 10], [0, 10]])
        entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
        first = [np.log(5), np.log(4), np.log(1.75), 0, np.log(2), 0, np.log(4), 0.75, 1, entropy, 0]
        np.testing.assert_allclose(found[TRIPS][0], first, atol=1e-15)
        np.testing.assert_allclose(found[DESTINATIONS][0], [750, 0, 0, 0, 0, 0, 1000, 0, 0, 0, 0, 0])

    def test_a_region_without_flows_gets_zeros(self):
        dense = np.zeros((4, 4))
        dense[0, 1] = 5
        found = flow_features(sparse(dense), np.ones((4, 2)), np.ones((4, 3)))
        for view, values in found.items():
            assert (values[2:] == 0).all(), view
            assert (values[:2] != 0).any() == (view != TWO_HOPS), "no second hop leaves region 1"

    def test_zero_flows_are_no_flows(self):
        """Zeros among the flows, and nothing but zeros."""
        dense, x, position_m = random_city(7, 0.4, 3, 2)
        few = sparse(dense)
        origin, dest = np.nonzero(dense == 0)
        zero = np.zeros(len(origin))
        more = Flows(
            origin=np.concatenate([few.origin, origin]),
            dest=np.concatenate([few.dest, dest]),
            flow=np.concatenate([few.flow, zero]),
            target=np.concatenate([few.target, zero]),
        )
        none = Flows(origin=origin, dest=dest, flow=zero, target=zero)
        expected = flow_features(few, x, position_m)
        for view, values in flow_features(more, x, position_m).items():
            np.testing.assert_allclose(values, expected[view], rtol=1e-12, atol=1e-12)
        for values in flow_features(none, x, position_m).values():
            assert (values == 0).all()

    def test_direction_matters(self):
        dense, x, position_m = random_city(5, 1, 0, 2)
        there, back = (flow_features(sparse(d), x, position_m) for d in (dense, dense.T))
        order = {
            MOBILITY: [2, 3, 0, 1, 5, 4],
            LOG_CONTEXT: [2, 3, 0, 1],
            TWO_HOPS: [2, 3, 0, 1],
            TRIPS: [1, 0, 3, 2, 5, 4, 6, 8, 7, 10, 9],
            DESTINATIONS: [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8],
        }
        for view, columns in order.items():
            assert not np.allclose(there[view], back[view])
            np.testing.assert_allclose(there[view][:, columns], back[view], rtol=1e-9, err_msg=view)

    @pytest.mark.parametrize("n", [2, 50])
    def test_width_does_not_depend_on_the_number_of_regions(self, n):
        city = tiny_city(n)
        arrays = features(city)
        assert {name: array.shape for name, array in arrays.items()} == {
            name: (n, width) for name, width in all_widths(SCHEMA).items()
        }

    @pytest.mark.parametrize("view", FLOW_VIEWS)
    def test_a_view_alone_has_the_same_bits(self, view):
        dense, x, position_m = random_city(9, 0.5, 4, 3)
        (alone,) = flow_features(sparse(dense), x, position_m, [view]).items()
        assert alone[0] == view
        np.testing.assert_array_equal(alone[1], flow_features(sparse(dense), x, position_m)[view])


class TestFeatures:
    def test_views_are_log1p_counts_in_float32(self):
        city = tiny_city(9)
        arrays = features(city)
        assert list(arrays) == ["poi", "land_use", *FLOW_VIEWS, POSITION]
        assert {a.dtype for a in arrays.values()} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(arrays["poi"], np.log1p(city.views["poi"]).astype(np.float32))

    def test_flow_views_are_made_of_all_count_views_the_flows_and_the_positions(self):
        city = tiny_city(9)
        dense = np.zeros((9, 9))
        dense[city.flows.origin, city.flows.dest] = city.flows.flow
        x = np.log1p(np.concatenate([city.views["poi"], city.views["land_use"]], axis=1))
        arrays = features(city)
        for view, values in by_matrix(dense, x, local_position_m(city.lonlat)).items():
            np.testing.assert_allclose(arrays[view], values, rtol=1e-5, atol=1e-3 if view == DESTINATIONS else 1e-6)

    def test_widths_are_those_of_the_arrays(self):
        arrays = features(tiny_city(7))
        assert feature_widths(SCHEMA) == {view: arrays[view].shape[1] for view in ("poi", "land_use", MOBILITY)}
        assert list(all_widths(SCHEMA).items()) == [(view, array.shape[1]) for view, array in arrays.items()]

    def test_without_mobility(self):
        regions, _ = tiny_city_tables(7)
        schema = Schema(views={"poi": POI}, mobility=False)
        assert list(features(read_city(regions, None, schema))) == ["poi", POSITION]
        assert feature_widths(schema) == {"poi": len(POI)}
        assert all_widths(schema) == {"poi": len(POI), POSITION: 3}

    def test_prompts_pass_through_unchanged(self):
        regions, mobility = tiny_city_tables(7)
        vectors = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
        regions = replaced(regions, prompt_crime=fixed_lists(vectors))
        schema = Schema(views=SCHEMA.views, mobility=True, prompts={"prompt_crime": 5})
        city = read_city(regions, mobility, schema)
        np.testing.assert_array_equal(features(city)["prompt_crime"], vectors[city.input_row])

    def test_makes_what_is_asked_for_in_that_order_and_no_more(self, monkeypatch):
        city, made = tiny_city(7, prompts=("prompt_crime",)), []
        whole = features(city)
        views = feature_module.flow_features
        monkeypatch.setattr(feature_module, "flow_features", lambda *a: made.append([*a[3]]) or views(*a))
        for names in (["prompt_crime", MOBILITY, "poi"], [POSITION], list(whole)):
            arrays = features(city, names)
            assert list(arrays) == names
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, whole[name])
        assert made == [[MOBILITY], [], [*FLOW_VIEWS]]

    def test_what_a_city_lacks_cannot_be_asked_for(self):
        with pytest.raises(KeyError, match="prompt_crime"):
            features(tiny_city(7), ["poi", "prompt_crime"])

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
from topt_deploy.data.features import features
from topt_deploy.data.city import Schema, read_city
schema = Schema(views={{"poi": {POI!r}, "land_use": {LAND_USE!r}}}, mobility=True)
features(read_city(Path({str(tmp_path / "r.parquet")!r}), Path({str(tmp_path / "m.parquet")!r}), schema))
print(*sorted(name for name in sys.modules if name in ("pyarrow.compute", "pyarrow.dataset", "torch")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
