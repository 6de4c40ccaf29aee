"""A run's trained parts as one model, and how far regions lie from those that it was fitted on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topt_deploy.config.settings import Config
from topt_deploy.data.city import Schema
from topt_deploy.data.features import all_widths
from topt_deploy.model.leverage import Leverage
from topt_deploy.model.srel import Srel
from topt_deploy.model.topt import EnsembleHead, ModelSpec, TopT

from .prompt4re import HeadResult

Array = np.ndarray[Any, Any]


def ensembles(config: Config) -> list[str]:
    """The tasks that the default's head predicts."""
    return [task for task, settings in config.tasks.items() if settings.ensemble.enabled]


def fused(
    config: Config,
    schema: Schema,
    srels: Mapping[str, Srel],
    results: Mapping[str, HeadResult],
    leverage: Leverage | None,
) -> TopT:
    """The trained parts as one model, on the CPU."""
    ranks = {
        task: result.head.basis.basis.shape[1] for task, result in results.items() if result.head.basis is not None
    }
    heads = {task: result.head for task, result in results.items() if isinstance(result.head, EnsembleHead)}
    config = replace(config, tasks={**config.tasks, **{task: head.settings for task, head in heads.items()}})
    rows = {task: len(results[task].predicted) for task in heads}
    rank = 0 if leverage is None else leverage.factor.shape[1]
    model = TopT(ModelSpec(config=config, schema=schema, ranks=ranks, rows=rows, leverage=rank))
    if leverage is not None and model.leverage is not None:
        model.leverage.load_state_dict(leverage.state_dict())
    for name, srel in srels.items():
        model.srel[name].load_state_dict(srel.cpu().state_dict())
    for task, result in results.items():
        model.heads[task].load_state_dict(result.head.state_dict())
    return model


@dataclass(frozen=True, kw_only=True, eq=False)
class Far:
    """How far regions lie from the labelled ones, and from where on that is too far.

    Attributes:
        left_out: float64 (N,): leverage with respect to the labelled regions, without the region itself.
        threshold: Beyond it a region is extrapolated.
    """

    left_out: Array
    threshold: float

    def regions(self, region_id: Array) -> list[str]:
        """Ids of those of the regions (N,) that lie beyond."""
        return [str(region) for region in region_id[self.left_out > self.threshold]]


def fit_leverage(schema: Schema, inputs: Mapping[str, Tensor], fitted: Sequence[Array]) -> tuple[Leverage | None, Far]:
    """The leverage with respect to the regions that some task is fitted on; None without ensembles.

    Args:
        inputs: Features of the N regions.
        fitted: bool (N,), of every task with an ensemble.
    """
    if not fitted:
        regions = len(next(iter(inputs.values())))
        return None, Far(left_out=np.zeros(regions), threshold=float("inf"))
    known = torch.tensor(np.any(fitted, axis=0))
    here = {name: tensor.cpu() for name, tensor in inputs.items()}
    leverage = Leverage.fit(all_widths(schema), here, known)
    return leverage, Far(left_out=leverage.left_out(here, known), threshold=float(leverage.threshold))
