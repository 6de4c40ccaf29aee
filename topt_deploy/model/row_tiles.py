"""N×N quantities of N regions, computed a few rows at a time: memory grows with N and not with its square.

Attention, distances and similarities are asked for a tile of rows, and only what is left of it, a few numbers a row,
is kept. Small cities are one tile, computed as if there were none of this. In training a tile's inner values are
computed a second time for the gradient instead of being kept; in an exported graph the tiles are an ONNX Scan.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topt_deploy.freed_memory import give_back_from

ENTRIES = 1 << 18
"""Entries of an N×N matrix that are held at once, by each of a layer's heads or channels: 1 MB for each. Larger tiles
leave the processor's cache, and are slower."""
CUDA_ENTRIES = 1 << 22
"""Likewise on CUDA, where a tile costs launches and no cache is to be kept: N to 2,048 is one tile. Not measured."""
LEAST = 32
"""Rows of a tile, whatever N is. A product with fewer spends its time on laying out the other matrix for the processor.
In training 0.3 MB of every tile are kept for the gradient, its operations and the state of the random numbers, so that
the tiles have to be O(N)."""
BLOCK_BYTES = 1 << 18
"""From this size on a block of memory is given back as soon as it is free, while there are several tiles."""
ALL = slice(None)
EACH, STACK = "topt::Each", "topt::Stack"
"""Operators of a traced model around what is computed for each of several things: from all of them, (T, …), to one,
(…), and from what is made of one to what is made of all, (T, …) (export/tile_scans.py)."""

Rows = slice | Tensor
"""Rows, given as a slice or by their numbers."""


class Matrix(Protocol):
    """An N×N matrix that gives the rows it is asked for: a tensor, or :class:`Computed`."""

    def __getitem__(self, rows: Any, /) -> Tensor:
        """*Shape:* t rows → (t, N)"""

    def __rmul__(self, factor: Any, /) -> Any:
        """A matrix of the entries times a number."""

    @property
    def T(self) -> Any:
        """The transpose, a matrix again."""


class Computed:
    """A matrix whose rows are computed when they are asked for.

    Args:
        rows: Computes rows.
        columns: Computes rows of the transpose; None where that is never read.
    """

    def __init__(self, rows: Callable[[Any], Tensor], columns: Callable[[Any], Tensor] | None = None) -> None:
        self._rows, self._columns = rows, columns

    def __getitem__(self, rows: Any, /) -> Tensor:
        return self._rows(rows)

    def __rmul__(self, factor: Tensor) -> "Computed":
        return Computed(lambda rows: factor * self._rows(rows))

    @property
    def T(self) -> "Computed":
        """The transpose."""
        assert self._columns is not None
        return Computed(self._columns, self._rows)


_PLAN: ContextVar[Tensor | None] = ContextVar("plan", default=None)
_HELD: ContextVar[float | None] = ContextVar("held", default=None)
"""Entries that are held at once: infinity where there is but one tile, None for :data:`ENTRIES`."""


@contextmanager
def held_on(device: torch.device) -> Iterator[None]:
    """Tiles of the size that suits a device; elsewhere they are the processor's."""
    with _held(CUDA_ENTRIES if device.type == "cuda" else None):
        yield


@contextmanager
def whole() -> Iterator[None]:
    """One tile, whatever N is: for an engine that is made for cities up to some size."""
    with _held(math.inf):
        yield


@contextmanager
def _held(entries: float | None) -> Iterator[None]:
    token = _HELD.set(entries)
    try:
        yield
    finally:
        _HELD.reset(token)


@contextmanager
def planned(rows: Tensor) -> Iterator[None]:
    """These tiles, as long as a model is traced: its N is not known yet.

    Args:
        rows: int64 (T, t), the rows of every tile, in order; what exceeds N is the last row again.
    """
    token = _PLAN.set(rows)
    try:
        yield
    finally:
        _PLAN.reset(token)


def matrix(n: int, rows: Callable[[Any], Tensor], columns: Callable[[Any], Tensor] | None = None) -> Matrix:
    """The matrix of these rows: computed once where it is one tile, else whenever rows are asked for."""
    return rows(ALL) if one_tile(n) else Computed(rows, columns)


