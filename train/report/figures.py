"""Figures as plain data: which region has which colour and text. templates/figures.html draws them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topt_deploy.drawing.scales import Scale, number, root_ticks

Array = np.ndarray[Any, Any]

SCATTER_SIZE = 260.0
"""Side of a scatter's square, in its own units."""
BAND_POINTS = 33


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One region on a map: index of its outline, fill (None leaves it empty), text on hover, whether it is hatched."""

    region: int
    fill: str | None
    tip: str
    hatched: bool


@dataclass(frozen=True, kw_only=True)
class Choropleth:
    """A map; ``label`` is what it shows, for those who cannot see it."""

    label: str
    unit: str
    marks: list[Mark]
    scale: Scale


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a scatter, in its units, and its text on hover."""

    x: float
    y: float
    tip: str


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Reported counts (x) against held-out predictions (y), both on √ axes of the same length.

    Attributes:
        label: A description for those who cannot see it.
        points: One per region that has both.
        radius: Of the points: smaller where there are many.
        ticks: Position along an axis, and text.
        band: Corners of the area where the interval around a prediction holds the reported count.
    """

    label: str
    points: list[Point]
    radius: float
    ticks: list[tuple[float, str]]
    band: list[tuple[float, float]]


def choropleth(
    values: Array,
    scale: Callable[[Array], Scale],
    *,
    label: str,
    unit: str,
    tips: Sequence[str],
    hatched: Array | None = None,
) -> Choropleth:
    """A map of a quantity.

    Args:
        values: float64 (N,); a NaN leaves its region empty. At least one is a number.
        scale: Makes classes from the numbers among the values.
        label, unit: The quantity shown, and its unit.
        tips: Text per region (N).
        hatched: bool (N,); by default the regions without a number.
    """
    known = ~np.isnan(values)
    classes = scale(values[known])
    low, high = classes.labels()[0], classes.labels()[-1]
    hatch = ~known if hatched is None else hatched
    return Choropleth(
        label=f"{label}: map of {len(values)} regions, from {low} to {high} {unit}",
        unit=unit,
        scale=classes,
        marks=[
            Mark(
                region=i,
                fill=classes.colour(float(values[i])) if known[i] else None,
                tip=tips[i],
                hatched=bool(hatch[i]),
            )
            for i in range(len(values))
        ],
    )


def scatter(
    reported: Array,
    held_out: Array,
    *,
    tips: Sequence[str],
    interval: Callable[[Array], tuple[Array, Array]] | None,
    label: str,
) -> Scatter:
    """Reported against held-out counts of the regions that have both.

    Args:
        reported, held_out: float64 (N,), NaN where there is none.
        tips: Text per region (N).
        interval: Gives lower and upper ends around predictions; None without intervals.
        label: A description of the figure.
    """
    both = np.flatnonzero(~np.isnan(reported) & ~np.isnan(held_out))
    high = max(float(reported[both].max()), float(held_out[both].max()), 1.0)

    def along(count: Array | float) -> Array:
        """The position of a count along an axis."""
        share = np.sqrt(np.clip(count, 0, high) / high)
        return np.round(SCATTER_SIZE * share, 1)

    grid = np.linspace(0, np.sqrt(high), BAND_POINTS) ** 2
    edges = []
    if interval is not None:
        lower, upper = interval(grid)
        edges = [(lower, grid), (upper[::-1], grid[::-1])]
    return Scatter(
        label=f"{label}: {len(both)} regions, reported count against held-out prediction",
        points=[Point(x=float(along(reported[i])), y=float(along(held_out[i])), tip=tips[int(i)]) for i in both],
        radius=float(np.clip(45 / np.sqrt(len(both)), 1.2, 3.2)),
        ticks=[(float(along(tick)), number(tick)) for tick in root_ticks(high)],
        band=[(float(along(x)), float(along(y))) for xs, ys in edges for x, y in zip(xs, ys, strict=True)],
    )
