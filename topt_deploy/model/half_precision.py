"""Half precision, where a model is traced for an engine: products of matrices in half, all else in float32.

Softmax, norms, distances and target scales are no such products, and keep float32. Neither do ``torch.mm`` and
``torch.mv``: the model's code calls these where half would ruin the result (:class:`.prompt4re.PromptBasis`,
:class:`.gaussian_process.KernelHead`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .prompt4re import MemberLinear
from .residual_mlp import ResidualMlp
from .srel import Srel

HALVED = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, F.linear})

Model = TypeVar("Model", bound=nn.Module)


class _Half(TorchFunctionMode):
    """Computes :data:`HALVED` in half, and gives float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in HALVED:
            return func(*args, **(kwargs or {}))
        return func(*(tensor.half() if isinstance(tensor, Tensor) else tensor for tensor in args)).float()


@contextmanager
def in_half() -> Iterator[None]:
    """Products of matrices in half, as long as this lasts."""
    with _Half():
        yield


def halved(model: Model) -> Model:
    """A copy whose linear maps hold their weights in half; it computes within :func:`in_half` alone."""
    model = deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.half()
        elif isinstance(module, MemberLinear):
            module.weight.data = module.weight.data.half()
    return model


def never_in_few_bits(model: nn.Module) -> frozenset[str]:
    """Names of weights that keep half precision where others have 8 or 4 bits, as measured (docs/how-to/tensorrt.md).

    An embedding's last map, which every head reads all of a region through, with coefficients of either sign that
    nearly cancel; and a network's maps of the features themselves, which in another city may be far from those that it
    was trained with.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Srel):
            names.append(f"{name}.mlp.{len(module.mlp) - 1}.weight")
        elif isinstance(module, ResidualMlp):
            names += [f"{name}.first.weight", f"{name}.skip.weight"]
    return frozenset(names)
