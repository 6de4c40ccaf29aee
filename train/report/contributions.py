"""The parts of an ensemble head's predictions: exact, because its Gaussian processes are additive over views."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topt_deploy.model.gaussian_process import KernelHead, ViewKernels
from topt_deploy.model.topt import EnsembleHead, TopT

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Contributions:
    """The parts that add up to one task's predictions for N regions, on the target scale (∛count with the default).

    ``average`` and all parts of a region add up to its prediction there. Every part is relative to its own mean over
    the regions, as only that can be compared between views.

    Attributes:
        average: The mean prediction.
        views: Per view, float64 (N,): its features times its own coefficients. Empty without Gaussian processes.
        networks: float64 (N,): the networks' mean, which is not additive over views; None without networks.
    """

    average: float
    views: Mapping[str, Array]
    networks: Array | None


@torch.no_grad()
def read_contributions(model: TopT, inputs: Mapping[str, Tensor]) -> dict[str, Contributions]:
    """Contributions of every task with an ensemble head; the other tasks are absent.

    Args:
        model: The fused model, in evaluation mode.
        inputs: :func:`topt_deploy.data.features.features` of the city, as tensors.
    """
    found = {}
    for task, settings in model.spec.config.tasks.items():
        head, column = model.heads[task], settings.prompt_column(task)
        if isinstance(head, EnsembleHead):
            found[task] = contributions(head, head.views(inputs, None if column is None else inputs[column]))
    return found


def contributions(head: EnsembleHead, views: Mapping[str, Tensor]) -> Contributions:
    """Take a head's predictions apart.

    Args:
        head: In evaluation mode.
        views: Its inputs, (N, F_v) per view (:meth:`EnsembleHead.views`).
    """
    processes = 0 if head.kernel is None else len(head.kernel.lengths)
    scale = float(head.target.scale) / (processes + (head.network is not None))  # of each in the ensemble's mean
    parts = {} if head.kernel is None else _by_view(head.kernel, views, processes * scale)
    networks = None
    average = float(head.target.mean) + sum(float(part.mean()) for part in parts.values())
    if head.network is not None:
        networks = scale * head.network(head.side_by_side(views)).mean(dim=0).double().numpy()
        average += float(networks.mean())
        networks -= networks.mean()
    return Contributions(
        average=average, views={view: part - part.mean() for view, part in parts.items()}, networks=networks
    )


def _by_view(kernel: KernelHead, views: Mapping[str, Tensor], scale: float) -> dict[str, Array]:
    """Every view's features times its own slice of the coefficients, (N,) each."""
    modules = {view: module for view, module in kernel.views.items() if isinstance(module, ViewKernels)}
    slices = kernel.coefficients.split([sum(module.sizes) for module in modules.values()])
    return {
        view: scale * (module(views[view]) @ own).double().numpy()
        for (view, module), own in zip(modules.items(), slices, strict=True)
    }
