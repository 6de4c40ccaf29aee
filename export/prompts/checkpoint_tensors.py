"""A checkpoint's tensors by the names that the export uses, one at a time, and which recipe of networks fits it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from topt_deploy.errors import BadData, UsageError
from topt_deploy.prompts.families.registry import FAMILIES
from topt_deploy.prompts.pytorch.checkpoint import Checkpoint

from .families import family_export
from .pieces import Network


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportRecipe:
    """The recipe of a checkpoint's export.

    Attributes:
        networks: Its networks.
        embedding: Name of the token embeddings.
        canonical: The export's name of a weight, by the file's.
    """

    networks: tuple[Network, ...]
    embedding: str
    canonical: Callable[[str], str]


def recipe(checkpoint: Checkpoint) -> ExportRecipe:
    """The recipe of a checkpoint's family.

    Raises:
        UsageError: If the family has none.
    """
    family = checkpoint.spec.family
    if family not in FAMILIES:
        raise UsageError(
            f"models of type {checkpoint.config.get('model_type')!r} can be run in PyTorch only",
            file=checkpoint.path,
            expected=f"one of {', '.join(FAMILIES)}",
            fix="encode with topt-deploy encode, and predict from regions that hold the prompts",
        )
    module = family_export(family)
    networks = module.networks(module.read_config(checkpoint))
    return ExportRecipe(networks=networks, embedding=module.EMBEDDING, canonical=module.canonical)


class Tensors:
    """The tensors of a checkpoint's files, read when they are asked for.

    A file is opened for every tensor and closed after it: what stays open stays mapped, and counts as memory.

    Args:
        checkpoint: The checkpoint.
        canonical: The export's name of a weight, by the file's.
    """

    def __init__(self, checkpoint: Checkpoint, canonical: Callable[[str], str]) -> None:
        self.checkpoint = checkpoint
        self._places: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in checkpoint.weights:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118
                    self._places[canonical(stored)] = (path, stored)
                    self._shapes[canonical(stored)] = tuple(file.get_slice(stored).get_shape())

    def load(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            BadData: If the files lack it.
        """
        path, stored = self._place(name)
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        self._place(name)
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix."""
        path, stored = self._place(name)
        with safe_open(path, framework="pt") as file:
            rows: Tensor = file.get_slice(stored)[start:stop]
        return rows

    def count(self) -> int:
        """The number of values in all."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    def _place(self, name: str) -> tuple[Path, str]:
        if name not in self._places:
            raise BadData(
                "the model's files lack a weight", file=self.checkpoint.path, expected=name, fix="fetch the model again"
            )
        return self._places[name]
