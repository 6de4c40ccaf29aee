"""Shared by the literature's methods: an embedding of the regions without labels, and a ridge on it per task."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from topt_deploy.data.flows import Flows
from topt_deploy.errors import BadConfig, BadData
from topt_deploy.model.prompt4re import ridge

from ...loop import LOG_EVERY
from ...srel import without_trace
from ..problem import Problem

Array = np.ndarray[Any, Any]

FEWEST_LABELS = 3
"""A training set needs that many known labels: two leave nothing to choose the ridge's α by."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """A paper's schedule: Adam on the full batch; every ``step`` epochs the rate is multiplied by ``decay``."""

    epochs: int
    lr: float
    weight_decay: float = 0.0
    step: int = 1
    decay: float = 1.0

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.lr * self.decay ** (epoch // self.step)


def minimise(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    recipe: TrainingRecipe,
    *,
    stage: str,
    problem: Problem,
    observe: Callable[[int], None] | None = None,
) -> None:
    """Train ``module`` and leave it in evaluation mode. Nothing is selected: the last epoch is the result.

    Args:
        loss: The loss of an epoch, a scalar.
        stage: Name for people and files.
        observe: Called with the number of epochs done, after every epoch, in training mode.

    Raises:
        BadConfig: If the loss is not finite.
    """
    adam = torch.optim.Adam(module.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    module.train()
    with problem.engine.matmuls(), problem.reporter.stage(stage, epochs=recipe.epochs) as progress:
        for epoch in range(recipe.epochs):
            for group in adam.param_groups:
                group["lr"] = recipe.rate(epoch)
            with problem.engine.autocast():
                value = loss(epoch).float()
            adam.zero_grad()
            value.backward()
            adam.step()
            if observe is not None:
                observe(epoch + 1)
            if (epoch + 1) % LOG_EVERY == 0 or epoch + 1 == recipe.epochs:
                if not math.isfinite(value.item()):
                    raise BadConfig(
                        f"{stage}: the loss is not finite at epoch {epoch + 1}",
                        found=value.item(),
                        fix="use precision fp32, or leave this baseline out",
                    )
                progress.update(epoch + 1, value.item())
    module.eval()


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """An embedding that is yet to be trained.

    Attributes:
        module: All that is trained.
        loss: The loss of an epoch, a scalar.
        embed: The embedding as the module gives it, (N, D).
    """

    module: nn.Module
    loss: Callable[[int], Tensor]
    embed: Callable[[], Tensor]


_embeddings: WeakKeyDictionary[Problem, dict[tuple[str, TrainingRecipe, int], Tensor]] = WeakKeyDictionary()
"""One embedding per method's name, recipe and seed, whatever the task: all rows and tasks share it."""


class EmbeddingMethod(ABC):
    """A method of the field: region embeddings learnt without labels, then a regression on them per training set.

    Args:
        recipe: How the embedding is trained; as in the paper by default.

    Attributes:
        name: The method's name, of its stage of training and in errors.
        paper: The paper's recipe.
    """

    name: str
    paper: TrainingRecipe

    def __init__(self, recipe: TrainingRecipe | None = None) -> None:
        self.recipe = recipe or self.paper

    @abstractmethod
    def build(self, problem: Problem) -> Learner:
        """The model and how it is trained, with the random numbers as they are seeded.

        Raises:
            BadData: If the city lacks what the method reads.
        """

    def embedding(self, problem: Problem, seed: int) -> Tensor:
        """The embedding of ``seed``, float32 (N, D), trained on the first call."""
        trained, key = _embeddings.setdefault(problem, {}), (self.name, self.recipe, seed)
        if key not in trained:
            learner = self._learn(problem, seed)
            with torch.no_grad():
                trained[key] = learner.embed()
        return trained[key]

    def looks(self, problem: Problem, seed: int, *, every: int) -> Tensor:
        """The embeddings after epochs 1, 1 + ``every``, 1 + 2 ``every`` …, float32 (L, N, D), in training mode: dropout
        is active, as in the authors' code. For the published protocol alone, which chooses among them."""
        seen: list[Tensor] = []

        @torch.no_grad()
        def look(learner: Learner, epoch: int) -> None:
            if (epoch - 1) % every == 0:
                with without_trace(problem.engine.device):
                    seen.append(learner.embed().clone())

        self._learn(problem, seed, look)
        return torch.stack(seen)

    def _learn(self, problem: Problem, seed: int, look: Callable[[Learner, int], None] | None = None) -> Learner:
        """Train the embedding of ``seed``; ``look`` is called as ``observe`` of :func:`minimise` is."""
        problem.engine.seed(seed, self.name)
        learner = self.build(problem)
        observe = None if look is None else partial(look, learner)
        minimise(learner.module, learner.loss, self.recipe, stage=self.name, problem=problem, observe=observe)
        return learner

    def regress(self, problem: Problem, embedding: Tensor, labels: Tensor, known: Tensor, seed: int) -> Tensor:
        """Counts of every region (S, N) from a regression per row: ridge on E, the papers' own protocol.

        The papers fix α = 1 whatever the embedding's scale. Here the embedding is centred and scaled to unit mean
        square, as one number (a change of unit that needs no label), and α is chosen per row by leave-one-out among
        the row's known labels.

        Args:
            embedding: (N, D).
            labels: float64 (S, N), 0 where unknown.
            known: float64 (S, N) ∈ {0, 1}.
            seed: The rows' seed.
        """
        centred = (embedding - embedding.mean(dim=0)).double()
        x = centred / centred.square().mean().sqrt().clamp(min=1e-12)
        fit = ridge(x, labels, known, alpha=0)
        return fit.coefficients @ x.T + fit.intercepts[:, None]

    def predict(self, problem: Problem, task: str, labels: Array, seeds: Sequence[int]) -> Array:
        """Fit on every row of labels, and predict every region: :class:`Method`. Negative predictions become 0."""
        predicted = np.empty(labels.shape)
        for seed in dict.fromkeys(seeds):
            rows = np.flatnonzero(np.array(seeds) == seed)
            predicted[rows] = self.counts(problem, task, self.embedding(problem, seed), labels[rows], seed)
        return predicted

    def counts(self, problem: Problem, task: str, embedding: Tensor, labels: Array, seed: int) -> Array:
        """As :meth:`predict`, from an embedding (N, D), for rows of one seed."""
        known = ~np.isnan(labels)
        if (fewest := int(known.sum(axis=1).min())) < FEWEST_LABELS:
            raise BadData(
                f"{self.name}: too few labels of {task!r} in a training set",
                expected=f"at least {FEWEST_LABELS}",
                found=fewest,
                fix="use fewer folds, or leave this task out",
            )
        device = problem.engine.device
        weights = torch.tensor(known, dtype=torch.float64, device=device)
        values = torch.tensor(np.where(known, labels, 0.0), device=device)
        counts = self.regress(problem, embedding, values, weights, seed)
        predicted: Array = counts.clamp(min=0).double().cpu().numpy()
        return predicted


def need_flows(problem: Problem, method: str) -> Flows:
    """The city's flows.

    Raises:
        BadData: If it has none.
    """
    if problem.city.flows is None:
        raise BadData(
            f"{method} learns from flows between regions, and this city has none",
            expected="mobility.parquet with origin_id, dest_id, flow",
            found="no flows",
            fix="add the flows and set mobility = true, or leave this baseline out",
        )
    return problem.city.flows
