"""With which regions a region exchanges most: these are what its flow context averages over."""

from typing import Any

import numpy as np

from topt_deploy.data.flows import Flows

Array = np.ndarray[Any, Any]


def partners(flows: Flows, *, regions: int, k: int) -> list[list[tuple[int, float]]]:
    """The k other regions that each region exchanges most flow with, most first; fewer where flows lead to fewer.

    What counts is the mean of two shares: of all flow out of the region, and of all flow into it. Flow within the
    region is part of both totals, as it is in :func:`topt_deploy.data.features.flow_features`.

    Args:
        flows: Flows between N regions.
        regions: N.
        k: At most so many.

    Returns:
        Per region, positions of the others and their shares in (0, 1].
    """
    rows = np.concatenate([flows.origin, flows.dest])
    columns = np.concatenate([flows.dest, flows.origin])
    halves = [_share(flows.flow, ends, regions) / 2 for ends in (flows.origin, flows.dest)]
    pairs, place = np.unique(rows * regions + columns, return_inverse=True)
    share = np.bincount(place, weights=np.concatenate(halves))
    row, column = np.divmod(pairs, regions)
    found: list[list[tuple[int, float]]] = [[] for _ in range(regions)]
    for pair in np.argsort(-share, kind="stable"):
        mine = found[row[pair]]
        if len(mine) < k and row[pair] != column[pair] and share[pair] > 0:
            mine.append((int(column[pair]), float(share[pair])))
    return found


def _share(flow: Array, ends: Array, regions: int) -> Array:
    """Every flow's share of all flow at that end of it, (E,)."""
    total = np.bincount(ends, weights=flow, minlength=regions)[ends]
    return flow / np.where(total == 0, 1, total)
