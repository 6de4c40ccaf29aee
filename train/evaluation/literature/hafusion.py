"""HAFusion: Sun, Qi, Chang, Fan, Karunasekera, Tanin, *Urban Region Representation Learning with Attentive Fusion*,
ICDE 2024; architecture and Chicago settings of the authors' code, github.com/MiRuacle24/HAFusion."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from topt_deploy.config.settings import SrelConfig
from topt_deploy.model.fusion import IntraViewBlock, ViewFusion
from topt_deploy.model.layers import DeepFc, Dropout
from topt_deploy.model.srel import GraphormerLayer, SrelLoss

from ...srel import flow_target, similarity_targets
from ..problem import Problem
from .embedding import EmbeddingMethod, Learner, TrainingRecipe, need_flows
from .graphs import od_matrix

WIDTH = 144
"""Width of the embedding; the layers before it are N wide."""
PAPER = TrainingRecipe(epochs=2000, lr=5e-4, weight_decay=5e-4)


def chicago_settings(width: int) -> SrelConfig:
    """The authors' settings for Chicago, for blocks of this width. One head, which divides any N."""
    return SrelConfig(
        width=width,
        heads=1,
        intra_blocks=1,
        inter_blocks=2,
        layers=3,
        ffn_width=2048,
        memory=36,
        channels=32,
        view_width=32,
        dropout=0.1,
        deep_fc=True,
    )


class HaFusionModel(nn.Module):
    """Intra-view blocks, inter-view attention, view weights, region fusion without any spatial prior.

    Every layer is N wide and a region's row of the OD matrix is its mobility feature, so that weights fit one city
    and an order of its regions. The view weights are the paper's: the authors' code takes regions for features there,
    which only a square input survives.

    *Shape:* counts [(N, C_v)], od (N, N) → (N, 144)
    """

    def __init__(self, *, regions: int, features: Sequence[int]) -> None:
        super().__init__()
        settings = chicago_settings(regions)
        self.project = nn.ModuleList(nn.Linear(width, regions) for width in features)
        self.dropout = Dropout(settings.dropout)
        self.intra = nn.ModuleList(
            nn.Sequential(*(IntraViewBlock(settings) for _ in range(settings.intra_blocks)), DeepFc(regions, regions))
            for _ in range(len(features) + 1)
        )
        self.fusion = ViewFusion(settings)
        self.region_fusion = nn.ModuleList(GraphormerLayer(settings) for _ in range(settings.layers))
        self.out = nn.Sequential(DeepFc(regions, regions), DeepFc(regions, WIDTH))

    def forward(self, counts: Sequence[Tensor], od: Tensor) -> Tensor:
        projected = (self.dropout(torch.relu(project(x))) for project, x in zip(self.project, counts, strict=True))
        views = torch.stack([encode(x) for encode, x in zip(self.intra, (*projected, od), strict=True)], dim=1)
        x, _ = self.fusion(views)
        for layer in self.region_fusion:
            x = layer(x, None)
        out: Tensor = self.out(x)
        return out


class HaFusion(EmbeddingMethod):
    """HAFusion on all count views and the flows, raw as the authors feed them, with their loss.

    The authors choose the epoch by the downstream score on the test folds; here it is the last of 2,000
    (a minute and a half on one thread at 77 regions); they do not say how many they train for.
    """

    name = "hafusion"
    paper = PAPER

    def build(self, problem: Problem) -> Learner:
        """Of an embedding (N, 144).

        Raises:
            BadData: If the city has no flows.
        """
        city, device = problem.city, problem.engine.device
        flows = need_flows(problem, "HAFusion")
        counts = [torch.tensor(x, dtype=torch.float32, device=device) for x in city.views.values()]
        od = torch.tensor(od_matrix(flows, len(city)), dtype=torch.float32, device=device)
        model = HaFusionModel(regions=len(city), features=[x.shape[1] for x in counts])
        decoders = SrelLoss(similarity_targets(city, device), flow_target(city, device), chicago_settings(WIDTH))
        training = nn.ModuleList([model, decoders]).to(device)

        def loss(_: int) -> Tensor:
            return torch.stack(list(decoders(model(counts, od)).values())).sum()

        return Learner(module=training, loss=loss, embed=lambda: model(counts, od))
