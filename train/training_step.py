"""One step of training: the loss, its gradient, and Adam; on CUDA all of it captured once and replayed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, optim

WARM_UP = 3
"""Steps before the capture: libraries set themselves up, and compiled code is compiled, in the first ones."""

Terms = Mapping[str, Tensor]
"""The loss's terms, by name: scalars, detached, of the step just taken."""


class CapturedGraph(Protocol):
    """The parts of CUDA that a captured step needs."""

    def warm(self, run: Callable[[], Terms]) -> Terms:
        """Run as it is, where the capture will be."""

    def capture(self, run: Callable[[], Terms]) -> Terms:
        """Record what is run, without computing it; the terms are filled by every replay."""

    def replay(self) -> None:
        """Compute what was recorded, once."""


class CudaGraph:
    """A :class:`CapturedGraph` of CUDA's.

    Args:
        generators: Random generators that the step draws from, besides PyTorch's own.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()) -> None:
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        for generator in generators:
            self._graph.register_generator_state(generator)

    def warm(self, run: Callable[[], Terms]) -> Terms:
        """On the capture's stream: what autograd keeps of a parameter belongs to the stream it was first used on."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            terms = run()
        torch.cuda.current_stream().wait_stream(self._stream)
        return terms

    def capture(self, run: Callable[[], Terms]) -> Terms:
        """See :class:`CapturedGraph`."""
        with torch.cuda.graph(self._graph, stream=self._stream):
            return run()

    def replay(self) -> None:
        """See :class:`CapturedGraph`."""
        self._graph.replay()


class Step:
    """Takes one step of training whenever it is called.

    A step of a small city is some hundred kernels of a few microseconds each, and a GPU waits for Python to launch
    them. With a graph the first :data:`WARM_UP` steps run as they are, and are steps like any other; one is then
    captured, and from there on a step is one launch. Nothing in a captured step may depend on the number of the step,
    or make the GPU wait for the CPU.

    Args:
        loss: Computes the loss's terms.
        optimiser: With a graph, capturable, and with a rate that is a tensor on the device.
        context: Makes the context of the forward pass, anew every time.
        graph: Captures the step; None runs every step as it is.
    """

    def __init__(
        self,
        loss: Callable[[], Terms],
        optimiser: optim.Optimizer,
        context: Callable[[], AbstractContextManager[Any]],
        graph: CapturedGraph | None = None,
    ) -> None:
        self._loss, self._optimiser, self._context, self._graph = loss, optimiser, context, graph
        self._taken = 0
        self._terms: Terms | None = None

    def __call__(self, rate: float) -> Terms:
        """Take a step at this rate.

        Returns:
            The terms; with a graph, the next step overwrites them.
        """
        for group in self._optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # in place: a captured step reads it where it was
            else:
                group["lr"] = rate
        if self._graph is None:
            return self._run()
        if self._taken < WARM_UP:
            self._taken += 1
            return self._graph.warm(self._run)
        if self._terms is None:
            self._optimiser.zero_grad()  # so that the capture makes gradients of its own, and overwrites those
            self._terms = self._graph.capture(self._run)
        self._graph.replay()
        return self._terms

    def _run(self) -> Terms:
        with self._context():
            terms = self._loss()
            total = torch.stack([term.float() for term in terms.values()]).sum()
        self._optimiser.zero_grad()
        total.backward()
        self._optimiser.step()
        return {name: term.detach() for name, term in terms.items()}
