"""The attention of a trained SREL: the weights of its views, and the regions that each region looks at.

Forward hooks ask the modules for it here, so that the model neither carries it in training nor in its export. A report
shows every pair of regions, so this is whole, (N, N).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from topt_deploy.data.features import POSITION
from topt_deploy.model.srel import GraphormerLayer, Srel
from topt_deploy.model.topt import TopT

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """One stage-1 model's attention in a city of N regions.

    Attributes:
        tasks: The tasks that build on this embedding.
        views: The fusion's weight of every view; they sum to one over the city.
        regions: float64 (N, N), how much row i attends to column j: mean over the Graphormer layers and their heads;
            rows sum to one. None where the model has no such layer.
    """

    tasks: tuple[str, ...]
    views: Mapping[str, float]
    regions: Array | None


@torch.no_grad()
def read_attention(model: TopT, inputs: Mapping[str, Tensor]) -> list[Attention]:
    """The attention of every stage-1 model, in evaluation mode; none where the model has none.

    Args:
        model: The fused model, in evaluation mode.
        inputs: :func:`topt_deploy.data.features.features` of the city, as tensors.
    """
    config = model.spec.config
    found = []
    for name, srel in model.srel.items():
        assert isinstance(srel, Srel)
        layers = [layer.attention for layer in srel.layers if isinstance(layer, GraphormerLayer)]
        with _second_outputs([srel.fusion]) as views, _second_outputs(layers, read=nn.Identity()) as regions:
            srel(inputs, srel.adjacency(inputs[POSITION]))
        found.append(
            Attention(
                tasks=tuple(
                    task for task, own in config.tasks.items() if own.embeds and config.embedding_of(task) == name
                ),
                views=dict(zip(srel.encoders, views[0].tolist(), strict=True)),
                regions=torch.stack(regions).double().mean(dim=0).numpy() if regions else None,
            )
        )
    return found


def spread(weights: Array) -> float:
    """Over how many regions the attention of a region is spread, on average: exp of its entropy. N is an even share.

    *Shape:* (N, N) →
    """
    logs = np.log(np.maximum(weights, np.finfo(float).tiny))
    return float(np.exp(-(weights * logs).sum(axis=1)).mean())


def received(weights: Array) -> Array:
    """The attention that each region gets from all, where 1 is an even share.

    *Shape:* (N, N) → (N,)
    """
    total: Array = weights.sum(axis=0)
    return total


def attended_most(weights: Array, k: int) -> Array:
    """The k other regions that each region attends to most, most first; all others where there are fewer.

    *Shape:* (N, N) → int64 (N, k)
    """
    others = weights.copy()
    np.fill_diagonal(others, -1)
    order: Array = np.argsort(-others, axis=1, kind="stable")
    return order[:, : min(k, len(weights) - 1)]


@contextmanager
def _second_outputs(modules: Iterable[nn.Module], **named: Any) -> Iterator[list[Tensor]]:
    """Collect the second of the two values that each of ``modules`` returns, in the order they are called.

    Args:
        modules: The modules.
        named: Arguments that they get beside their own.
    """
    seen: list[Tensor] = []
    handles = []
    for module in modules:
        handles += [
            module.register_forward_pre_hook(lambda _module, args, own: (args, own | named), with_kwargs=True),
            module.register_forward_hook(lambda _module, _in, out: seen.append(out[1])),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
