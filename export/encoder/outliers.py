"""Which linear maps lose too much in 8 bits: measured on golden regions, not guessed from their names.

Real decoders have a few input channels that are a hundred times larger than the rest; in the maps that read them, one
step of the 8-bit scale is as large as everything else. Such a map is kept in half precision.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

LIMIT = 0.05
"""Mean over tokens of the relative error of a map's output, above which it is kept. On SmolLM2-135M these are the
value projections of most layers, 2.5 % of its weights (docs/encoder.md has what that buys)."""


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Watches a network's linear maps while it runs (``observe`` of :func:`.network.execute`).

    Attributes:
        errors: Largest mean relative error of each map over the runs, by the checkpoint's name.
    """

    errors: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, layer: nn.Linear, x: Tensor) -> None:
        """Compare a map's output with that of its 8-bit codes."""
        x, weight = x.reshape(-1, x.shape[-1]), layer.weight
        if len(x) == 0:
            return
        exact = x @ weight.T
        off = _in_8_bits(x) @ _in_8_bits(weight).T - exact
        error = float((off.norm(dim=1) / exact.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)).mean())
        self.errors[name] = max(self.errors.get(name, 0.0), error)

    def kept(self) -> dict[str, str]:
        """The precision of every map that is kept, by name."""
        return {name: "fp16" for name, error in sorted(self.errors.items()) if error > LIMIT}


def _in_8_bits(rows: Tensor) -> Tensor:
    """Rows rounded to 255 steps of each one's largest magnitude, as :mod:`.lower` has it."""
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (rows / scale).round() * scale
