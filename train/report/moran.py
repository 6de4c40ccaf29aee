"""Moran's I: whether what the model gets wrong at one place it also gets wrong next door."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.neighbors import NearestNeighbors

Array = np.ndarray[Any, Any]

NEIGHBOURS = 5
PERMUTATIONS = 999
SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Moran:
    """Spatial autocorrelation of a quantity over N regions.

    Attributes:
        value: I; about −1 to 1, positive where neighbours are alike.
        expected: −1/(N − 1), what I is on average where place means nothing.
        p: Share of random rearrangements that lie at least as far on the same side: a one-sided permutation test.
    """

    value: float
    expected: float
    p: float


def nearest(positions: Array, k: int = NEIGHBOURS) -> Array:
    """The k nearest other regions of every region, all others where there are fewer.

    *Shape:* (N, 2 or 3) → int64 (N, k)
    """
    search = NearestNeighbors(n_neighbors=min(k, len(positions) - 1)).fit(positions)
    found: Array = search.kneighbors(return_distance=False)
    return found


def morans_i(values: Array, neighbours: Array, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Moran | None:
    """Moran's I with row-standardised nearest-neighbour weights (Moran 1950; Cliff & Ord 1981).

    I = Σ_i z_i · mean_{j ∈ neighbours(i)} z_j / Σ_i z_i², with z the deviations from the mean.

    Args:
        values: float64 (N,).
        neighbours: int64 (N, k), the neighbours of each region.
        permutations: Random rearrangements behind the p-value.
        seed: Of the rearrangements.

    Returns:
        None where the values do not vary: then I is not defined.
    """
    z = values - values.mean()
    if not z.any():
        return None

    def statistic(z: Array) -> float:
        return float(z @ z[neighbours].mean(axis=1) / (z @ z))

    value = statistic(z)
    rng = np.random.default_rng(seed)
    above = sum(statistic(rng.permutation(z)) >= value for _ in range(permutations))
    return Moran(
        value=value,
        expected=-1 / (len(z) - 1),
        p=(min(above, permutations - above) + 1) / (permutations + 1),
    )


def meaning(moran: Moran | None) -> str:
    """The meaning of the figure for trusting the predictions, in one sentence."""
    if moran is None:
        return "The errors do not vary from region to region, so there is no spatial pattern to test."
    if moran.p > SIGNIFICANT:
        return (
            "The errors show no spatial pattern that this test can see: they tend to cancel when regions are added up"
            " to districts."
        )
    if moran.value > moran.expected:
        return (
            "The errors cluster: where a region is predicted too high or too low its neighbours tend to be as well, so"
            " sums over a district are less certain than they look, and something about place is missing from the data."
        )
    return (
        "Neighbouring errors tend to be opposite: what is predicted too high at one place is too low next door, so"
        " sums over a district are more reliable than single regions."
    )
