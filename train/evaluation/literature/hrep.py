"""HREP: Zhou, He, Chen, Shang, Han, *Heterogeneous Region Embedding with Prompt Learning*, AAAI 2023; settings of the
authors' code, github.com/slzhou-xy/HREP."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from topt_deploy.errors import BadData
from topt_deploy.model.prompt4re import ridge

from ...srel import flow_target, similarity_targets
from ..problem import Problem
from .embedding import EmbeddingMethod, Learner, TrainingRecipe, minimise, need_flows
from .graphs import Array, contiguity, mobility_similarities, nearest
from .losses import flow_cross_entropy

WIDTH = 144
RELATIONS = ("neighbour", "poi", "source", "destination")
ALIKE = 10
"""k: a region is tied to the k most similar ones, itself counted, by POI and by flows."""
PAPER = TrainingRecipe(epochs=2000, lr=1e-3, weight_decay=5e-3)
PAPER_PROMPT = TrainingRecipe(epochs=6000, lr=1e-3, weight_decay=3e-4)
RIDGE_ALPHA = 1.0


def similar_regions(similarity: Array, k: int) -> Array:
    """Each region with itself, and pairs of which one is among the other's ``k`` most similar: bool (N, N)."""
    near = nearest(similarity, k)
    return np.asarray(near | near.T | np.eye(len(similarity), dtype=bool))


def normalised(graph: Array) -> Array:
    """D^-½ A D^-½ of a graph that has its self-loops (Kipf and Welling, 2017). *Shape:* bool (N, N) → (N, N)"""
    scale = 1 / np.sqrt(graph.sum(axis=1))
    return np.asarray(graph * scale[:, None] * scale)


class RelationGcn(nn.Module):
    """Graph convolutions whose input is multiplied by the relation's embedding; weights shared by the relations.

    Residual but in the last layer; relation embeddings pass a linear map per layer.

    *Shape:* features (N, D), graphs (R, N, N), relations (R, D) → (R, N, D) and (R, D)
    """

    def __init__(self, *, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(layers - 1))
        self.updates = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        for weight in self.weights:
            assert isinstance(weight, nn.Linear)
            nn.init.xavier_uniform_(weight.weight)

    def forward(self, features: Tensor, graphs: Tensor, relations: Tensor) -> tuple[Tensor, Tensor]:
        x = features.expand(len(relations), -1, -1)
        for layer, (weight, bias, update) in enumerate(zip(self.weights, self.biases, self.updates, strict=True)):
            convolved = graphs @ weight(x * relations[:, None]) + bias
            relations = update(relations)
            if layer == len(self.norms):
                return convolved, relations
            norm = self.norms[layer]  # statistics of one relation at a time
            x = self.dropout(x + F.leaky_relu(torch.stack([norm(view) for view in convolved])))
        raise AssertionError("no layers")


