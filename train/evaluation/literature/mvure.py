"""MVURE: Zhang, Li, Li, Hui, *Multi-View Joint Graph Representation Learning for Urban Region Embedding*,
IJCAI 2020; settings of the authors' code, github.com/mingyangzhang/mv-region-embedding."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from topt_deploy.model.layers import Dropout

from ...srel import flow_target, similarity_targets
from ..problem import Problem
from .embedding import EmbeddingMethod, Learner, TrainingRecipe, need_flows
from .graphs import Array, mobility_similarities, nearest
from .losses import flow_cross_entropy

FEATURES = 250
HEADS = 12
HEAD_WIDTH = 12
SHARING_HEADS = 4
SHARING_WIDTH = 48
SHARED = 0.8
"""α, the share of what :class:`Sharing` gives in a view."""
FUSED = 0.5
"""1 − β, how much of a view's output is the fused embedding."""
MOBILITY_NEIGHBOURS = 20
ATTRIBUTE_NEIGHBOURS = 15
PAPER = TrainingRecipe(epochs=5000, lr=1e-3)


def mutual_neighbours(similarity: Array, k: int) -> Array:
    """Each region with itself, and pairs that are among each other's ``k`` most similar: bool (N, N)."""
    near = nearest(similarity, k)
    return np.asarray((near & near.T) | np.eye(len(similarity), dtype=bool))


@dataclass(frozen=True, kw_only=True)
class ViewEmbeddings:
    """Per view (V, N, D), in the order of the graphs, and fused (N, D)."""

    views: Tensor
    fused: Tensor


class GraphAttention(nn.Module):
    """Graph attention with its own weights per view, heads side by side (Veličković et al., 2018).

    *Shape:* features (N, F), graphs bool (V, N, N) → (V, N, D)
    """

    def __init__(self, *, views: int, features: int, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(_glorot(views, heads, features, head_width))
        self.to_self = nn.Parameter(_glorot(views, heads, head_width, 1))
        self.to_other = nn.Parameter(_glorot(views, heads, head_width, 1))
        self.bias = nn.Parameter(torch.zeros(views, heads, 1, head_width))
        self.dropout = Dropout(dropout)

    def forward(self, features: Tensor, graphs: Tensor) -> Tensor:
        h = features @ self.weight  # (V, H, N, d)
        scores = F.leaky_relu(h @ self.to_self + (h @ self.to_other).transpose(-1, -2), 0.2)
        weights = scores.masked_fill(~graphs[:, None], -torch.inf).softmax(dim=-1)  # (V, H, N, N)
        out = torch.relu(self.dropout(weights) @ h + self.bias)
        return out.transpose(1, 2).flatten(2)


class Sharing(nn.Module):
    """Self-attention among the regions of each view, with weights that the views share, mean over heads.

    The paper calls this module cross-view information sharing; this is what the authors' ``self_attn``
    computes. docs/background/literature.md has what attention among the views of a region gives instead.

    *Shape:* (V, N, D) → (V, N, D)
    """

    def __init__(self, *, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, heads * inner)
        self.key = nn.Linear(width, heads * inner)

    def forward(self, views: Tensor) -> Tensor:
        q, k = (m(views).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1).mean(dim=1)  # (V, N, N)
        return weights @ views


class MvureModel(nn.Module):
    """Graph attention per view, sharing, and the gated sum of the views. Permutation-equivariant.

    *Shape:* features (N, F), graphs bool (V, N, N) → :class:`ViewEmbeddings`
    """

    def __init__(self, *, views: int, features: int = FEATURES) -> None:
        super().__init__()
        width = HEADS * HEAD_WIDTH
        self.attention = GraphAttention(views=views, features=features, heads=HEADS, head_width=HEAD_WIDTH, dropout=0.2)
        self.sharing = Sharing(width=width, heads=SHARING_HEADS, inner=SHARING_WIDTH)
        self.gate = nn.Linear(width, width)

    def forward(self, features: Tensor, graphs: Tensor) -> ViewEmbeddings:
        own = self.attention(features, graphs)
        views = SHARED * self.sharing(own) + (1 - SHARED) * own
        fused = (self.gate(views).sigmoid() * views).sum(dim=0)
        return ViewEmbeddings(views=(1 - FUSED) * views + FUSED * fused, fused=fused)


def mvure_loss(embeddings: ViewEmbeddings, flow: Tensor, similarities: Tensor) -> Tensor:
    """Flows from the two mobility views, and every attribute's similarity from its view.

    *Shape:* views (2 + A, N, D), flow (N, N), similarities (A, N, N) → scalar
    """
    source, destination, *attributes = embeddings.views.unbind()
    terms = [F.mse_loss(x @ x.T, target) for x, target in zip(attributes, similarities, strict=True)]
    return flow_cross_entropy(source, destination, flow) + torch.stack(terms).sum()


class Mvure(EmbeddingMethod):
    """MVURE on two mobility graphs and a graph per count view.

    The paper's second attribute is check-ins, which are a label here; land use takes its place. Node features are
    random numbers, as in the authors' code, one row per region in canonical order: initial weights do not depend on
    N, features do.
    """

    name = "mvure"
    paper = PAPER

    def build(self, problem: Problem) -> Learner:
        """Of the fused embedding (N, 144).

        Raises:
            BadData: If the city has no flows.
        """
        city, device = problem.city, problem.engine.device
        flows = need_flows(problem, "MVURE")
        attributes = torch.stack([target[:] for target in similarity_targets(city).values()])
        graphs = [mutual_neighbours(s, MOBILITY_NEIGHBOURS) for s in mobility_similarities(flows, len(city))]
        graphs += [mutual_neighbours(s, ATTRIBUTE_NEIGHBOURS) for s in attributes.numpy()]
        target = flow_target(city, device)
        assert target is not None
        masks, flow, attributes = torch.tensor(np.stack(graphs)).to(device), target[:], attributes.to(device)
        random = torch.empty(len(city), FEATURES).uniform_(-1, 1)
        features = ((random - random.mean(dim=1, keepdim=True)) / random.std(dim=1, keepdim=True)).to(device)
        model = MvureModel(views=len(graphs)).to(device)

        def loss(_: int) -> Tensor:
            return mvure_loss(model(features, masks), flow, attributes)

        return Learner(module=model, loss=loss, embed=lambda: model(features, masks).fused)


def _glorot(*shape: int) -> Tensor:
    """Uniform Glorot over the last two dimensions, one draw per matrix."""
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound)
