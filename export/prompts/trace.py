"""A piece of a network as ONNX: traced without its weights, with two operators of our own left whole."""

from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn

from ..translate import translate
from .pieces import Piece, Spec
from .traced_operators import Slot

SIZES = (3, 5, 7, 11, 13, 17)
"""Sizes of the sample's free dimensions, all unlike, so that none is taken for another."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A piece's graph.

    Attributes:
        proto: Inputs are the piece's and then its parameters, by name; outputs are the piece's. Nodes ``Linear`` and
            ``Attention`` of :mod:`.traced_operators` are still to be lowered.
        parameters: Names of the parameters among the inputs.
    """

    proto: onnx.ModelProto
    parameters: tuple[str, ...]


class _WithParameters(nn.Module):
    """A module whose parameters are given with the call."""

    def __init__(self, module: nn.Module, inputs: int, parameters: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.count, self.names = module, inputs, parameters

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(self.names, tensors[self.count :], strict=True))
        outputs: tuple[Tensor, ...] = torch.func.functional_call(self.module, parameters, tensors[: self.count])
        return tuple(tensor.clone() for tensor in outputs)  # an output that is an input has no name of its own


def trace(piece: Piece) -> Traced:
    """Trace a piece with every free dimension dynamic."""
    module = without_weights(piece)
    parameters = tuple(name for name, _ in module.named_parameters())
    free = sorted({dim for spec in piece.inputs.values() for dim in spec.dims if isinstance(dim, str)})
    sizes = dict(zip(free, SIZES, strict=False))
    dims = {name: torch.export.Dim.DYNAMIC for name in free}
    arguments = [_sample(spec, sizes) for spec in piece.inputs.values()]
    weights = [torch.zeros(p.shape, dtype=p.dtype) for p in module.parameters()]
    dynamic = [{i: dims[d] for i, d in enumerate(s.dims) if isinstance(d, str)} for s in piece.inputs.values()]
    wrapped = _WithParameters(module, len(arguments), parameters).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        traced = torch.export.export(
            wrapped, (*arguments, *weights), dynamic_shapes=((*dynamic, *({} for _ in weights)),), strict=False
        )
    proto = translate(traced, [*piece.inputs, *parameters], [f"{name}/out" for name in piece.outputs])
    return Traced(proto=proto, parameters=parameters)


def without_weights(piece: Piece) -> nn.Module:
    """The piece's module with a slot for every linear layer and memory for its small parameters alone."""
    with torch.device("meta"):
        module = piece.build().eval()
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, attribute = path.rpartition(".")
            setattr(module.get_submodule(parent), attribute, Slot(layer, path))
    for path, parameter in list(module.named_parameters()):
        parent, _, attribute = path.rpartition(".")
        held = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype), requires_grad=False)
        setattr(module.get_submodule(parent), attribute, held)
    return module


def _sample(spec: Spec, sizes: dict[str, int]) -> Tensor:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
    return torch.zeros(shape, dtype=spec.dtype)
