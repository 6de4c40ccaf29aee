"""The fused model: a city's features in, every task's predicted counts out."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topt_deploy.config.settings import Config, TaskConfig
from topt_deploy.data.city import Schema
from topt_deploy.data.features import POSITION, all_widths, feature_widths

from .gaussian_process import PROMPT, KernelHead
from .layers import ByName, Standardize
from .prompt4re import Prompt4Re, PromptBasis
from .residual_mlp import Network
from .srel import Srel
from .target import Target


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is needed to build the model before its weights are loaded.

    Attributes:
        config: The run's configuration.
        schema: The tables and columns to read of a city.
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
        """The head's input for every region: E, or with ``skip`` all features, standardised."""
        if self.skip is None:
            return embedding
        seen: Tensor = self.skip(self.joined(embedding, features, coordinates))
        return seen

    def forward(self, embedding: Tensor, features: Tensor, prompts: Tensor | None) -> Tensor:
        coordinates = self.coordinates(prompts)
        return self.target.counts(self.head(self.see(embedding, features, coordinates), coordinates))


class EnsembleHead(nn.Module):
    """One task without an embedding: the mean, on the target scale, of Gaussian processes and of networks, where the
    networks together count as one of the Gaussian processes.

    All see every view, what flows lead to, and positions; the Gaussian processes also see the prompts. A region is
    predicted from its own row of these alone.

    *Shape:* {view: (N, F_v)}, prompts (N, H) or None → counts (1, N)

    Args:
        widths: F_v of every view (:func:`topt_deploy.data.features.all_widths`).
        prompt_width, rank: H and R of the prompt basis; 0 without prompts.
        settings: The task's settings.
    """

    def __init__(self, *, widths: Mapping[str, int], prompt_width: int, rank: int, settings: TaskConfig) -> None:
        super().__init__()
        config = settings.ensemble
        self.names = tuple(widths)
        self.basis = PromptBasis(prompt_width=prompt_width, rank=rank) if rank else None
        prompt = {PROMPT: rank} if rank else {}
        self.kernel = KernelHead({**widths, **prompt}, config) if config.kernel else None
        inputs = sum(widths.values())
        self.network = Network(members=config.members, inputs=inputs, config=config) if config.network else None
        self.target = Target(members=1, config=settings.target)

    def views(self, inputs: Mapping[str, Tensor], prompts: Tensor | None) -> dict[str, Tensor]:
        """Everything that the head sees, by view."""
        views = {name: inputs[name] for name in self.names}
        return views if self.basis is None else views | {PROMPT: self.basis(prompts)}

    def side_by_side(self, views: Mapping[str, Tensor]) -> Tensor:
        """The input of the networks, (N, ΣF_v)."""
        return torch.cat([views[name] for name in self.names], dim=1)

    def forward(self, inputs: Mapping[str, Tensor], prompts: Tensor | None) -> Tensor:
        views = self.views(inputs, prompts)
        parts = [] if self.kernel is None else [self.kernel(views)] * len(self.kernel.lengths)
        if self.network is not None:
            parts.append(self.network(self.side_by_side(views)).mean(dim=0))
        return self.target.counts(torch.stack(parts).mean(dim=0, keepdim=True))


def all_features(inputs: Mapping[str, Tensor], schema: Schema) -> Tensor:
    """All views side by side, (N, ΣF_v)."""
    return torch.cat([inputs[view] for view in feature_widths(schema)], dim=1)


def make_head(spec: ModelSpec, task: str) -> TaskHead | EnsembleHead:
    """The head of a task, before its weights are known."""
    settings, rank = spec.config.tasks[task], spec.ranks.get(task, 0)
    prompt_width = spec.schema.prompts.get(settings.prompt_column(task) or "", 0)
    if settings.ensemble.enabled:
        widths = all_widths(spec.schema)
        return EnsembleHead(widths=widths, prompt_width=prompt_width, rank=rank, settings=settings)
    return TaskHead(
        members=settings.prompt4re.members,
        features=sum(feature_widths(spec.schema).values()),
        prompt_width=prompt_width,
        rank=rank,
        settings=settings,
    )


class TopT(nn.Module):
    """SREL embeddings, each computed once, and a head per task.

    *Shape:* {view: (N, F_v)}, position (N, 3), {prompt column: (N, H)} → {task: (N,)} counts
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = feature_widths(spec.schema)
        self.srel = ByName({name: Srel(widths, c) for name, c in spec.config.embeddings().items()})
        self.heads = ByName({task: make_head(spec, task) for task in spec.config.tasks})

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
            if settings.ensemble.enabled:
                counts = self.heads[task](inputs, prompts)
            else:
                counts = self.heads[task](embeddings[self.spec.config.embedding_of(task)], features, prompts)
            predictions[task] = counts.mean(dim=0)
        return predictions

    def input_names(self) -> list[str]:
        """Names of the inputs that the forward pass reads, in a fixed order."""
        spec = self.spec
        ensemble = any(settings.ensemble.enabled for settings in spec.config.tasks.values())
        views = all_widths(spec.schema) if ensemble else [*feature_widths(spec.schema), POSITION]
        return [*views, *spec.schema.prompts]


@torch.no_grad()
def predict(model: TopT, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Predictions in evaluation mode."""
    model.eval()
    return model(inputs)
