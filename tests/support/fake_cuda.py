"""Tensors on a CUDA device without one: shapes, types and devices, and no numbers.

PyTorch's FakeTensorMode has them in builds without CUDA, but for a few calls that ask for the device's driver before
they reach it: indexing, and moving a module. These are done here by operations that do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda:0")
_aten = torch.ops.aten


def _view(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What the basic parts of an index make of ``x``, and the tensors among its parts, by dimension."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if ... in [part for part in parts if not isinstance(part, Tensor)]:
        at = next(i for i, part in enumerate(parts) if part is ...)
        taken = sum(part is not None and part is not ... for part in parts)
        parts[at : at + 1] = [slice(None)] * (x.ndim - taken)
    tensors: list[Tensor | None] = []
    axis = 0
    for part in parts:
        if isinstance(part, int):
            x = _aten.select.int(x, axis, part)
            continue
        if part is None:
            x = _aten.unsqueeze.default(x, axis)
        elif isinstance(part, slice) and part != slice(None):
            x = _aten.slice.Tensor(x, axis, part.start, part.stop, part.step or 1)
        tensors.append(part if isinstance(part, Tensor) else None)
        axis += 1
    return x, tensors


class _Indexed(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is Tensor.copy_:
            return _aten.copy_.default(*arguments)
        if function not in (Tensor.__getitem__, Tensor.__setitem__):
            return function(*arguments, **(keywords or {}))
        x, tensors = _view(*arguments[:2])
        chosen = any(part is not None for part in tensors)
        if function is Tensor.__getitem__:
            return _aten.index.Tensor(x, tensors) if chosen else x
        if chosen:
            return _aten.index_put_.default(x, tensors, arguments[2])
        return _aten.copy_.default(x, arguments[2])


def _moved(module: nn.Module, device: Any) -> nn.Module:
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, tensor in kept.items():
                if tensor is not None:  # Module.to would swap the type of a tensor in place, which these cannot do
                    new = tensor.detach().to(device)
                    kept[name] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new  # type: ignore[assignment]
    return module


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors that are made inside are fake, on whatever device."""
    with (
        FakeTensorMode(), _Indexed(), patch.object(nn.Module, "to", _moved),
        patch.object(nn.Module, "cpu", lambda module: _moved(module, "cpu")),
    ):  # fmt: skip
        yield
