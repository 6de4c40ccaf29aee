"""Stage 1, SREL: spatial-aware region embedding learning (ToPT, section "SREL")."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from topt_deploy.config.settings import SrelConfig
from topt_deploy.data.features import EARTH_RADIUS_M

from .fusion import ViewEncoder, ViewFusion
from .layers import ByName, DeepFc, FeedForward, SelfAttention
from .row_tiles import ALL, Matrix, Rows, in_tiles, matrix, take

NEIGHBOURS = 5
"""The automatic decay length is the median distance to this many-th nearest region."""


def distance_m(position: Tensor, rows: Rows = ALL) -> Tensor:
    """Great-circle (haversine) distances in metres from centred positions on the sphere.

    *Shape:* (N, 3), t rows → (t, N)
    """
    # Coordinate by coordinate: differences keep float32's precision where a Gram matrix would cancel.
    chord2 = sum((take(position, rows)[:, None, axis] - position[None, :, axis]).pow(2) for axis in range(3))
    assert isinstance(chord2, Tensor)
    return 2 * EARTH_RADIUS_M * torch.asin((chord2.sqrt() / (2 * EARTH_RADIUS_M)).clamp(max=1))


class Adjacency(nn.Module):
    """Distance-decayed adjacency A of the regions, zero on the diagonal; ``length_m`` is fixed in training.

    *Shape:* position (N, 3) in metres → (N, N)
    """

    length_m: Tensor

    def __init__(self, config: SrelConfig) -> None:
        super().__init__()
        self.decay = config.decay
        self.register_buffer("length_m", torch.tensor(config.decay_length_m or 1.0))
        self.automatic = config.decay_length_m == 0

    def fit(self, *positions: Tensor) -> None:
        """Set the decay length from the training city, or several, unless the configuration gives it."""
        if self.automatic:
            self.length_m.copy_(torch.cat([self._neighbour_m(own) for own in positions]).median().clamp(min=1.0))

    def _neighbour_m(self, position: Tensor) -> Tensor:
        """Every region's distance to its fifth nearest, (N,)."""
        n = len(position)
        count = min(NEIGHBOURS + 1, n)  # the region itself is the nearest
        (nearest,) = in_tiles(n, lambda rows: (distance_m(position, rows).topk(count, largest=False).values,))
        return nearest[:, -1]

    def forward(self, position: Tensor) -> Matrix:
        return matrix(position.shape[0], partial(self.rows, position))

    def rows(self, position: Tensor, rows: Rows = ALL) -> Tensor:
        """*Shape:* (N, 3), t rows → (t, N)"""
        x = distance_m(position, rows) / self.length_m
        if self.decay == "exponential":
            near = torch.exp(-x)
        elif self.decay == "gaussian":
            near = torch.exp(-x.pow(2))
        else:
            near = 1 / (1 + x)
        index = torch.arange(position.shape[0], device=position.device)
        return torch.where(take(index, rows)[:, None] == index[None, :], torch.zeros_like(near), near)


