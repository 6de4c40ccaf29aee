"""From a city to the arrays that the model reads: the one preprocessing path, for training and for serving.

Counts become log1p here, in float64; standardisation is inside the model and so inside the exported graph.
Nothing here depends on training statistics, and everything is linear in the number of regions and flows.
"""

from typing import Any

import numpy as np

from .table import City, Flows, Schema

Array = np.ndarray[Any, Any]

MOBILITY = "mobility"
POSITION = "position"
EARTH_RADIUS_M = 6_371_008.8
"""Mean radius of the Earth (IUGG), metres."""


def feature_widths(schema: Schema) -> dict[str, int]:
    """Width of every feature view that :func:`features` makes for ``schema``, in the model's order."""
    widths = {view: len(names) for view, names in schema.views.items()}
    if schema.mobility:
        widths[MOBILITY] = 2 * sum(widths.values()) + 2
    return widths


def features(city: City) -> dict[str, Array]:
    """The model's inputs, all float32, in the city's canonical order. N regions.

    Returns:
        One (N, C) array of log1p counts per count view; ``mobility`` (N, 2·ΣC + 2) where the city has flows;
        ``position`` (N, 3) in metres; the prompt columns (N, H) as they are.
    """
    logs = {view: np.log1p(counts) for view, counts in city.views.items()}
    arrays = dict(logs)
    if city.flows is not None:
        arrays[MOBILITY] = flow_features(city.flows, np.concatenate(list(logs.values()), axis=1))
    arrays[POSITION] = local_position_m(city.lonlat)
    return {name: array.astype(np.float32) for name, array in arrays.items()} | dict(city.prompts)


def flow_features(flows: Flows, x: Array) -> Array:
    """The mobility view: what a region's flows lead to and come from. Independent of N in width.

    With row-normalised flows P (N, N), out- and inbound, the view is [P_out x ‖ P_in x ‖ log1p outflow ‖
    log1p inflow]. P is never formed: memory grows with the number of flows. A region without flows gets zeros.

    Args:
        flows: Flows between the N regions, E of them.
        x: float64 (N, F), the other views.

    Returns:
        float64 (N, 2·F + 2).
    """
    n = len(x)

    def average(rows: Array, columns: Array) -> tuple[Array, Array]:
        total = np.bincount(rows, weights=flows.flow, minlength=n)  # (N,)
        order = np.argsort(rows, kind="stable")
        # Edges in row order, summed by column of x: one bincount per feature keeps memory at O(E).
        weight = flows.flow[order] / np.where(total == 0, 1, total)[rows[order]]
        mean = np.stack(
            [np.bincount(rows[order], weights=weight * column[columns[order]], minlength=n) for column in x.T],
            axis=1,
        )
        return mean, total

    outward, outflow = average(flows.origin, flows.dest)
    inward, inflow = average(flows.dest, flows.origin)
    return np.concatenate([outward, inward, np.log1p(outflow)[:, None], np.log1p(inflow)[:, None]], axis=1)


def local_position_m(lonlat: Array) -> Array:
    """Positions on the sphere around the city's own centre, so that float32 keeps distances to a part in 10⁷.

    The straight line between two of these points is the chord c of their great circle, and the haversine
    distance is 2R·asin(c / 2R). Longitude in degrees would need a wrap at ±180 and a cosine per pair.

    Args:
        lonlat: float64 (N, 2), degrees.

    Returns:
        float64 (N, 3), metres.
    """
    lon, lat = np.radians(lonlat).T
    unit = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    return EARTH_RADIUS_M * (unit - unit.mean(axis=0))


def range_columns(city: City, schema: Schema) -> dict[str, Array]:
    """The quantities whose training range a bundle records: every count, and total flows. Each (N,)."""
    columns = {
        f"{view}_{name}": city.views[view][:, i] for view, names in schema.views.items() for i, name in enumerate(names)
    }
    if city.flows is not None:
        for name, ends in (("outflow", city.flows.origin), ("inflow", city.flows.dest)):
            columns[name] = np.bincount(ends, weights=city.flows.flow, minlength=len(city))
    return columns
