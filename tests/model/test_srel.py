import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from builders import SREL, tiny_city
from hypothesis import given, settings
from hypothesis import strategies as st

from topt_deploy.data.features import EARTH_RADIUS_M, POSITION, features, local_position_m
from topt_deploy.model.srel import Adjacency, GraphormerLayer, Srel, SrelLoss, distance_m

WIDTHS = {"poi": 4, "land_use": 3, "mobility": 16}


def position(lonlat):
    return torch.from_numpy(local_position_m(np.asarray(lonlat, dtype=float)).astype(np.float32))


def cluster(centre, spread_m, n=12, seed=0):
    """Points around a centre, neighbours from about 100 m on."""
    rng = np.random.default_rng(seed)
    lon, lat = centre
    metres = rng.uniform(-spread_m, spread_m, (n, 2))
    metres[1] = metres[0] + [100, 0]
    metres[2] = metres[0] + [0, -100]
    degrees = metres / (math.radians(1) * EARTH_RADIUS_M)
    lonlat = np.array([lon, lat]) + degrees / [max(math.cos(math.radians(lat)), 1e-3), 1]
    lonlat[:, 0] = (lonlat[:, 0] + 180) % 360 - 180
    return np.clip(lonlat, [-180, -90], [180, 90])


class TestDistance:
    @pytest.mark.parametrize(
        "centre",
        [(0, 0), (-87.65, 41.85), (180, -17), (-179.999, 65), (25, 89.9), (151, -33.9), (10, -89.95)],
        ids=["origin", "chicago", "antimeridian", "near it", "north pole", "sydney", "south pole"],
    )
    @pytest.mark.parametrize("spread_m", [300, 25_000])
    def test_matches_haversine_within_a_city(self, centre, spread_m):
        lonlat = cluster(centre, spread_m)
        if abs(centre[1]) < 89:
            np.testing.assert_allclose(oracles.haversine_m(lonlat[:2], EARTH_RADIUS_M)[0, 1], 100, rtol=0.02)
        expected = oracles.haversine_m(lonlat, EARTH_RADIUS_M)
        np.testing.assert_allclose(distance_m(position(lonlat)), expected, rtol=1e-4, atol=1e-6)

    def test_neighbours_across_the_antimeridian_are_near(self):
        apart = distance_m(position([(179.9995, 10), (-179.9995, 10)]))[0, 1].item()
        assert apart == pytest.approx(0.001 * math.radians(1) * EARTH_RADIUS_M * math.cos(math.radians(10)), rel=1e-4)

    def test_over_the_pole(self):
        apart = distance_m(position([(0, 89.9995), (180, 89.9995)]))[0, 1].item()
        assert apart == pytest.approx(0.001 * math.radians(1) * EARTH_RADIUS_M, rel=1e-4)

    def test_antipodes_are_half_a_great_circle_apart(self):
        far = distance_m(position([(0, 0), (180, 0)]))
        assert far[0, 1].item() == pytest.approx(math.pi * EARTH_RADIUS_M, rel=1e-3)

    @settings(max_examples=40, derandomize=True, deadline=None)
    @given(
        st.floats(-180, 180, allow_nan=False),
        st.floats(-85, 85, allow_nan=False),
        st.floats(0, 2 * math.pi, allow_nan=False),
        st.floats(100, 20_000, allow_nan=False),
    )
    def test_anywhere_and_in_any_direction(self, lon, lat, direction, apart_m):
        step = np.degrees(apart_m / EARTH_RADIUS_M)
        other = (
            (lon + step * math.cos(direction) / math.cos(math.radians(lat)) + 180) % 360 - 180,
            lat + step * math.sin(direction),
        )
        lonlat = np.array([(lon, lat), other])
        expected = oracles.haversine_m(lonlat, EARTH_RADIUS_M)[0, 1]
        assert distance_m(position(lonlat))[0, 1].item() == pytest.approx(expected, rel=1e-4)

    def test_is_symmetric_and_zero_on_the_diagonal(self):
        apart = distance_m(position(cluster((-87.65, 41.85), 10_000)))
        torch.testing.assert_close(apart, apart.T, rtol=0, atol=0)
        assert apart.diagonal().abs().max() == 0


FORMS = {
    "exponential": lambda d, length: math.exp(-d / length),
    "gaussian": lambda d, length: math.exp(-((d / length) ** 2)),
    "inverse": lambda d, length: 1 / (1 + d / length),
}


