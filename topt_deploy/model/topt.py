"""The fused model: a city's features in, every task's predicted counts out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from topt_deploy.config.settings import Config, TaskConfig
from topt_deploy.data.city import Schema
from topt_deploy.data.features import POSITION, all_widths, feature_widths
from topt_deploy.intervals import FOLDS, LEVERAGE

from .gaussian_process import LOCAL, PROMPT, RADIAL, KernelHead
from .layers import ByName, Standardize
from .leverage import Leverage
from .prompt4re import Prompt4Re, PromptBasis
from .residual_mlp import ResidualMlp
from .srel import Srel
from .target import Target
from .trees import Trees


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that is needed to build the model before its weights are loaded.

    Attributes:
        config: The run's configuration.
        schema: The tables and columns to read of a city.
        ranks: R of every prompt basis, by task; absent where a task reads no prompt.
        leverage: Rank of the leverage (:mod:`.leverage`); 0 without.
        rows: Training sets whose fits the head of a task holds: those of the folds, and last that of all labels. One
            where a task is absent.
    """

    config: Config
    schema: Schema
    ranks: Mapping[str, int]
    rows: Mapping[str, int] = field(default_factory=dict)
    leverage: int = 0


class TaskHead(nn.Module):
    """One task: what its head sees of a region, prompt basis, Prompt4RE, target scale. M members.

    *Shape:* E (N, D), features (N, F), prompts (N, H) or None → counts (M, N)

    Args:
        members: M; the prediction is their mean.
        features: F, the features' total width.
        rank: R of the prompt basis; 0 without prompts.
        settings: The task's settings.
        prompt_width: H; 0 where coordinates are given in place of prompts.
    """

    def __init__(self, *, members: int, features: int, rank: int, settings: TaskConfig, prompt_width: int = 0) -> None:
        super().__init__()
        width = (settings.srel.width if settings.embeds else 0) + ((features + rank) if settings.prompt4re.skip else 0)
        self.skip = Standardize(width, settings.ensemble.clip) if settings.prompt4re.skip else None
        self.basis = PromptBasis(prompt_width=prompt_width, rank=rank) if prompt_width else None
        self.head = Prompt4Re(
            members=members, inputs=width, width=settings.srel.width, rank=rank, config=settings.prompt4re
        )
        self.target = Target(members=members, config=settings.target)

    def coordinates(self, prompts: Tensor | None) -> Tensor | None:
        """The prompts in their basis (N, R); None without prompts."""
        return None if self.basis is None else self.basis(prompts)

    def joined(self, embedding: Tensor | None, features: Tensor, coordinates: Tensor | None) -> Tensor:
        """With ``skip``, [E ‖ features ‖ prompt coordinates]; what is absent is left out."""
        return torch.cat([part for part in (embedding, features, coordinates) if part is not None], dim=1)

    def see(self, embedding: Tensor | None, features: Tensor, coordinates: Tensor | None) -> Tensor:
        """The head's input for every region: E, or with ``skip`` all features, standardised."""
        if self.skip is None:
            assert embedding is not None
            return embedding
        seen: Tensor = self.skip(self.joined(embedding, features, coordinates))
        return seen

    def output(self, embedding: Tensor | None, features: Tensor, coordinates: Tensor | None) -> Tensor:
        """On the standardised target scale (M, N)."""
        out: Tensor = self.head(self.see(embedding, features, coordinates), coordinates)
        return out

    def forward(self, embedding: Tensor, features: Tensor, prompts: Tensor | None) -> Tensor:
        return self.target.counts(self.output(embedding, features, self.coordinates(prompts)))


TREES, NETWORKS, TOPT = "randomised trees", "networks", "SREL with Prompt4RE"


