"""A checkpoint's tensors by the names that the export uses, one at a time, and which recipe of networks fits it."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from topt_deploy.encoder.spec import DEEPSEEK, MLLAMA, QWEN, TEXT
from topt_deploy.errors import BadData, UsageError
from topt_deploy.model.encoder.deepseek_vl2 import DeepseekVL2Config
from topt_deploy.model.encoder.load import Checkpoint

from . import causal, deepseek_vl2, mllama, qwen2_5_vl
from .network import Network

RECIPES: Mapping[str, ModuleType] = {TEXT: causal, QWEN: qwen2_5_vl, MLLAMA: mllama, DEEPSEEK: deepseek_vl2}


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """How a checkpoint is exported.

    Attributes:
        networks: Its networks.
        embedding: Name of the token embeddings.
        canonical: The export's name of a weight, by the file's.
    """

    networks: tuple[Network, ...]
    embedding: str
    canonical: Callable[[str], str]


def recipe(checkpoint: Checkpoint) -> Recipe:
    """The recipe of a checkpoint's family.

    Raises:
        UsageError: If the family has none.
    """
    family = checkpoint.spec.family
    if family not in RECIPES:
        raise UsageError(
            f"models of type {checkpoint.config.get('model_type')!r} are encoded in PyTorch alone",
            file=checkpoint.path,
            expected=f"one of {', '.join(RECIPES)}",
            fix="encode with topt-deploy encode, and predict from regions that hold the prompts",
        )
    config: Any = (
        DeepseekVL2Config.read(dict(checkpoint.config))
        if family == DEEPSEEK
        else AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    )
    module = RECIPES[family]
    return Recipe(networks=module.networks(config), embedding=module.EMBEDDING, canonical=module.canonical)


class Tensors:
    """The tensors of a checkpoint's files, read when they are asked for.

    Args:
        checkpoint: The checkpoint.
        canonical: The export's name of a weight, by the file's.
    """

    def __init__(self, checkpoint: Checkpoint, canonical: Callable[[str], str]) -> None:
        self.checkpoint, self._canonical = checkpoint, canonical
        self._stack = ExitStack()
        self._places: dict[str, tuple[Any, str]] = {}

    def __enter__(self) -> "Tensors":
        for path in self.checkpoint.weights:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._places |= {self._canonical(name): (file, name) for name in file.keys()}  # noqa: SIM118
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def load(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            BadData: If the files lack it.
        """
        file, stored = self._place(name)
        tensor: Tensor = file.get_tensor(stored)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        file, stored = self._place(name)
        return tuple(file.get_slice(stored).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix."""
        file, stored = self._place(name)
        rows: Tensor = file.get_slice(stored)[start:stop]
        return rows

    def count(self) -> int:
        """How many numbers there are in all."""
        total = 0
        for file, stored in self._places.values():
            size = 1
            for n in file.get_slice(stored).get_shape():
                size *= n
            total += size
        return total

    def _place(self, name: str) -> tuple[Any, str]:
        if name not in self._places:
            raise BadData(
                "the model's files lack a weight", file=self.checkpoint.path, expected=name, fix="fetch the model again"
            )
        return self._places[name]