class TestAdjacency:
    @pytest.mark.parametrize("decay", FORMS)
    def test_matches_its_formula_with_a_zero_diagonal(self, decay):
        lonlat = cluster((-87.65, 41.85), 5_000)
        layer = Adjacency(replace(SREL, decay=decay, decay_length_m=2_500.0))
        near = layer(position(lonlat))
        apart = oracles.haversine_m(lonlat, EARTH_RADIUS_M)
        expected = [
            [0 if i == j else FORMS[decay](apart[i, j], 2_500) for j in range(len(lonlat))] for i in range(len(lonlat))
        ]
        np.testing.assert_allclose(near, expected, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("decay", FORMS)
    def test_regions_at_one_place_are_near_each_other_but_not_to_themselves(self, decay):
        near = Adjacency(replace(SREL, decay=decay, decay_length_m=100.0))(position([(1, 2)] * 3))
        torch.testing.assert_close(near, 1 - torch.eye(3))

    def test_automatic_length_is_the_median_distance_to_the_fifth_nearest_region(self):
        lonlat = cluster((-87.65, 41.85), 8_000, n=13)
        layer = Adjacency(SREL)
        layer.fit(position(lonlat))
        fifth = [sorted(row)[5] for row in oracles.haversine_m(lonlat, EARTH_RADIUS_M)]
        assert layer.length_m.item() == pytest.approx(np.median(fifth), rel=1e-4)

    def test_a_given_length_stays(self):
        layer = Adjacency(replace(SREL, decay_length_m=321.0))
        layer.fit(position(cluster((0, 0), 8_000)))
        assert layer.length_m.item() == 321

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_a_handful_of_regions_still_gives_a_length(self, n):
        layer = Adjacency(SREL)
        layer.fit(position(cluster((0, 0), 3_000)[:n]))
        assert layer.length_m >= 1
        assert torch.isfinite(layer(position(cluster((0, 0), 3_000)[:n]))).all()


class TestGraphormerLayer:
    def test_adds_lambda_times_the_adjacency_to_the_scores(self):
        torch.manual_seed(0)
        layer = GraphormerLayer(SREL).eval()
        x, near = torch.randn(6, SREL.width), torch.rand(6, 6)
        mixed, _ = oracles.self_attention(oracles.array(x), layer.attention, 0.7 * oracles.array(near))
        expected = oracles.feed_forward(oracles.array(x), mixed, layer.feed_forward)
        np.testing.assert_allclose(layer(x, 0.7 * near).detach(), expected, rtol=1e-4, atol=1e-5)


def model_and_inputs(n=6, seed=0, **settings):
    torch.manual_seed(1)
    srel = Srel(WIDTHS, replace(SREL, **settings)).eval()
    inputs = {k: torch.from_numpy(v) for k, v in features(tiny_city(n, seed)).items()}
    srel.fit_statistics(inputs, inputs[POSITION])
    return srel, inputs


def embed(srel, inputs):
    with torch.no_grad():
        return srel(inputs, srel.adjacency(inputs[POSITION]))


class TestSrel:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"layers": 3, "heads": 1, "bias": 0.4, "intra_blocks": 2},
            {"distance_bias": False},
            {"centrality": False},
            {"distance_bias": False, "centrality": False, "layers": 0, "inter_blocks": 1},
            {"deep_fc": True, "layers": 3, "heads": 1, "bias": 0.4, "intra_blocks": 2},
            {"deep_fc": True, "inputs": "rows"},
        ],
        ids=["full", "paper's check-in", "no bias", "no centrality", "no space", "HAFusion's layers", "raw counts"],
    )
    def test_matches_the_equations_in_float64(self, settings):
        srel, inputs = model_and_inputs(bias=settings.pop("bias", 0.1), **settings)
        if srel.bias is not None:
            with torch.no_grad():
                srel.bias.mul_(5)  # a weak bias would pass if it were left out
        near = oracles.array(srel.adjacency(inputs[POSITION]))
        expected = oracles.srel({k: oracles.array(v) for k, v in inputs.items()}, near, srel)
        np.testing.assert_allclose(embed(srel, inputs), expected, rtol=2e-4, atol=2e-5)

    @pytest.mark.parametrize("setting", ["distance_bias", "centrality"])
    def test_each_spatial_prior_matters(self, setting):
        with_it, inputs = model_and_inputs(n=12)
        without, _ = model_and_inputs(n=12, **{setting: False})
        without.load_state_dict(with_it.state_dict(), strict=False)
        assert (embed(with_it, inputs) - embed(without, inputs)).abs().max() > 1e-4

    def test_without_both_priors_positions_do_not_matter(self):
        srel, inputs = model_and_inputs(distance_bias=False, centrality=False)
        moved = inputs | {POSITION: inputs[POSITION] * 3 + 1000}
        torch.testing.assert_close(embed(srel, inputs), embed(srel, moved), rtol=0, atol=0)

    def test_lambda_starts_where_the_configuration_says_and_is_learnt(self):
        srel, inputs = model_and_inputs(bias=0.4)
        assert srel.bias.item() == pytest.approx(0.4)
        srel(inputs, srel.adjacency(inputs[POSITION])).square().sum().backward()
        assert srel.bias.grad is not None
        assert srel.bias.grad.abs() > 0

    @pytest.mark.parametrize("n", [2, 3, 8, 31, 77, 200])
    def test_shuffled_regions_get_the_same_values(self, n):
        srel, _ = model_and_inputs(n=12)
        inputs = {k: torch.from_numpy(v) for k, v in features(tiny_city(n, 5)).items()}
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        shuffled = {k: v[order] for k, v in inputs.items()}
        torch.testing.assert_close(embed(srel, shuffled), embed(srel, inputs)[order], rtol=1e-4, atol=1e-5)

    def test_one_model_serves_cities_of_every_size(self):
        srel, _ = model_and_inputs(n=12)
        for n in (2, 5, 12, 76, 77, 200):
            inputs = {k: torch.from_numpy(v) for k, v in features(tiny_city(n, 3)).items()}
            embedding = embed(srel, inputs)
            assert embedding.shape == (n, SREL.width)
            assert torch.isfinite(embedding).all()

    def test_no_parameter_or_statistic_has_the_citys_size(self):
        n = 29
        srel, _ = model_and_inputs(n=n)
        assert all(n not in tensor.shape for tensor in srel.state_dict().values())

    def test_a_region_depends_on_the_others(self):
        srel, inputs = model_and_inputs(n=8)
        changed = inputs | {"poi": inputs["poi"].clone()}
        changed["poi"][7] += 1
        assert (embed(srel, inputs)[:7] - embed(srel, changed)[:7]).abs().max() > 1e-6


