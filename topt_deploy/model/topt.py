"""The fused model: a city's features in, every task's predicted counts out."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Config, TaskConfig
from ..features import POSITION, feature_widths
from ..table import Schema
from .layers import ByName, Standardize
from .prompt4re import Prompt4Re, PromptBasis
from .srel import Srel
from .target import Target


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is needed to build the model before its weights are loaded.

    Attributes:
        config: The run's configuration.
        schema: What is read of a city.
        ranks: R of every prompt basis, by task; absent where a task reads no prompt.
    """

    config: Config
    schema: Schema
    ranks: Mapping[str, int]


class TaskHead(nn.Module):
    """One task: what its head sees of a region, prompt basis, Prompt4RE, target scale. M members.

    *Shape:* E (N, D), features (N, F), prompts (N, H) or None → counts (M, N)

    Args:
        members: M; the prediction is their mean.
        features: F, the features' total width.
        prompt_width, rank: H and R of the prompt basis; 0 without prompts.
        settings: The task's settings.
    """

    def __init__(self, *, members: int, features: int, prompt_width: int, rank: int, settings: TaskConfig) -> None:
        super().__init__()
        width = settings.srel.width + ((features + rank) if settings.prompt4re.skip else 0)
        self.skip = Standardize(width) if settings.prompt4re.skip else None
        self.basis = PromptBasis(prompt_width=prompt_width, rank=rank) if rank else None
        self.head = Prompt4Re(
            members=members, inputs=width, width=settings.srel.width, rank=rank, config=settings.prompt4re
        )
        self.target = Target(members=members, config=settings.target)

    def coordinates(self, prompts: Tensor | None) -> Tensor | None:
        """The prompts in their basis (N, R); None without prompts."""
        return None if self.basis is None else self.basis(prompts)

    def joined(self, embedding: Tensor, features: Tensor, coordinates: Tensor | None) -> Tensor:
        """With ``skip``, [E ‖ features ‖ prompt coordinates]."""
        parts = [embedding, features] + ([] if coordinates is None else [coordinates])
        return torch.cat(parts, dim=1)

    def see(self, embedding: Tensor, features: Tensor, coordinates: Tensor | None) -> Tensor:
        """What the head sees of every region: E, or with ``skip`` all of it, standardised."""
        if self.skip is None:
            return embedding
        seen: Tensor = self.skip(self.joined(embedding, features, coordinates))
        return seen

    def forward(self, embedding: Tensor, features: Tensor, prompts: Tensor | None) -> Tensor:
        coordinates = self.coordinates(prompts)
        return self.target.counts(self.head(self.see(embedding, features, coordinates), coordinates))


def all_features(inputs: Mapping[str, Tensor], schema: Schema) -> Tensor:
    """All views side by side, (N, ΣF_v)."""
    return torch.cat([inputs[view] for view in feature_widths(schema)], dim=1)


class TopT(nn.Module):
    """SREL embeddings, each computed once, and a head per task.

    *Shape:* {view: (N, F_v)}, position (N, 3), {prompt column: (N, H)} → {task: (N,)} counts
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = feature_widths(spec.schema)
        self.srel = ByName({name: Srel(widths, c) for name, c in spec.config.embeddings().items()})
        self.heads = ByName(
            {
                task: TaskHead(
                    members=settings.prompt4re.members,
                    features=sum(widths.values()),
                    prompt_width=spec.schema.prompts.get(settings.prompt_column(task) or "", 0),
                    rank=spec.ranks.get(task, 0),
                    settings=settings,
                )
                for task, settings in spec.config.tasks.items()
            }
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        embeddings = {}
        for name, srel in self.srel.items():
            assert isinstance(srel, Srel)
            embeddings[name] = srel(inputs, srel.adjacency(inputs[POSITION]))
        features = all_features(inputs, self.spec.schema)
        predictions = {}
        for task, settings in self.spec.config.tasks.items():
            column = settings.prompt_column(task)
            prompts = None if column is None else inputs[column]
            embedding = embeddings[self.spec.config.embedding_of(task)]
            predictions[task] = self.heads[task](embedding, features, prompts).mean(dim=0)
        return predictions

    def input_names(self) -> list[str]:
        """Names of the inputs that the forward pass reads, in a fixed order."""
        return [*feature_widths(self.spec.schema), POSITION, *self.spec.schema.prompts]


@torch.no_grad()
def predict(model: TopT, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Predictions in evaluation mode."""
    model.eval()
    return model(inputs)
