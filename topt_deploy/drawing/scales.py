"""From numbers to colours, ticks and text. Every palette is one of ColorBrewer's that colour-blind readers can tell."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BLUES = ("#eff3ff", "#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c")
PURPLES = ("#f2f0f7", "#dadaeb", "#bcbddc", "#9e9ac8", "#756bb1", "#54278f")
GREENS = ("#edf8e9", "#c7e9c0", "#a1d99b", "#74c476", "#31a354", "#006d2c")
TEAL_TO_BROWN = ("#01665e", "#5ab4ac", "#c7eae5", "#f5f5f5", "#f6e8c3", "#d8b365", "#8c510a")
"""Diverging: BrBG, reversed."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Classes of a quantity: class i holds what lies from edge i to edge i + 1.

    Attributes:
        edges: Ascending, one more than there are colours; the outer two are the smallest and the largest value.
        colours: One per class.
        signed: True if numbers are written with their sign.
    """

    edges: tuple[float, ...]
    colours: tuple[str, ...]
    signed: bool = False

    def colour(self, value: float) -> str:
        """The colour of a value between the outer edges."""
        return self.colours[bisect_right(self.edges[1:-1], value)]

    def labels(self) -> list[str]:
        """The edges as text; where all values are the same, that value once."""
        return [number(edge, signed=self.signed) for edge in dict.fromkeys(self.edges)]


def sequential(values: Array, colours: Sequence[str]) -> Scale:
    """Classes of equal width on the √ scale, which counts vary evenly on, with edges rounded to two digits.

    Args:
        values: Not negative, at least one.
        colours: From low to high; evenly spread ones are taken where rounding leaves fewer classes.
    """
    low, high = float(values.min()), float(values.max())
    inner = np.linspace(np.sqrt(low), np.sqrt(high), len(colours) + 1)[1:-1] ** 2
    edges = [edge for edge in dict.fromkeys(map(_rounded, inner)) if low < edge < high]
    taken = np.linspace(0, len(colours) - 1, len(edges) + 1).round().astype(int)
    return Scale(edges=(low, *edges, high), colours=tuple(colours[i] for i in taken))


def diverging(values: Array, colours: Sequence[str] = TEAL_TO_BROWN) -> Scale:
    """Classes of equal width on the √ scale to both sides of zero, the same on either side.

    Args:
        values: At least one.
        colours: An odd number, from negative over neutral to positive.
    """
    high = float(np.abs(values).max())
    half = len(colours) // 2
    inner = [_rounded(high * ((2 * i + 1) / len(colours)) ** 2) for i in range(half)]
    if high == 0:
        return Scale(edges=(0.0, 0.0), colours=(colours[half],), signed=True)
    edges = (-high, *(-edge for edge in reversed(inner)), *inner, high)
    return Scale(edges=edges, colours=tuple(colours), signed=True)


def root_ticks(high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 and 5 from 0 to ``high``, about evenly spaced on the √ scale."""
    ticks = [0.0, *(_one_two_five(high * (i / (count - 1)) ** 2) for i in range(1, count))]
    return [tick for tick in dict.fromkeys(ticks) if tick <= high]


def number(value: float, *, signed: bool = False) -> str:
    """A count as text: whole from 10 on, else two significant digits; thousands set apart, a true minus sign."""
    size = abs(value)
    text = f"{size:,.0f}" if size >= 9.95 or size == round(size) else f"{size:.2g}"
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    return sign + text


def _rounded(value: float) -> float:
    """Rounded to two significant digits."""
    return float(f"{value:.2g}")


def _one_two_five(value: float) -> float:
    """The nearest of …, 1, 2, 5, 10, 20, …, by ratio."""
    power = 10.0 ** math.floor(math.log10(value))
    return min((step * power for step in (1, 2, 5, 10)), key=lambda near: abs(math.log(near / value)))
