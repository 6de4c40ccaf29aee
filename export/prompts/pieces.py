"""A network as a row of pieces that pass named tensors on: what export needs to know of a family of models.

A piece is a small module, built without weights and traced once however many layers are like it. Its uses say which
weights of the checkpoint each layer takes and what its tensors are called in the whole network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A tensor's form: its type, and its dimensions, where a name stands for any size."""

    dtype: torch.dtype
    dims: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """The computation of layers of one kind.

    Attributes:
        name: Of the kind.
        build: Makes the module, under a device context that gives its weights no memory. ``forward`` takes tensors
            by position in the order of ``inputs`` and returns a tuple in the order of ``outputs``.
        inputs: By the forward's names.
        outputs: Names.
        for_engines: Computes the same for TensorRT, where ``build``'s has operators that it lacks.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Mapping[str, Spec]
    outputs: tuple[str, ...]
    for_engines: "Piece | None" = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Use:
    """One layer.

    Attributes:
        piece: The computation.
        weights: The prefix of the names of the module's parameters in the checkpoint. A module that wraps another
            as ``inner`` does not show in them.
        names: The network's names of the piece's tensors, where they differ: ``{"past_key": "past_key_3"}``.
    """

    piece: Piece
    weights: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def outer(self, name: str) -> str:
        """The network's name of the piece's tensor ``name``."""
        return self.names.get(name, name)

    def weight(self, parameter: str) -> str:
        """The checkpoint's name of the module's ``parameter``."""
        return self.weights + parameter.removeprefix("inner.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """Layers in order; each reads the network's inputs and what those before it have written.

    Attributes:
        name: "vision", "cross" or "decoder".
        inputs: By name.
        outputs: Names, of what some layer writes.
        uses: The layers.
    """

    name: str
    inputs: Mapping[str, Spec]
    outputs: tuple[str, ...]
    uses: tuple[Use, ...]


def execute(
    network: Network,
    weight: Callable[[str], Tensor],
    inputs: Mapping[str, Tensor],
    observe: Callable[[str, nn.Linear, Tensor, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """:func:`execute_all` of one set of inputs."""
    (found,) = execute_all(network, weight, [inputs], observe)
    return found


@torch.no_grad()
def execute_all(
    network: Network,
    weight: Callable[[str], Tensor],
    inputs: Sequence[Mapping[str, Tensor]],
    observe: Callable[[str, nn.Linear, Tensor, Tensor], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Run a network in PyTorch on several sets of inputs, layer by layer: each layer's weights are loaded once.

    Args:
        network: The network.
        weight: Gives the checkpoint's tensor of a name.
        inputs: By name, of every run.
        observe: Told the checkpoint's name, the layer, the input and the output of every linear map.

    Returns:
        The network's outputs of every run, by name.
    """
    runs = [dict(own) for own in inputs]
    for use in network.uses:
        with torch.device("meta"):
            module = use.piece.build()
        # A convolution over whole patches is a linear map of the flattened patch.
        tensors = {name: weight(use.weight(name)).reshape(p.shape) for name, p in module.named_parameters()}
        module.load_state_dict(tensors, assign=True, strict=False)
        if observe is not None:
            for path, layer in module.named_modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_hook(partial(_tell, observe, use.weight(path)))
        module.eval()
        for values in runs:
            found = module(*(values[use.outer(name)] for name in use.piece.inputs))
            values |= {use.outer(name): tensor for name, tensor in zip(use.piece.outputs, found, strict=True)}
    return [{name: values[name] for name in network.outputs} for values in runs]


def _tell(
    observe: Callable[[str, nn.Linear, Tensor, Tensor], None],
    name: str,
    layer: nn.Module,
    given: tuple[Tensor, ...],
    found: Tensor,
) -> None:
    assert isinstance(layer, nn.Linear)
    observe(name, layer, given[0], found)
