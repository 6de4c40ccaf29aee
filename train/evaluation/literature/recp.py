"""ReCP: Li, Huang, Zhao, Yang, Gong, Chen, *Urban Region Embedding via Multi-View Contrastive Prediction*, AAAI 2024;
architecture and settings of the authors' code, github.com/lizc-sdu/ReCP."""

import sys
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..problem import Problem
from .embedding import EmbeddingMethod, Learner, TrainingRecipe, need_flows
from .graphs import Array, distributions, od_matrix

HIDDEN = (128, 128, 48)
"""Widths of an autoencoder after its input; the last is that of a view's embedding."""
PREDICTOR = (48, 48, 96, 48, 96, 48, 48)
TEMPERATURE = 0.08
ENTROPY = 9.0
"""α, weight of the entropies in the inter-view term."""
ATTRIBUTE_WEIGHT = 1e-4
"""σ: the attribute view's terms are of raw counts, squared."""
PREDICTION_FROM = 50
"""Epoch from which the views predict each other."""
CHANGED = 0.1
"""Share of the POIs that an augmentation adds, takes away or relabels."""
FLOW_COPIES = 4
FLOW_NOISE = 1e-4
PAPER = TrainingRecipe(epochs=1000, lr=0.01, weight_decay=1e-6, step=100, decay=0.3)


def augmented_counts(counts: Array, rng: np.random.Generator) -> list[Array]:
    """Positive samples of the attribute view: POIs added, taken away, given another category, one in ten each.

    A region that would lose all keeps what it had.

    *Shape:* int (N, C) → three of float64 (N, C)
    """
    added = counts + rng.binomial(counts, CHANGED)
    left = counts - rng.binomial(counts, CHANGED)
    removed = np.where(left.sum(axis=1, keepdims=True) == 0, counts, left)
    moved = rng.binomial(counts, CHANGED)
    categories = counts.shape[1]
    replaced = counts - moved + rng.multinomial(moved.sum(axis=1), np.full(categories, 1 / categories))
    return [x.astype(np.float64) for x in (added, removed, replaced)]


def augmented_flows(shares: Array, rng: np.random.Generator) -> list[Array]:
    """Positive samples of a mobility view: shares of flow with a little noise, kept within [0, 1].

    *Shape:* float64 (N, N) → four of float64 (N, N)
    """
    return [np.clip(shares + rng.normal(0, FLOW_NOISE, shares.shape), 0, 1) for _ in range(FLOW_COPIES)]


def intra_view_loss(z: Tensor, positives: Sequence[Tensor]) -> Tensor:
    """Each region against its augmentations (positives) and the other regions (negatives).

    *Shape:* z (N, D), each positive (N, D) → scalar
    """
    negatives = (z @ z.T).fill_diagonal_(-torch.inf)
    alike = torch.stack([(z * positive).sum(dim=1) for positive in positives], dim=1)  # (N, P)
    logits = torch.cat([alike, negatives], dim=1) / TEMPERATURE
    return -logits.log_softmax(dim=1)[:, : len(positives)].mean()


def inter_view_loss(a: Tensor, b: Tensor) -> Tensor:
    """−(I(a, b) + α (H(a) + H(b))) of two views as distributions over their D dimensions.

    *Shape:* rows on the simplex, (N, D) each → scalar
    """
    joint = a.T @ b
    joint = (joint + joint.T) / 2
    joint = (joint / joint.sum()).clamp(min=sys.float_info.epsilon)
    marginal = joint.sum(dim=1)
    penalty = (ENTROPY + 1) * (marginal.log()[:, None] + marginal.log())
    return -(joint * (joint.log() - penalty)).sum()


def stack(widths: Sequence[int]) -> nn.Sequential:
    """Linear, batch norm, ReLU from each width to the next."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class Autoencoder(nn.Module):
    """A view's encoder, and its mirror image as decoder."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.encode = stack((features, *HIDDEN))
        self.decode = stack((*HIDDEN[::-1], features))


