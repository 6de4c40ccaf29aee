"""Graphs of regions that the literature's methods are built on: from flows, from similarity, from positions.

Nothing here depends on the order of the regions: values that tie are kept together.
"""

from typing import Any

import numpy as np
from scipy.spatial import Delaunay, QhullError
from sklearn.metrics.pairwise import cosine_similarity

from topt_deploy.data.flows import Flows
from topt_deploy.errors import BadData

Array = np.ndarray[Any, Any]


def od_matrix(flows: Flows, n: int) -> Array:
    """Flows as a matrix, origin by destination: float64 (N, N)."""
    dense = np.zeros((n, n))
    dense[flows.origin, flows.dest] = flows.flow
    return dense


def distributions(counts: Array) -> Array:
    """Rows divided by their sum, (N, C); a row of zeros stays so."""
    total = counts.sum(axis=1, keepdims=True)
    return np.asarray(counts / np.where(total == 0, 1, total))


def mobility_similarities(flows: Flows, n: int) -> tuple[Array, Array]:
    """Similarities of regions by where their flows lead to, and by where they come from.

    Cosine between p(destination | origin = i) and p(destination | origin = j), and the same between distributions of
    origins (MVURE, HREP). A region without flows is similar to none.

    Returns:
        By outflow and by inflow, float64 (N, N) each.
    """
    dense = od_matrix(flows, n)
    return cosine_similarity(distributions(dense)), cosine_similarity(distributions(dense.T))


def nearest(similarity: Array, k: int) -> Array:
    """Row i marks the ``k`` regions most similar to i, those that tie with the last of them, and none of similarity 0.

    A region counts as its own neighbour, as in MVURE's and HREP's code. With k ≥ N, all of positive similarity.

    *Shape:* (N, N) → bool (N, N)
    """
    n = len(similarity)
    last = np.sort(similarity, axis=1)[:, max(n - k, 0)]
    return np.asarray((similarity >= last[:, None]) & (similarity > 0))


def contiguity(lonlat: Array) -> Array:
    """Neighbourhood of regions by their centroids: edges of the Delaunay triangulation, bool (N, N).

    These are the regions whose Thiessen polygons touch, the usual stand-in where there are no boundaries.

    Args:
        lonlat: float64 (N, 2), degrees.

    Raises:
        BadData: If the positions lie on a line, or two regions share one.
    """
    lon, lat = lonlat.T
    east = ((lon - lon[0] + 180) % 360 - 180) * np.cos(np.radians(lat.mean()))  # across the date line, too
    try:
        triangles = Delaunay(np.stack([east, lat], axis=1)).simplices
    except (QhullError, ValueError) as error:
        raise _no_triangles(f"{len(lonlat)} positions on a line") from error
    adjacent = np.zeros((len(lonlat), len(lonlat)), dtype=bool)
    for a, b in ((0, 1), (1, 2), (2, 0)):
        adjacent[triangles[:, a], triangles[:, b]] = True
    adjacent |= adjacent.T
    if not adjacent.any(axis=1).all():
        raise _no_triangles("several regions at one position")
    return adjacent


def _no_triangles(found: str) -> BadData:
    return BadData(
        "the regions' neighbours cannot be told from their positions",
        column="lon, lat",
        expected="distinct centroids, not all on a line",
        found=found,
        fix="correct the positions, or leave the baselines out that need neighbours (HREP)",
    )
