"""Linear maps that lose too much in few bits: measured on golden regions, not guessed from their names.

Real decoders have a few input channels that are a hundred times larger than the rest; in the maps that read them, one
step of an 8-bit scale is as large as everything else. Others sum up what nearly cancels. Such a map is kept in the next
higher precision.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..quantize_weights import BLOCK, quantize_int8

LIMITS = {"int8": (0.05, "fp16"), "int4": (0.15, "int8")}
"""By precision: the mean over tokens of the relative error of a map's output, above which it is kept, and in what. On
SmolLM2-135M these are value projections, 2.5 % of its weights (dev/LOG.md has what that buys)."""
TOKENS = 256
"""At most so many of a run's tokens are compared, evenly spread: more say nothing new of a map, and take as long as the
run itself."""
ROWS = 64
"""Outputs of a map that are coded at once."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Watches a network's linear maps while it runs (``observe`` of :func:`.pieces.execute`).

    Attributes:
        precision: One of :data:`LIMITS`.
        errors: Largest mean relative error of each map over the runs, by the checkpoint's name.
        coded: The weight of every map as its codes give it, as long as the map is in memory.
    """

    precision: str
    errors: dict[str, float] = field(default_factory=dict)
    coded: WeakKeyDictionary[nn.Linear, Tensor] = field(default_factory=WeakKeyDictionary)

    def __call__(self, name: str, layer: nn.Linear, x: Tensor, y: Tensor) -> None:
        """Compare a map's output with that of its codes."""
        x, weight, exact = x.reshape(-1, x.shape[-1]), layer.weight, y.reshape(-1, y.shape[-1])
        if len(x) == 0:
            return
        if len(x) > TOKENS:
            some = torch.linspace(0, len(x) - 1, TOKENS).long()
            x, exact = x[some], exact[some]
        if layer.bias is not None:
            exact = exact - layer.bias
        in_4_bits = self.precision == "int4"
        if layer not in self.coded:
            self.coded[layer] = _in_parts(_in_4_bits if in_4_bits else _weight_in_8_bits, weight)
        coded = (x if in_4_bits else _rows_in_8_bits(x)) @ self.coded[layer].T
        error = float(((coded - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(_TINY)).mean())
        self.errors[name] = max(self.errors.get(name, 0.0), error)

    def kept(self) -> dict[str, str]:
        """The precision of every map that is kept, by name."""
        limit, higher = LIMITS[self.precision]
        return {name: higher for name, error in sorted(self.errors.items()) if error > limit}


def _in_parts(coded: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """A weight (out, in) as its codes give it, computed in parts that stay in a processor's cache."""
    found = torch.empty_like(weight)
    for into, rows in zip(found.split(ROWS), weight.split(ROWS), strict=True):
        into.copy_(coded(rows))
    return found


def _weight_in_8_bits(weight: Tensor) -> Tensor:
    """Return a weight (out, in) as its codes give it, in float32."""
    codes, scale = quantize_int8(weight.numpy(), np.float32, pairs_fit_16_bits=True)
    return torch.from_numpy(codes * scale[:, None])


def _rows_in_8_bits(rows: Tensor) -> Tensor:
    """Return activations (tokens, in) rounded to 255 steps of each row's largest magnitude, as :mod:`.lower` has it."""
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(_TINY) / 127
    return (rows / scale).round() * scale


def _in_4_bits(rows: Tensor) -> Tensor:
    """Rows rounded to 16 steps of each block's largest magnitude, as :mod:`.lower` has it; whole blocks alone."""
    if rows.shape[1] % BLOCK:
        return rows
    blocks = rows.unflatten(1, (-1, BLOCK))
    high, low = blocks.amax(dim=2, keepdim=True), blocks.amin(dim=2, keepdim=True)
    extreme = torch.where(high >= -low, high, low)
    scale = torch.where(extreme == 0, 1.0, extreme / -8)
    return ((blocks / scale).round().clamp(-8, 7) * scale).flatten(1)