class EnsembleHead(nn.Module):
    """One task by several regressions, combined on the target scale: Gaussian processes, trees, networks, and Prompt4RE
    on SREL's embedding. Every part is bounded by its training labels (:meth:`.target.Target.bounded`) before it counts.

    A region unlike the labelled ones gets less of all that. As far as it is not trusted
    (:meth:`.leverage.Leverage.trust`), it is predicted by the process with radial kernels, which far from what it was
    fitted on says the mean.

    All see every view, what flows lead to, and positions; trees and networks see no prompts.

    *Shape:* {view: (N, F_v)}, prompts (N, H) or None, E (N, D) or None → counts (R, N)

    Args:
        widths: F_v of every view (:func:`topt_deploy.data.features.all_widths`).
        features: F, the width of the paper's views (:func:`all_features`).
        prompt_width, rank: H and R of the prompt basis; 0 without prompts.
        settings: The task's settings.
        rows: R, training sets whose fits it holds, the one of all labels last.
    """

    weights: Tensor

    def __init__(
        self,
        *,
        widths: Mapping[str, int],
        features: int,
        prompt_width: int,
        rank: int,
        settings: TaskConfig,
        rows: int = 1,
    ) -> None:
        super().__init__()
        config = settings.ensemble
        self.names, self.rows, self.settings = tuple(widths), rows, settings
        self.basis = PromptBasis(prompt_width=prompt_width, rank=rank) if rank else None
        self.local = bool(config.local_lengths) and POSITION in widths
        more = ({LOCAL: widths[POSITION]} if self.local else {}) | ({PROMPT: rank} if rank else {})
        self.kernel = KernelHead({**widths, **more}, config, rows) if config.kernel or config.radial else None
        self.trees = Trees(rows=rows, trees=config.trees, depth=config.tree_depth) if config.trees else None
        inputs = sum(widths.values())
        self.network = (
            ResidualMlp(members=rows * config.members, inputs=inputs, config=config) if config.network else None
        )
        self.embeds = config.topt and config.embedding
        self.topt = None
        if config.topt:
            self.topt = TaskHead(
                members=rows * settings.prompt4re.members, features=features, rank=rank, settings=settings
            )
        self.target = Target(members=rows, config=settings.target)
        parts = self.parts()
        self.register_buffer("weights", torch.full((rows, len(parts)), 1 / len(parts)))

    def parts(self) -> list[str]:
        """Names of the regressions that are weighed, in order."""
        return [name for name in self.regressions() if name != RADIAL]

    def regressions(self) -> list[str]:
        """Names of all regressions, in order."""
        kernels = [] if self.kernel is None else list(self.kernel.regressions())
        others = {TREES: self.trees, NETWORKS: self.network, TOPT: self.topt}
        return kernels + [name for name, part in others.items() if part is not None]

    def views(self, inputs: Mapping[str, Tensor], prompts: Tensor | None) -> dict[str, Tensor]:
        """Everything that the head sees, by view."""
        views = {name: inputs[name] for name in self.names}
        if self.local:
            views[LOCAL] = inputs[POSITION]
        return views if self.basis is None else views | {PROMPT: self.basis(prompts)}

    def side_by_side(self, views: Mapping[str, Tensor]) -> Tensor:
        """The input of trees and networks, (N, ΣF_v)."""
        return torch.cat([views[name] for name in self.names], dim=1)

    def outputs(self, views: Mapping[str, Tensor], embedding: Tensor | None, features: Tensor | None) -> Tensor:
        """Outputs of every regression (R, Q, N) on the standardised target scale, in the order of :meth:`regressions`.

        Args:
            views: :meth:`views`.
            embedding: E (N, D); None without SREL.
            features: F (N, F), which Prompt4RE's head sees beside it.
        """
        found: list[Tensor] = []
        if self.kernel is not None:
            found.append(self.kernel(views))
        if self.trees is not None:
            found.append(self.trees(self.side_by_side(views))[:, None])
        if self.network is not None:
            found.append(self._member_mean(self.network(self.side_by_side(views))))
        if self.topt is not None:
            assert features is not None
            coordinates = views[PROMPT] if self.basis is not None else None
            found.append(self._member_mean(self.topt.output(embedding, features, coordinates)))
        return torch.cat(found, dim=1)

    def _member_mean(self, output: Tensor) -> Tensor:
        """*Shape:* (R·M, N) → (R, 1, N)"""
        if len(output) == self.rows:
            return output[:, None]
        return output.unflatten(0, (self.rows, -1)).mean(dim=1, keepdim=True)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        prompts: Tensor | None,
        embedding: Tensor | None = None,
        features: Tensor | None = None,
        trust: Tensor | None = None,
    ) -> Tensor:
        outputs = self.outputs(self.views(inputs, prompts), embedding, features)
        return self.target.counts(self.combined(outputs, trust))

    def combined(self, outputs: Tensor, trust: Tensor | None) -> Tensor:
        """All regressions together (R, N), on the standardised target scale.

        Args:
            outputs: :meth:`outputs`.
            trust: How far each region is trusted (N,) (:meth:`.leverage.Leverage.trust`); None trusts all.
        """
        names = self.regressions()
        bounded = self.target.bounded(outputs)  # all at once: the fewer nodes, the sooner a graph starts
        weighed = dict(zip(self.parts(), self.weights.unbind(dim=1), strict=True))
        weights = torch.stack([weighed.get(name, torch.zeros_like(self.weights[:, 0])) for name in names], dim=1)
        together = (weights[..., None] * bounded).sum(dim=1)
        if RADIAL in names and trust is not None:
            together = together + (trust - 1) * (together - bounded[:, names.index(RADIAL)])
        return together


