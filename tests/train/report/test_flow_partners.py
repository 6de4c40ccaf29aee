"""Whom a region exchanges flow with, against dense matrices; and that the flow context weighs them so."""

import numpy as np
import pytest

from topt_deploy.data.features import _Averaging
from topt_deploy.data.flows import Flows
from topt_deploy.train.report.flow_partners import partners


def flows_of(matrix: np.ndarray) -> Flows:
    origin, dest = np.nonzero(matrix)
    flow = matrix[origin, dest].astype(float)
    return Flows(origin=origin, dest=dest, flow=flow, target=flow)


@pytest.mark.parametrize("n", [2, 5, 19])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_equal_dense_shares(n: int, density: float) -> None:
    rng = np.random.default_rng([n, int(10 * density)])
    matrix = rng.uniform(1, 50, (n, n)) * (rng.random((n, n)) < density)
    found = partners(flows_of(matrix), regions=n, k=3)
    for i in range(n):
        out, into = matrix[i].sum(), matrix[:, i].sum()
        share = [(matrix[i, j] / (out or 1) + matrix[j, i] / (into or 1)) / 2 for j in range(n)]
        expected = sorted((j for j in range(n) if j != i and share[j] > 0), key=lambda j: -share[j])[:3]
        assert [j for j, _ in found[i]] == expected
        assert [s for _, s in found[i]] == pytest.approx([share[j] for j in expected])


def test_shares_are_the_flow_contexts_weights() -> None:
    """Half of the context outwards plus half of the context inwards, of an indicator of the partner."""
    matrix = np.random.default_rng(1).poisson(4, (6, 6))
    flows = flows_of(matrix)
    averages = [_Averaging(a, b, flows.flow, n=6).of(np.eye(6))
                for a, b in ((flows.origin, flows.dest), (flows.dest, flows.origin))]  # fmt: skip
    weights = sum(averages) / 2
    for i, row in enumerate(partners(flows, regions=6, k=5)):
        assert row == [(j, pytest.approx(weights[i, j])) for j, _ in row]


def test_a_region_without_flows_and_flows_of_nothing() -> None:
    flows = Flows(origin=np.array([0, 0, 1]), dest=np.array([0, 1, 0]), flow=np.array([8.0, 0, 0]), target=np.zeros(3))
    assert partners(flows, regions=3, k=2) == [[], [], []]