class RecpModel(nn.Module):
    """Autoencoders of attributes, outflow and inflow, and predictors between attributes and mobility.

    The mobility autoencoders take a row of N shares: their first weights fit one city and an order of its regions.
    """

    def __init__(self, *, attributes: int, regions: int) -> None:
        super().__init__()
        self.attributes = Autoencoder(attributes)
        self.outflow = Autoencoder(regions)
        self.inflow = Autoencoder(regions)
        self.to_mobility = stack(PREDICTOR)
        self.to_attributes = stack(PREDICTOR)

    def mobility(self, outflow: Tensor, inflow: Tensor) -> Tensor:
        """The mobility view's embedding, the mean of both directions. *Shape:* (N, N), (N, N) → (N, D)"""
        mean: Tensor = (self.outflow.encode(outflow) + self.inflow.encode(inflow)) / 2
        return mean

    def loss(self, views: Sequence[Tensor], positives: Sequence[Sequence[Tensor]], *, predict: bool) -> Tensor:
        """Intra-view contrast and reconstruction, inter-view contrast and, with ``predict``, dual prediction.

        Args:
            views: Counts (N, C), outflow and inflow shares (N, N).
            positives: Augmentations of each view.
        """
        encoded = [m.encode(x) for m, x in zip(self._autoencoders(), views, strict=True)]
        rebuilt = [F.mse_loss(m.decode(z), x) for m, z, x in zip(self._autoencoders(), encoded, views, strict=True)]
        a, m = encoded[0], (encoded[1] + encoded[2]) / 2
        a_alike = [self.attributes.encode(x) for x in positives[0]]
        m_alike = [self.mobility(o, i) for o, i in zip(positives[1], positives[2], strict=True)]
        total = (
            ATTRIBUTE_WEIGHT * (rebuilt[0] + intra_view_loss(a, a_alike))
            + (rebuilt[1] + rebuilt[2] + intra_view_loss(m, m_alike))
            + inter_view_loss(a.softmax(dim=1), m.softmax(dim=1))
        )
        if predict:
            total = total + ATTRIBUTE_WEIGHT * F.mse_loss(self.to_mobility(a), m)
            total = total + F.mse_loss(self.to_attributes(m), a)
        return total

    def _autoencoders(self) -> tuple[Autoencoder, Autoencoder, Autoencoder]:
        return self.attributes, self.outflow, self.inflow

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """[attributes ‖ mobility], (N, 2·48)."""
        return torch.cat([self.attributes.encode(views[0]), self.mobility(views[1], views[2])], dim=1)


class Recp(EmbeddingMethod):
    """ReCP; the attributes are the counts of all count views side by side (the paper's city has POIs alone)."""

    name = "recp"
    paper = PAPER

    def build(self, problem: Problem) -> Learner:
        """Of both views' embeddings (N, 96).

        Raises:
            BadData: If the city has no flows.
        """
        city, device = problem.city, problem.engine.device
        od = od_matrix(need_flows(problem, "ReCP"), len(city))
        counts = np.rint(np.concatenate(list(city.views.values()), axis=1)).astype(np.int64)
        outflow, inflow = distributions(od), distributions(od.T)
        rng = np.random.default_rng(int(torch.randint(2**62, ())))

        def tensor(x: Array) -> Tensor:
            return torch.tensor(x, dtype=torch.float32, device=device)

        views = [tensor(x) for x in (counts, outflow, inflow)]
        model = RecpModel(attributes=counts.shape[1], regions=len(city)).to(device)

        def loss(epoch: int) -> Tensor:
            augmented = (augmented_counts(counts, rng), augmented_flows(outflow, rng), augmented_flows(inflow, rng))
            positives = [[tensor(x) for x in of_view] for of_view in augmented]
            return model.loss(views, positives, predict=epoch >= PREDICTION_FROM)

        return Learner(module=model, loss=loss, embed=lambda: model(views))
