"""FlexiReg-style: prompts that are the same for every task, after Sun, Chang, Tanin, Karunasekera, Qi, *FlexiReg:
Flexible Urban Region Representation Learning*, KDD 2025. Not FlexiReg itself, hence the name."""

from typing import Any

import torch
from torch import Tensor

from topt_deploy.config import TaskConfig, load_config
from topt_deploy.errors import BadData
from topt_deploy.model.prompt4re import PromptBasis, ridge
from topt_deploy.model.topt import TaskHead

from ...fit import fit
from ..problem import Problem
from .embedding import Recipe
from .hafusion import PAPER, WIDTH, HaFusion

PROMPT_COLUMN = "prompt_none"


def head_settings() -> TaskConfig:
    """The head of preset `srel`, for HAFusion's embedding and prompts without a task's question."""
    overrides = (f"srel.width={WIDTH}", "prompt4re.prompt=none")
    return load_config(preset="srel", tasks=("any",), overrides=overrides).tasks["any"]


class FlexiRegStyle(HaFusion):
    """HAFusion's embedding, and the head of preset `srel` on it and on prompts that are the same for every task.

    FlexiReg learns embeddings of grid cells, aggregates them to regions, and enhances them per task with what a
    region's images and texts say. No grid cells are published for this data, and no code; what is left of it here is
    that the same prompts, which no task wrote, reach every task's head. Its target is raw counts.
    """

    name = "flexireg-style"

    def __init__(self, recipe: Recipe = PAPER) -> None:
        super().__init__(recipe)
        self.settings = head_settings()

    def embed(self, problem: Problem) -> Tensor:
        """HAFusion's embedding (N, 144).

        Raises:
            BadData: If the city has no flows or no prompts without a task.
        """
        if PROMPT_COLUMN not in problem.inputs:
            raise BadData(
                "the FlexiReg-style head needs prompts that no task wrote",
                column=PROMPT_COLUMN,
                expected="a prompt column read by the problem",
                found=f"prompt columns {', '.join(problem.schema.prompts) or 'none'}",
                fix="encode prompts without a task's question, or leave this baseline out",
            )
        return super().embed(problem)

    def regress(self, problem: Problem, embedding: Tensor, labels: Tensor, known: Tensor, seed: int) -> Tensor:
        """Counts (S, N): a head per row, all trained as one batch on labels standardised with the row's own."""
        share = known / known.sum(dim=1, keepdim=True)
        mean = (share * labels).sum(dim=1, keepdim=True)
        scale = (share * (labels - mean).square()).sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
        scaled, prompts, settings = (labels - mean) / scale, problem.inputs[PROMPT_COLUMN], self.settings.prompt4re
        problem.engine.seed(seed, f"{self.name}/head")
        basis = PromptBasis.fit(prompts.cpu(), settings.components)
        prompt_width, rank = basis.basis.shape
        sizes: dict[str, Any] = {"features": 0, "prompt_width": prompt_width, "rank": rank}
        model = TaskHead(members=len(labels), settings=self.settings, **sizes)
        model.basis = basis
        model.to(embedding.device)
        with torch.no_grad():
            coordinates, no_features = model.coordinates(prompts), embedding[:, :0]
            assert coordinates is not None
            assert model.skip is not None
            model.skip.fit(model.joined(embedding, no_features, coordinates))
            seen = model.see(embedding, no_features, coordinates)
            start = ridge(seen, scaled, known, settings.ridge_alpha)
            model.head.start_from_ridge(start, prompts_from_zero=settings.ridge_penalty)
        penalty, weights, targets = (start.alphas / known.sum(dim=1)).float(), share.float(), scaled.float()

        def loss() -> dict[str, Tensor]:
            return {
                "fit": (weights * (model.head(seen, coordinates) - targets).square()).sum(),
                "ridge": (penalty * model.head.linear.weight[..., 0].square().sum(dim=1)).sum(),
            }

        stage = f"{self.name}/head"
        fit(model.head, loss, settings, stage=stage, identity="", engine=problem.engine, reporter=problem.reporter)
        model.eval()
        with torch.no_grad():
            return model.head(seen, coordinates) * scale + mean
