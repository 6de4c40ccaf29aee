"""Runs a checkpoint's networks in PyTorch with one layer's weights in memory at a time.

Several readers, a thread each, may read at once. What they ask of one network is computed together, so that a layer's
weights are loaded, and its codes are worked out, once for all of them and not once for each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import TypeVar

import torch
from torch import Tensor, nn

from topt_deploy.prompts.prompt import Array

from .pieces import Network, execute_all

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(kw_only=True, eq=False)
class _Pass:
    """A reader's pass through a network: what it gives the network, and what it gets."""

    network: Network
    inputs: dict[str, Tensor]
    found: dict[str, Tensor] | None = None


@dataclass(kw_only=True, eq=False)
class Layerwise:
    """Runs networks for several readers.

    Attributes:
        networks: In the order in which a reader asks for them: readers that are behind go first.
        load: Gives the checkpoint's tensor of a name.
        observe: Told of every linear map (:func:`.pieces.execute_all`).
    """

    networks: Sequence[Network]
    load: Callable[[str], Tensor]
    observe: Callable[[str, nn.Linear, Tensor, Tensor], None] | None = None
    _readers: int = 0
    _waiting: list[_Pass] = field(default_factory=list)
    _failed: BaseException | None = None
    _changed: Condition = field(default_factory=Condition)

    def runners(self) -> dict[str, "TorchRunner"]:
        """A runner of every network, by its name."""
        return {network.name: TorchRunner(network, self) for network in self.networks}

    def side_by_side(self, read: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The result of ``read`` for every item, each read by a thread of its own through :meth:`runners`."""
        self._readers = len(items)

        def one(item: Item) -> Result:
            with self._leaving():
                return read(item)

        with ThreadPoolExecutor(len(items)) as threads:
            return list(threads.map(one, items))

    def run(self, network: Network, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
        """A reader's pass, once it and all other readers wait for one."""
        own = _Pass(network=network, inputs={name: torch.tensor(array) for name, array in inputs.items()})
        with self._changed:
            self._waiting.append(own)
            self._serve()
            self._changed.wait_for(lambda: own.found is not None or self._failed is not None)
        if own.found is None:
            assert self._failed is not None
            raise self._failed
        return own.found

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        """A reader that is waited for, until this ends."""
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._serve()

    def _serve(self) -> None:
        """Once every reader waits, compute the passes through the network that comes first. The lock is held."""
        if not self._waiting or len(self._waiting) < self._readers or self._failed is not None:
            return
        first = min((one.network for one in self._waiting), key=self.networks.index)
        together = [one for one in self._waiting if one.network is first]
        self._waiting = [one for one in self._waiting if one.network is not first]
        try:
            inputs = [one.inputs for one in together]
            outputs = execute_all(first, lambda name: self.load(name).float(), inputs, self.observe)
            for one, found in zip(together, outputs, strict=True):
                one.found = found
        except BaseException as error:  # which every reader has to know of, or would wait for good
            self._failed = error
        self._changed.notify_all()


class TorchRunner:
    """Runs one network; by itself it is the only reader.

    Args:
        network: The network.
        layerwise: Loads its weights.
    """

    def __init__(self, network: Network, layerwise: Layerwise) -> None:
        self._network, self._layerwise = network, layerwise
        self.inputs = tuple(network.inputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Compute the named outputs."""
        found = self._layerwise.run(self._network, inputs)
        return {name: found[name].numpy() for name in outputs}