def loss_parts(n=7, seed=0, **settings):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    similarities = {"poi": rng.uniform(0, 1, (n, n)), "land_use": rng.uniform(0, 1, (n, n))}
    flow = rng.poisson(5, (n, n)) * 1.0
    flow /= flow.mean()
    loss = SrelLoss(
        {k: torch.from_numpy(v).float() for k, v in similarities.items()},
        torch.from_numpy(flow).float(),
        replace(SREL, **settings),
    )
    return loss, similarities, flow, torch.randn(n, SREL.width)


class TestSrelLoss:
    def test_mobility_matches_a_loop_over_origins_and_destinations(self):
        loss, _, flow, embedding = loss_parts(mobility_weight=0.25)
        source = oracles.linear(oracles.array(embedding), loss.source)
        destination = oracles.linear(oracles.array(embedding), loss.destination)
        n, expected = len(flow), 0.0
        for i in range(n):
            forth = oracles.softmax([float(source[i] @ destination[j]) for j in range(n)])
            back = oracles.softmax([float(destination[i] @ source[j]) for j in range(n)])
            for j in range(n):
                expected -= flow[i, j] * math.log(forth[j] + 1e-4) + flow[j, i] * math.log(back[j] + 1e-4)
        assert loss(embedding)["mobility"].item() == pytest.approx(0.25 * expected, rel=1e-4)

    def test_similarity_matches_a_loop(self):
        loss, similarities, _, embedding = loss_parts(similarity_weight=3.0)
        terms = loss(embedding)
        for view, target in similarities.items():
            x = oracles.linear(oracles.array(embedding), loss.decoders[view])
            n, expected = len(x), 0.0
            for i in range(n):
                for j in range(n):
                    cosine = float(x[i] @ x[j]) / math.sqrt(float(x[i] @ x[i]) * float(x[j] @ x[j]))
                    expected += (cosine - target[i, j]) ** 2 / n**2
            assert terms[view].item() == pytest.approx(3 * expected, rel=1e-4)

    def test_terms_are_named_and_mobility_is_left_out_without_flows(self):
        loss, *_, embedding = loss_parts()
        assert set(loss(embedding)) == {"mobility", "poi", "land_use"}
        without = SrelLoss(loss.similarities, None, SREL)
        assert set(without(embedding)) == {"poi", "land_use"}

    def test_does_not_depend_on_the_order_of_regions(self):
        loss, similarities, flow, embedding = loss_parts()
        order = np.random.default_rng(1).permutation(len(flow))
        shuffled = SrelLoss(
            {k: torch.from_numpy(v[np.ix_(order, order)]).float() for k, v in similarities.items()},
            torch.from_numpy(flow[np.ix_(order, order)]).float(),
            SREL,
        )
        shuffled.load_state_dict(loss.state_dict())
        expected = {name: term.item() for name, term in loss(embedding).items()}
        actual = {name: term.item() for name, term in shuffled(embedding[order]).items()}
        assert actual == pytest.approx(expected, rel=1e-5)
