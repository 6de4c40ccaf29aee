"""Losses and layers against loops and scikit-learn; networks that shuffled regions pass through unchanged."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor
from torch.nn import functional as F

from topt_deploy.train.evaluation.literature.hafusion import HaFusionModel
from topt_deploy.train.evaluation.literature.hrep import (
    RELATIONS,
    HrepModel,
    PrefixHead,
    RelationGcn,
    hrep_loss,
    normalised,
)
from topt_deploy.train.evaluation.literature.losses import flow_cross_entropy
from topt_deploy.train.evaluation.literature.mvure import (
    GraphAttention,
    MvureModel,
    Sharing,
    ViewEmbeddings,
    mvure_loss,
)
from topt_deploy.train.evaluation.literature.recp import (
    ENTROPY,
    TEMPERATURE,
    RecpModel,
    augmented_counts,
    augmented_flows,
    inter_view_loss,
    intra_view_loss,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def flows_by_loop(s: Tensor, d: Tensor, flow: Tensor) -> float:
    n, total = len(s), 0.0
    for i in range(n):
        for j in range(n):
            leads_to = math.exp(s[i] @ d[j]) / sum(math.exp(s[i] @ d[k]) for k in range(n))
            comes_from = math.exp(s[i] @ d[j]) / sum(math.exp(s[k] @ d[j]) for k in range(n))
            total -= float(flow[i, j]) * (math.log(leads_to) + math.log(comes_from))
    return total


def test_flow_cross_entropy_against_a_loop() -> None:
    s, d, flow = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 5)
    assert float(flow_cross_entropy(s, d, flow)) == pytest.approx(flows_by_loop(s, d, flow), rel=1e-5)


def test_mvure_loss_is_flows_and_one_term_per_attribute() -> None:
    views, flow, similarities = torch.randn(4, 6, 3), torch.rand(6, 6), torch.rand(2, 6, 6)
    expected = flows_by_loop(views[0], views[1], flow)
    for view, similarity in zip(views[2:], similarities, strict=True):
        expected += np.mean([(float(view[i] @ view[j] - similarity[i, j])) ** 2 for i in range(6) for j in range(6)])
    got = mvure_loss(ViewEmbeddings(views=views, fused=views[0]), flow, similarities)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_graph_attention_against_a_loop() -> None:
    views, n, heads, width = 2, 5, 3, 2
    layer = GraphAttention(views=views, features=4, heads=heads, head_width=width, dropout=0.0)
    torch.nn.init.normal_(layer.bias)
    x, graphs = torch.randn(n, 4), (torch.rand(views, n, n) < 0.5) | torch.eye(n, dtype=torch.bool)
    out = layer(x, graphs)
    assert out.shape == (views, n, heads * width)
    for v in range(views):
        for i in range(n):
            for head in range(heads):
                h = x @ layer.weight[v, head]
                neighbours = [j for j in range(n) if graphs[v, i, j]]
                scores = [h[i] @ layer.to_self[v, head] + h[j] @ layer.to_other[v, head] for j in neighbours]
                weights = torch.softmax(F.leaky_relu(torch.cat(scores), 0.2), dim=0)
                mixed = sum(w * h[j] for w, j in zip(weights, neighbours, strict=True)) + layer.bias[v, head, 0]
                torch.testing.assert_close(out[v, i, head * width : (head + 1) * width], torch.relu(mixed))


def test_sharing_is_attention_among_the_regions_of_a_view() -> None:
    layer, views = Sharing(width=6, heads=2, inner=3), torch.randn(4, 5, 6)
    out = layer(views)
    for x, got in zip(views, out, strict=True):
        q, k = layer.query(x).view(5, 2, 3).transpose(0, 1), layer.key(x).view(5, 2, 3).transpose(0, 1)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, x.expand(2, -1, -1)).mean(dim=0))


def test_hrep_loss_against_loops() -> None:
    by_relation, flow, poi = torch.randn(4, 6, 3), torch.rand(6, 6), torch.rand(6, 6)
    near, far = torch.tensor([1, 0, 3, 2, 5, 4]), torch.tensor([5, 4, 0, 1, 2, 3])
    anchor, by_poi, source, destination = by_relation
    triplets = [
        max(0.0, float((anchor[i] - anchor[near[i]]).norm() - (anchor[i] - anchor[far[i]]).norm()) + 1)
        for i in range(6)
    ]
    similar = np.mean([(float(by_poi[i] @ by_poi[j] - poi[i, j])) ** 2 for i in range(6) for j in range(6)])
    expected = np.mean(triplets) + similar + flows_by_loop(source, destination, flow)
    assert float(hrep_loss(by_relation, flow, poi, near, far)) == pytest.approx(expected, rel=1e-5)


def test_relation_gcn_of_one_layer_is_a_convolution_of_features_times_relation() -> None:
    gcn, x, relations = RelationGcn(width=4, layers=1, dropout=0.0), torch.randn(5, 4), torch.randn(2, 4)
    graphs = torch.rand(2, 5, 5)
    out, updated = gcn(x, graphs, relations)
    for r in range(2):
        torch.testing.assert_close(out[r], graphs[r] @ ((x * relations[r]) @ gcn.weights[0].weight.T) + gcn.biases[0])
    torch.testing.assert_close(updated, gcn.updates[0](relations))


def test_prefix_head_against_a_loop_and_starts_from_the_ridge_fit() -> None:
    coefficients, intercepts, embedding = torch.randn(3, 4), torch.randn(3), torch.randn(6, 4)
    head = PrefixHead(coefficients, intercepts, regions=6)
    out = head(embedding)
    for row in range(3):
        for region in range(6):
            joined = torch.cat([head.prefix[row, region], embedding[region]])
            weight = torch.cat([coefficients[row], coefficients[row]])
            torch.testing.assert_close(out[row, region], joined @ weight + intercepts[row])


def test_intra_view_loss_against_a_loop() -> None:
    z, positives = torch.rand(5, 3) / 5, [torch.rand(5, 3) / 5 for _ in range(2)]
    terms = []
    for i in range(5):
        alike = [float(z[i] @ p[i]) / TEMPERATURE for p in positives]
        others = [float(z[i] @ z[j]) / TEMPERATURE for j in range(5) if j != i]
        total = sum(map(math.exp, alike + others))
        terms += [-math.log(math.exp(a) / total) for a in alike]
    assert float(intra_view_loss(z, positives)) == pytest.approx(np.mean(terms), rel=1e-5)


def test_inter_view_loss_is_mutual_information_and_entropies_of_the_joint() -> None:
    a, b = torch.randn(7, 4).double().softmax(dim=1), torch.randn(7, 4).double().softmax(dim=1)
    joint = sum(np.outer(x, y) + np.outer(y, x) for x, y in zip(a.numpy(), b.numpy(), strict=True)) / 14
    one = entropy(joint.sum(axis=1))
    information = 2 * one - entropy(joint.ravel())
    assert float(inter_view_loss(a, b)) == pytest.approx(-(information + ENTROPY * 2 * one))


def test_augmented_counts_change_one_in_ten() -> None:
    counts = np.array([[400, 600, 0], [1, 0, 0], [0, 0, 0]]).repeat(200, axis=0)
    added, removed, replaced = augmented_counts(counts, np.random.default_rng(0))
    assert (added >= counts).all()
    assert (removed <= counts).all()
    assert (removed[200:400].sum(axis=1) == 1).all()  # none loses its last
    np.testing.assert_array_equal(replaced.sum(axis=1), counts.sum(axis=1))
    for changed, expected in ((added, 1100), (removed, 900)):
        assert changed[:200].sum(axis=1).mean() == pytest.approx(expected, rel=0.01)
    assert replaced[:200, 2].mean() == pytest.approx(1000 * 0.1 / 3, rel=0.1)  # a third of what moves


def test_augmented_flows_stay_shares() -> None:
    shares = np.array([[0.0, 1.0], [0.4, 0.6]])
    copies = augmented_flows(shares, np.random.default_rng(0))
    assert len(copies) == 4
    for copy in copies:
        assert ((copy >= 0) & (copy <= 1)).all()
        np.testing.assert_allclose(copy, shares, atol=1e-3)
    assert not np.array_equal(copies[0], copies[1])


def test_shuffled_regions_give_the_same_values() -> None:
    """MVURE's and HREP's networks; their weights know no N."""
    n, order = 9, torch.randperm(9)
    graphs = (torch.rand(4, n, n) < 0.4) | torch.eye(n, dtype=torch.bool)
    shuffled = graphs[:, order][:, :, order]
    features, mvure = torch.randn(n, 250), MvureModel(views=4).eval()
    torch.testing.assert_close(mvure(features[order], shuffled).fused, mvure(features, graphs).fused[order])
    hrep = HrepModel(width=8).eval()
    weights = torch.tensor(np.stack([normalised(g) for g in graphs.numpy()])).float()
    x, relations = torch.randn(n, 8), torch.randn(len(RELATIONS), 8)
    moved = hrep(x[order], weights[:, order][:, :, order], relations)
    still = hrep(x, weights, relations)
    torch.testing.assert_close(moved[0], still[0][order])
    torch.testing.assert_close(moved[1], still[1][:, order])


def test_shuffled_rows_give_the_same_values_where_columns_are_features() -> None:
    """HAFusion's and ReCP's networks read a region's row of N flows: their weights fix the columns' order."""
    n, order = 7, torch.randperm(7)
    counts, od = [torch.rand(n, 3), torch.rand(n, 2)], torch.rand(n, n)
    hafusion = HaFusionModel(regions=n, features=[3, 2]).eval()
    torch.testing.assert_close(hafusion([x[order] for x in counts], od[order]), hafusion(counts, od)[order])
    recp, views = RecpModel(attributes=5, regions=n).eval(), (torch.rand(n, 5), torch.rand(n, n), torch.rand(n, n))
    torch.testing.assert_close(recp([x[order] for x in views]), recp(views)[order])
