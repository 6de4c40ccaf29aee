"""The parts of an ensemble head's predictions: exact, because its Gaussian processes are additive over views."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topt_deploy.data.features import POSITION
from topt_deploy.model.gaussian_process import KernelHead, ViewKernels
from topt_deploy.model.srel import Srel
from topt_deploy.model.topt import NETWORKS, TOPT, TREES, EnsembleHead, TopT, all_features

Array = np.ndarray[Any, Any]


NEGLIGIBLE = 1e-3
"""On the standardised target scale: rounding, and no bound."""
BOUNDS = "limits of what labels support"


@dataclass(frozen=True, kw_only=True, eq=False)
class Contributions:
    """The parts that add up to one task's predictions for N regions, on the target scale.

    ``average`` and all parts of a region add up to its prediction there. Every part is relative to its own mean over
    the regions, as only that can be compared between views.

    Attributes:
        transform: The transform of that scale (``target.transform``).
        average: The mean prediction.
        views: Per view, float64 (N,): its features times its own coefficients. Empty without Gaussian processes.
        others: By name, float64 (N,): parts that are not additive over views, which are trees, networks and ToPT's two
            stages; and what bounds, and falling back to radial kernels, take or add, where they do.
    """

    transform: str
    average: float
    views: Mapping[str, Array]
    others: Mapping[str, Array]


@torch.no_grad()
def read_contributions(model: TopT, inputs: Mapping[str, Tensor]) -> dict[str, Contributions]:
    """Contributions of every task with an ensemble head; the other tasks are absent.

    Args:
        model: The fused model, in evaluation mode.
        inputs: :func:`topt_deploy.data.features.features` of the city, as tensors.
    """
    config, found = model.spec.config, {}
    features = all_features(inputs, model.spec.schema)
    for task, settings in config.tasks.items():
        head, column = model.heads[task], settings.prompt_column(task)
        if isinstance(head, EnsembleHead):
            embedding = None
            if settings.embeds:
                srel = model.srel[config.embedding_of(task)]
                assert isinstance(srel, Srel)
                embedding = srel(inputs, srel.adjacency(inputs[POSITION]))
            views = head.views(inputs, None if column is None else inputs[column])
            trust = None if model.leverage is None else model.leverage.trust(inputs)
            found[task] = contributions(head, views, embedding, features, trust)
    return found


@torch.no_grad()
def contributions(
    head: EnsembleHead,
    views: Mapping[str, Tensor],
    embedding: Tensor | None = None,
    features: Tensor | None = None,
    trust: Tensor | None = None,
) -> Contributions:
    """Take a head's predictions apart: those of its fit of all labels.

    Args:
        head: In evaluation mode.
        views: Its inputs, (N, F_v) per view (:meth:`EnsembleHead.views`).
        embedding, features: The further inputs of its Prompt4RE part (:meth:`EnsembleHead.outputs`).
        trust: Trust in each region, 0 to 1 (N,); None trusts all.
    """
    mean, scale = float(head.target.mean[-1]), float(head.target.scale[-1])
    weights = dict(zip(head.parts(), head.weights[-1].tolist(), strict=True))
    outputs = head.outputs(views, embedding, features)
    said = dict(zip(head.regressions(), outputs[-1].double().numpy(), strict=True))
    others = {name: weights[name] * said[name] for name in (TREES, NETWORKS, TOPT) if name in weights}
    parts = {} if head.kernel is None else _by_view(head.kernel, views, weights)
    whole = sum(others.values()) + sum(parts.values())
    taken = head.combined(outputs, trust)[-1].double().numpy() - whole
    if np.abs(taken).max() > NEGLIGIBLE:
        others[BOUNDS] = taken
    average = mean + scale * sum(float(part.mean()) for part in (*parts.values(), *others.values()))
    relative = ({name: scale * (part - part.mean()) for name, part in group.items()} for group in (parts, others))
    by_view, by_name = relative
    return Contributions(transform=head.target.transform_of(-1), average=average, views=by_view, others=by_name)


def _by_view(kernel: KernelHead, views: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Array]:
    """Every view's features times its own slice of the regressions' weighted coefficients, (N,) each."""
    modules = {view: module for view, module in kernel.views.items() if isinstance(module, ViewKernels)}
    own = torch.tensor([weights.get(name, 0.0) for name in kernel.regressions()]) @ kernel.coefficients[-1]
    slices = own.split([sum(module.sizes) for module in modules.values()])
    return {
        view: (module(views[view]) @ part).double().numpy()
        for (view, module), part in zip(modules.items(), slices, strict=True)
    }