def all_features(inputs: Mapping[str, Tensor], schema: Schema) -> Tensor:
    """All views side by side, (N, ΣF_v)."""
    return torch.cat([inputs[view] for view in feature_widths(schema)], dim=1)


def make_head(spec: ModelSpec, task: str) -> TaskHead | EnsembleHead:
    """The head of a task, before its weights are known."""
    settings, rank = spec.config.tasks[task], spec.ranks.get(task, 0)
    prompt_width = spec.schema.prompts.get(settings.prompt_column(task) or "", 0)
    if settings.ensemble.enabled:
        return EnsembleHead(
            widths=all_widths(spec.schema),
            features=sum(feature_widths(spec.schema).values()),
            prompt_width=prompt_width,
            rank=rank,
            settings=settings,
            rows=spec.rows.get(task, 1),
        )
    return TaskHead(
        members=settings.prompt4re.members,
        features=sum(feature_widths(spec.schema).values()),
        prompt_width=prompt_width,
        rank=rank,
        settings=settings,
    )


class TopT(nn.Module):
    """SREL embeddings, each computed once, and a head per task.

    *Shape:* {view: (N, F_v)}, position (N, 3), {prompt column: (N, H)} → {task: (N,)} counts; with fits of K folds
    also {task_folds: (N, K)}, and with a :class:`Leverage` {leverage: (N,)}
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = feature_widths(spec.schema)
        self.srel = ByName({name: Srel(widths, c) for name, c in spec.config.embeddings().items()})
        self.heads = ByName({task: make_head(spec, task) for task in spec.config.tasks})
        self.leverage = Leverage(all_widths(spec.schema), spec.leverage) if spec.leverage else None

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        embeddings = {}
        for name, srel in self.srel.items():
            assert isinstance(srel, Srel)
            embeddings[name] = srel(inputs, srel.adjacency(inputs[POSITION]))
        features = all_features(inputs, self.spec.schema)
        trust = None if self.leverage is None else self.leverage.trust(inputs)
        predictions: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for task, settings in self.spec.config.tasks.items():
            column = settings.prompt_column(task)
            prompts = None if column is None else inputs[column]
            embedding = embeddings[self.spec.config.embedding_of(task)] if settings.embeds else None
            if settings.ensemble.enabled:
                fits = self.heads[task](inputs, prompts, embedding, features, trust)
                predictions[task] = fits[-1]
                if len(fits) > 1:
                    others[task + FOLDS] = fits[:-1].t()
            else:
                predictions[task] = self.heads[task](embedding, features, prompts).mean(dim=0)
        if self.leverage is not None:
            others[LEVERAGE] = self.leverage(inputs)
        return predictions | others

    def output_names(self) -> list[str]:
        """Names of what the forward pass gives, in order: tasks, fold fits' predictions, leverage."""
        folds = [task + FOLDS for task in self.spec.config.tasks if self.spec.rows.get(task, 1) > 1]
        return [*self.spec.config.tasks, *folds, *([LEVERAGE] if self.leverage is not None else [])]

    def input_names(self) -> list[str]:
        """Names of the inputs that the forward pass reads, in a fixed order."""
        spec = self.spec
        ensemble = any(settings.ensemble.enabled for settings in spec.config.tasks.values())
        views = all_widths(spec.schema) if ensemble else [*feature_widths(spec.schema), POSITION]
        if self.leverage is not None:
            views = all_widths(spec.schema)
        position = [POSITION] if len(self.srel) and POSITION not in views else []
        return [*views, *position, *spec.schema.prompts]


@torch.no_grad()
def predict(model: TopT, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Predictions in evaluation mode."""
    model.eval()
    return model(inputs)