class GraphormerLayer(nn.Module):
    """Self-attention with the bias B = λ·A on its scores, then feed-forward.

    *Shape:* x (N, D), bias (N, N) → (N, D)
    """

    def __init__(self, config: SrelConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(width=config.width, heads=config.heads, dropout=config.dropout)
        self.feed_forward = FeedForward(width=config.width, inner=config.ffn_width, dropout=config.dropout)

    def forward(self, x: Tensor, bias: Matrix | None) -> Tensor:
        mixed, _ = self.attention(x, bias)
        out: Tensor = self.feed_forward(x, mixed)
        return out


class Srel(nn.Module):
    """Region embeddings from views and positions. Permutation-equivariant; no width depends on N.

    *Shape:* views {name: (N, F_v)}, adjacency (N, N) → E (N, D)

    Args:
        feature_widths: F_v of every view, in order (:func:`topt_deploy.data.features.feature_widths`).
        config: Stage-1 settings.
    """

    def __init__(self, feature_widths: Mapping[str, int], config: SrelConfig) -> None:
        super().__init__()
        self.standardizes = config.inputs == "context"
        self.adjacency = Adjacency(config)
        self.encoders = ByName(
            {view: ViewEncoder(features=width, config=config) for view, width in feature_widths.items()}
        )
        self.fusion = ViewFusion(config)
        self.centrality = nn.Linear(1, config.width) if config.centrality else None
        self.bias = nn.Parameter(torch.tensor(config.bias)) if config.distance_bias else None  # λ
        self.layers = nn.ModuleList(GraphormerLayer(config) for _ in range(config.layers))
        self.mlp = _light_mlp(config.width) if not config.deep_fc else DeepFc(config.width, config.width)

    def fit_statistics(self, inputs: Mapping[str, Tensor], *positions: Tensor) -> None:
        """Fix feature statistics from the training city, and the decay length from its positions, or each city's. Raw
        counts (``inputs = "rows"``) stay as they are."""
        if self.standardizes:
            for view, encoder in self.encoders.items():
                assert isinstance(encoder, ViewEncoder)
                encoder.standardize.fit(inputs[view])
        self.adjacency.fit(*positions)

    def forward(self, views: Mapping[str, Tensor], adjacency: Matrix) -> Tensor:
        encoded = torch.stack([encoder(views[view]) for view, encoder in self.encoders.items()], dim=1)
        x, _ = self.fusion(encoded)  # H̃ (N, D)
        if self.centrality is not None:
            (strength,) = in_tiles(x.shape[0], lambda rows: (adjacency[rows].sum(dim=1, keepdim=True),))  # (N, 1)
            x = x + self.centrality(strength / strength.amax(dim=0).clamp(min=1e-12))
        bias = None if self.bias is None else self.bias * adjacency
        for layer in self.layers:
            x = layer(x, bias)
        out: Tensor = self.mlp(x)
        return out


def _light_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LeakyReLU(0.3), nn.Linear(2 * width, width))


class SrelLoss(nn.Module):
    """Multi-task loss of stage 1 (HAFusion): reconstruct flows and the similarity of every count view.

    The decoders live here because nothing needs them after training.

    Args:
        similarities: Per count view, cosine similarities of its raw counts (N, N).
        flow: The OD matrix over its mean (N, N), or None without flows.
        config: Stage-1 settings.
    """

    def __init__(self, similarities: Mapping[str, Matrix], flow: Matrix | None, config: SrelConfig) -> None:
        super().__init__()
        self.config = config
        self.flow = flow
        self.similarities = dict(similarities)
        self.decoders = ByName({view: nn.Linear(config.width, config.width) for view in similarities})
        if flow is not None:
            self.source = nn.Linear(config.width, config.width)
            self.destination = nn.Linear(config.width, config.width)

    def forward(self, embedding: Tensor) -> dict[str, Tensor]:
        """The weighted terms, by name; their sum is the loss.

        *Shape:* (N, D) → scalars
        """
        terms = {}
        if self.flow is not None:
            likelihood = self._flow_likelihood(embedding, self.flow)
            if self.config.balanced:  # over N² pairs of flows with mean 1, and over what all alike would give
                n = len(embedding)
                likelihood = likelihood / (2 * n * n * math.log(n + 1))
            terms["mobility"] = -self.config.mobility_weight * likelihood
        for view, similarity in self.similarities.items():
            x = F.normalize(self.decoders[view](embedding), dim=1)
            terms[view] = self.config.similarity_weight * _mean_squared_error(x, similarity)
        return terms

    def _flow_likelihood(self, embedding: Tensor, flow: Matrix) -> Tensor:
        source, destination, back = self.source(embedding), self.destination(embedding), flow.T

        def tile(rows: Rows) -> tuple[Tensor]:
            product = source[rows] @ destination.T
            # In one tile, its transpose is what leads back; the same product a second time would take as long again.
            returned = product.T if rows is ALL else destination[rows] @ source.T
            there, here = (torch.log(x.softmax(dim=1) + 1e-4) for x in (product, returned))
            return ((flow[rows] * there + back[rows] * here).sum()[None],)

        (parts,) = in_tiles(len(embedding), tile)
        return parts.sum()


def _mean_squared_error(x: Tensor, similarity: Matrix) -> Tensor:
    """Of x xᵀ. *Shape:* (N, D), (N, N) → scalar"""

    def tile(rows: Rows) -> tuple[Tensor]:
        part = x[rows]
        return (F.mse_loss(part @ x.T, similarity[rows])[None] * (len(part) / len(x)),)

    (parts,) = in_tiles(len(x), tile)
    return parts.sum()