class HrepModel(nn.Module):
    """Relation-aware GCN, self-attention among relations, attentive fusion. Permutation-equivariant.

    *Shape:* features (N, D), graphs (R, N, N), relations (R, D) → region embedding (N, D), and by relation (R, N, D)
    """

    def __init__(self, *, width: int = WIDTH, layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.gcn = RelationGcn(width=width, layers=layers, dropout=dropout)
        self.attention = nn.MultiheadAttention(width, num_heads=4)
        self.mix = nn.Parameter(torch.full((len(RELATIONS), 1, 1), 0.95))
        self.fusion = nn.Linear(width, width)
        self.query = nn.Parameter(torch.randn(width))

    def forward(self, features: Tensor, graphs: Tensor, relations: Tensor) -> tuple[Tensor, Tensor]:
        own, relations = self.gcn(features, graphs, relations)
        shared, _ = self.attention(own, own, own, need_weights=False)  # over the relations
        views = self.mix * shared + (1 - self.mix) * own
        scores = (F.leaky_relu(self.fusion(views)) @ self.query).mean(dim=1)  # (R,)
        region = (scores.softmax(dim=0)[:, None, None] * views).sum(dim=0)
        return region, region * relations[:, None]


def hrep_loss(by_relation: Tensor, flow: Tensor, poi: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """Triplets of neighbours, POI similarity, flows.

    Args:
        by_relation: (R, N, D), in the order of ``RELATIONS``.
        flow: (N, N), over its mean.
        poi: (N, N), cosine similarities.
        near, far: int64 (N,): a neighbour of each region, and one that is none.
    """
    neighbour, by_poi, source, destination = by_relation.unbind()
    geographic = F.triplet_margin_loss(neighbour, neighbour[near], neighbour[far])
    return geographic + flow_cross_entropy(source, destination, flow) + F.mse_loss(by_poi @ by_poi.T, poi)


class PrefixHead(nn.Module):
    """A random prefix per region before its embedding, and a linear map of both; S of them.

    Both halves of the map start from one ridge fit. A held-out region's prefix has no gradient: weight decay alone
    moves it, to zero.

    *Shape:* E (N, D) → (S, N)
    """

    def __init__(self, coefficients: Tensor, intercepts: Tensor, regions: int) -> None:
        super().__init__()
        sets, width = coefficients.shape
        self.prefix = nn.Parameter(torch.randn(sets, regions, width, device=coefficients.device))
        self.prefix_weight = nn.Parameter(coefficients.clone())
        self.weight = nn.Parameter(coefficients.clone())
        self.bias = nn.Parameter(intercepts.clone())

    def forward(self, embedding: Tensor) -> Tensor:
        prompted = torch.einsum("snd,sd->sn", self.prefix, self.prefix_weight)
        return prompted + self.weight @ embedding.T + self.bias[:, None]


class Hrep(EmbeddingMethod):
    """HREP with its prompt learning per task and training set.

    Region features and relation embeddings start as random numbers, as in the authors' code, region by region in
    canonical order: initial weights do not depend on N, features do. Neighbours are those of the Thiessen polygons
    (:func:`contiguity`): the city's tables have no boundaries in general.

    Args:
        recipe: Of the embedding.
        prompt: Of the prefix and its linear map, on counts.
    """

    name = "hrep"
    paper = PAPER

    def __init__(self, recipe: TrainingRecipe | None = None, prompt: TrainingRecipe = PAPER_PROMPT) -> None:
        super().__init__(recipe)
        self.prompt = prompt

    def build(self, problem: Problem) -> Learner:
        """Of the region embedding (N, 144).

        Raises:
            BadData: If the city has no flows, no view ``poi``, or positions that tell no neighbours.
        """
        city, device = problem.city, problem.engine.device
        flows = need_flows(problem, "HREP")
        if "poi" not in city.views:
            raise BadData(
                "HREP needs POI counts",
                expected="a view 'poi'",
                found=f"views {', '.join(city.views)}",
                fix="add the view, or leave this baseline out",
            )
        adjacent = contiguity(city.lonlat)
        apart = ~adjacent & ~np.eye(len(city), dtype=bool)
        if not apart.any(axis=1).all():
            raise BadData(
                "HREP needs regions that are not neighbours",
                ids=city.region_id[~apart.any(axis=1)],
                expected="for every region, one that it does not border on",
                found=f"{len(city)} regions",
                fix="leave this baseline out for so small a city",
            )
        poi = similarity_targets(city, device)["poi"][:]
        alike = [similar_regions(s, ALIKE) for s in (poi.cpu().numpy(), *mobility_similarities(flows, len(city)))]
        edges = np.stack([normalised(g) for g in (adjacent | np.eye(len(city), dtype=bool), *alike)])
        graphs = torch.tensor(edges, dtype=torch.float32, device=device)
        target = flow_target(city, device)
        assert target is not None
        flow = target[:]
        features, relations = torch.randn(len(city), WIDTH).to(device), torch.randn(len(RELATIONS), WIDTH).to(device)
        choices = [torch.tensor(pairs, dtype=torch.float32) for pairs in (adjacent, apart)]
        model = HrepModel().to(device)

        def loss(_: int) -> Tensor:
            near, far = (torch.multinomial(pairs, 1)[:, 0].to(device) for pairs in choices)
            return hrep_loss(model(features, graphs, relations)[1], flow, poi, near, far)

        return Learner(module=model, loss=loss, embed=lambda: model(features, graphs, relations)[0])

    def regress(self, problem: Problem, embedding: Tensor, labels: Tensor, known: Tensor, seed: int) -> Tensor:
        """Counts (S, N) from a prefix head per row, started from ridge with the authors' α and trained on counts."""
        fit = ridge(embedding, labels, known, RIDGE_ALPHA)
        problem.engine.seed(seed, f"{self.name}/prompt")
        head = PrefixHead(fit.coefficients.float(), fit.intercepts.float(), len(embedding))
        weights = (known / known.sum(dim=1, keepdim=True)).float()
        targets = labels.float()

        def loss(_: int) -> Tensor:
            return (weights * (head(embedding) - targets).square()).sum()

        minimise(head, loss, self.prompt, stage=f"{self.name}/prompt", problem=problem)
        with torch.no_grad():
            counts: Tensor = head(embedding)
        return counts
