"""Graphs of regions against loops, known shapes, and refusals."""

import numpy as np
import pytest
from builders import tiny_city

from topt_deploy.data.flows import Flows
from topt_deploy.errors import BadData
from topt_deploy.train.evaluation.literature.graphs import (
    contiguity,
    distributions,
    mobility_similarities,
    nearest,
    od_matrix,
)
from topt_deploy.train.evaluation.literature.hrep import normalised, similar_regions
from topt_deploy.train.evaluation.literature.mvure import mutual_neighbours


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size else 0.0


def test_od_matrix_has_every_flow_at_origin_and_destination() -> None:
    flows = tiny_city(7, seed=3).flows
    assert flows is not None
    dense = od_matrix(flows, 7)
    assert dense.sum() == flows.flow.sum()
    for origin, dest, flow in zip(flows.origin, flows.dest, flows.flow, strict=True):
        assert dense[origin, dest] == flow


def test_distributions_sum_to_one_and_leave_empty_rows() -> None:
    shares = distributions(np.array([[1.0, 3.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(shares, [[0.25, 0.75], [0, 0]])


def test_mobility_similarities_are_cosines_of_where_flows_lead_to_and_come_from() -> None:
    # Region 2 sends nothing, region 0 receives nothing; 0 and 1 send to the same places in other proportions.
    flows = Flows(
        origin=np.array([0, 0, 1, 1]),
        dest=np.array([1, 2, 1, 2]),
        flow=np.array([1.0, 1.0, 1.0, 7.0]),
        target=np.ones(4),
    )
    outward, inward = mobility_similarities(flows, 3)
    assert outward[0, 1] == pytest.approx(cosine(np.array([1, 1]), np.array([1, 7])))
    assert inward[1, 2] == pytest.approx(cosine(np.array([1, 1]), np.array([1, 7])))
    assert not outward[2].any()
    assert not inward[0].any()


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_nearest_against_a_loop(k: int) -> None:
    rng = np.random.default_rng(k)
    similarity = rng.integers(0, 5, (8, 8)) / 4  # with ties and zeros
    marked = nearest(similarity, k)
    for i in range(8):
        for j in range(8):
            more_similar = sum(similarity[i, other] > similarity[i, j] for other in range(8))
            assert marked[i, j] == (similarity[i, j] > 0 and more_similar < k)


def test_graphs_do_not_depend_on_the_order_of_the_regions() -> None:
    rng = np.random.default_rng(0)
    similarity = np.round(rng.uniform(size=(11, 11)), 1)
    order = rng.permutation(11)
    for graph in (mutual_neighbours, similar_regions):
        np.testing.assert_array_equal(
            graph(similarity[np.ix_(order, order)], 4), graph(similarity, 4)[np.ix_(order, order)]
        )
    lonlat = rng.uniform(-0.1, 0.1, (11, 2)) + np.array([13.4, 52.5])
    np.testing.assert_array_equal(contiguity(lonlat[order]), contiguity(lonlat)[np.ix_(order, order)])


def test_neighbours_are_mutual_in_mvure_and_one_sided_in_hrep() -> None:
    similarity = np.array([[1.0, 0.9, 0.1], [0.5, 1.0, 0.8], [0.2, 0.9, 1.0]])  # 0 → 1, 1 ↔ 2
    both = np.array([[1, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=bool)
    np.testing.assert_array_equal(mutual_neighbours(similarity, 2), both)
    one = both.copy()
    one[0, 1] = one[1, 0] = True
    np.testing.assert_array_equal(similar_regions(similarity, 2), one)


def test_normalised_against_matrices() -> None:
    graph = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=bool)
    root = np.diag(graph.sum(axis=1) ** -0.5)
    np.testing.assert_allclose(normalised(graph), root @ graph @ root)


@pytest.mark.parametrize("lon", [-87.6, 180.0])
def test_contiguity_of_a_square_and_its_middle(lon: float) -> None:
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [0, 0]]) / 100
    lonlat = corners + np.array([lon, 41.8])
    lonlat[:, 0] = (lonlat[:, 0] + 180) % 360 - 180  # across the date line, too
    expected = np.array([[0, 1, 0, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(contiguity(lonlat), expected.astype(bool))


@pytest.mark.parametrize(
    "lonlat",
    [
        [[0, 0], [0, 0.1], [0, 0.2], [0, 0.3]],
        [[0, 0], [0.1, 0]],
        [[0, 0], [0.1, 0], [0, 0.1], [0.1, 0.1], [0.1, 0.1]],
    ],
    ids=["on a line", "two regions", "one position twice"],
)
def test_contiguity_refuses_positions_that_tell_no_neighbours(lonlat: list[list[float]]) -> None:
    with pytest.raises(BadData, match="neighbours cannot be told"):
        contiguity(np.array(lonlat))
