"""Moran's I against a case by hand, against every rearrangement, and against esda."""

import itertools

import esda
import numpy as np
import pytest
from libpysal import weights

from topt_deploy.train.report.moran import NEIGHBOURS, Moran, meaning, morans_i, nearest

RING = np.array([[3, 1], [0, 2], [1, 3], [2, 0]])


def test_by_hand() -> None:
    """On a ring of four with 1, 2, 3, 6: z = −2, −1, 0, 3, and the neighbours' means of z are 1, −1, 1, −1."""
    found = morans_i(np.array([1.0, 2.0, 3.0, 6.0]), RING)
    assert found is not None
    assert found.value == pytest.approx((-2 + 1 + 0 - 3) / (4 + 1 + 0 + 9))
    assert found.expected == pytest.approx(-1 / 3)


def test_alternating_values_are_as_unlike_as_can_be() -> None:
    found = morans_i(np.array([5.0, -5.0, 5.0, -5.0]), RING)
    assert found is not None
    assert found.value == pytest.approx(-1)


def test_p_is_the_share_of_rearrangements() -> None:
    """All 720 orders of six values on a ring, counted, against the sampled share."""
    values = np.array([0.0, 1.0, 2.5, 4.0, 4.5, 7.0])
    ring = np.array([[(i - 1) % 6, (i + 1) % 6] for i in range(6)])

    def i_of(order: tuple[float, ...]) -> float:
        z = np.array(order) - np.mean(order)
        return sum(z[i] * (z[(i - 1) % 6] + z[(i + 1) % 6]) / 2 for i in range(6)) / (z**2).sum()

    all_of_them = np.array([i_of(order) for order in itertools.permutations(values)])
    found = morans_i(values, ring, permutations=4000)
    assert found is not None
    share = (all_of_them >= found.value - 1e-12).mean()
    assert found.p == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 4000))


@pytest.mark.parametrize(("n", "k", "seed"), [(9, 2, 0), (40, 5, 1), (77, 5, 2), (150, 7, 3)])
@pytest.mark.parametrize("sign", [1, -1])
def test_equals_esda(n: int, k: int, seed: int, sign: int) -> None:
    rng = np.random.default_rng(seed)
    positions = rng.normal(size=(n, 2))
    values = sign * positions[:, 0] + rng.normal(size=n)
    np.random.seed(seed)  # esda draws from the global generator
    oracle = esda.Moran(values, weights.KNN.from_array(positions, k=k), permutations=9999)
    found = morans_i(values, nearest(positions, k), permutations=9999)
    assert found is not None
    assert found.value == pytest.approx(oracle.I, rel=1e-12)
    assert found.expected == pytest.approx(oracle.EI, rel=1e-12)
    assert found.p == pytest.approx(oracle.p_sim, abs=5 * np.sqrt(0.5 / 9999))


def test_the_same_seed_gives_the_same_p() -> None:
    rng = np.random.default_rng(4)
    positions, values = rng.normal(size=(30, 3)), rng.normal(size=30)
    near = nearest(positions)
    assert morans_i(values, near) == morans_i(values, near)
    assert morans_i(values, near, seed=1) != morans_i(values, near)


def test_nearest_are_the_nearest_others() -> None:
    positions = np.random.default_rng(5).normal(size=(20, 3))
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (nearest(positions) == np.argsort(distance, axis=1)[:, :NEIGHBOURS]).all()


def test_a_city_smaller_than_its_neighbourhood_takes_all_others() -> None:
    found = nearest(np.random.default_rng(6).normal(size=(4, 2)))
    assert [sorted(row) for row in found.tolist()] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_values_that_do_not_vary_have_none() -> None:
    assert morans_i(np.full(4, 3.0), RING) is None
    assert "do not vary" in meaning(None)


@pytest.mark.parametrize(
    ("value", "p", "part"), [(0.4, 0.001, "cluster"), (-0.4, 0.001, "opposite"), (0.4, 0.2, "no spatial pattern")]
)
def test_what_it_means(value: float, p: float, part: str) -> None:
    assert part in meaning(Moran(value=value, expected=-0.01, p=p))
