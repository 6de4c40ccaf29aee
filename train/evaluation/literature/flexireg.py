"""FlexiReg-style: prompts that are the same for every task, after Sun, Chang, Tanin, Karunasekera, Qi, *FlexiReg:
Flexible Urban Region Representation Learning*, KDD 2025. Not FlexiReg itself, hence the name."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from topt_deploy.config.load import load_config
from topt_deploy.config.settings import Config
from topt_deploy.errors import BadData

from ...loop import Workplace
from ...prompt4re import train_head
from ..problem import Problem
from .embedding import TrainingRecipe
from .hafusion import WIDTH, HaFusion

PROMPT_COLUMN = "prompt_none"


def head_config() -> Config:
    """The head of preset `srel` on raw counts, for HAFusion's embedding and prompts without a task's question."""
    overrides = (f"srel.width={WIDTH}", "prompt4re.prompt=none", "target.transform=none")
    return load_config(preset="srel", tasks=("any",), overrides=overrides)


class FlexiRegStyle(HaFusion):
    """HAFusion's embedding, and the head of preset `srel` on it and on prompts that are the same for every task.

    FlexiReg learns embeddings of grid cells, aggregates them to regions, and enhances them per task with what a
    region's images and texts say. No grid cells are published for this data, and no code; what is left of it here is
    that the same prompts, which no task wrote, reach every task's head. Its target is raw counts.
    """

    name = "flexireg-style"

    def __init__(self, recipe: TrainingRecipe | None = None) -> None:
        super().__init__(recipe)
        self.config = head_config()

    def embedding(self, problem: Problem, seed: int) -> Tensor:
        """HAFusion's own embedding (N, 144).

        Raises:
            BadData: If the city has no flows or no prompts without a task.
        """
        if PROMPT_COLUMN not in problem.inputs:
            raise BadData(
                "the FlexiReg-style head needs prompts without a task",
                column=PROMPT_COLUMN,
                expected="a prompt column read by the problem",
                found=f"prompt columns {', '.join(problem.schema.prompts) or 'none'}",
                fix="encode prompts without a task's question, or leave this baseline out",
            )
        return HaFusion(self.recipe).embedding(problem, seed)

    def regress(self, problem: Problem, embedding: Tensor, labels: Tensor, known: Tensor, seed: int) -> Tensor:
        """Counts (S, N): a head per row, all trained as one batch."""
        result = train_head(
            embedding,
            embedding[:, :0],
            problem.inputs[PROMPT_COLUMN],
            torch.where(known > 0, labels, np.nan).cpu().numpy(),
            replace(self.config, seed=seed),
            "any",
            Workplace(engine=problem.engine, reporter=problem.reporter),
        )
        return torch.from_numpy(result.predicted)