def take(x: Tensor, rows: Rows, axis: int = 0) -> Tensor:
    """These rows of a tensor, along an axis."""
    return x.index_select(axis, rows) if isinstance(rows, Tensor) else x[(ALL,) * axis + (rows,)]


def in_tiles(n: int, tile: Callable[[Rows], tuple[Tensor, ...]], axis: int = 0) -> tuple[Tensor, ...]:
    """Compute ``tile`` for all N rows, one tile after the other, and join the results.

    Args:
        n: N.
        tile: Computes tensors for t rows.
        axis: The axis of the rows, 0 or 1.
    """
    plan = _plan()
    if plan is not None:
        return _traced(n, tile, axis, plan)
    if one_tile(n):
        return tile(ALL)
    # Compiled, every tile would be a part of the program: a minute for forty of them.
    looped = torch.compiler.disable(_looped) if torch.compiler.is_compiling() else _looped
    return looped(n, tile, axis)


def for_each(part: Callable[..., Tensor], *of: Tensor) -> Tensor:
    """Compute ``part`` for each entry of the first axis, and stack the results.

    An exported graph does so within a tile, one entry after the other: what is computed for one stays in the
    processor's cache. Elsewhere it is one computation, which has to allow for a first axis.

    Args:
        part: Makes a tensor (…) of tensors (…).
        of: Tensors (M, …).
    """
    if _plan() is None:
        return part(*of)
    (one,) = _stacked(of[0].shape[0], (part(*_each(*of)),))
    return one


def _plan() -> Tensor | None:
    return _PLAN.get()


def one_tile(n: int) -> bool:
    """True if N regions fit into a single tile."""
    most = _entries()
    return _PLAN.get() is None and (most == math.inf or n * n <= most)  # asked of a traced N, it would be a guard


def starts(n: int) -> range:
    """The first row of each of the tiles that an exported graph computes N regions in."""
    return range(0, n, min(n, max(LEAST, ENTRIES // n)))


def largest(tiles: int) -> int:
    """The largest N that an exported graph computes in this many tiles."""
    n = math.isqrt(tiles * ENTRIES)
    while len(starts(n)) > tiles:
        n -= 1
    return n


def _entries() -> float:
    held = _HELD.get()
    return ENTRIES if held is None else held


SETTLED = (_plan, one_tile)
"""Functions of N and of what surrounds a call; TorchDynamo, which cannot read a ContextVar, may take what they give
while it compiles as given for good."""


def _looped(n: int, tile: Callable[[Rows], tuple[Tensor, ...]], axis: int) -> tuple[Tensor, ...]:
    _give_back_at_once()
    trained = torch.is_grad_enabled()
    run = partial(checkpoint, tile, use_reentrant=False) if trained else tile
    height = max(LEAST, int(_entries() // n))
    parts = [run(slice(start, min(start + height, n))) for start in range(0, n, height)]
    return tuple(torch.cat(part, dim=axis) for part in zip(*parts, strict=True))


def _give_back_at_once() -> None:
    """Keep a tile's blocks off glibc's heap, where what is kept of every tile would lie between them and pin the rest:
    1.8 GB at 3,000 regions, of which 0.1 were in use. Other allocators need none of this."""
    give_back_from(BLOCK_BYTES)


def _traced(n: int, tile: Callable[[Rows], tuple[Tensor, ...]], axis: int, plan: Tensor) -> tuple[Tensor, ...]:
    (rows,) = _each(plan)
    joined = (part.transpose(0, axis).flatten(axis, axis + 1) for part in _stacked(plan.shape[0], tile(rows)))
    return tuple(part.index_select(axis, torch.arange(n)) for part in joined)  # from (…, T·t, …)


def _each(*of: Tensor) -> tuple[Tensor, ...]:
    dtypes, shapes = [tensor.dtype for tensor in of], [tensor.shape[1:] for tensor in of]
    return tuple(torch.onnx.ops.symbolic_multi_out(EACH, of, dtypes=dtypes, shapes=shapes, version=1))


def _stacked(count: int, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtypes, shapes = [part.dtype for part in parts], [(count, *part.shape) for part in parts]
    return tuple(torch.onnx.ops.symbolic_multi_out(STACK, parts, dtypes=dtypes, shapes=shapes, version=1))
