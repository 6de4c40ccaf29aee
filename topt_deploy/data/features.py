"""From a city to the arrays that the model reads: the one preprocessing path, for training and for serving.

Counts become log1p here, in float64; standardisation is inside the model and so inside the exported graph.
Nothing here depends on training statistics, and everything is linear in the number of regions and flows.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from .city import City, Schema
from .flows import Flows

Array = np.ndarray[Any, Any]

MOBILITY = "mobility"
POSITION = "position"
LOG_CONTEXT = "mobility_log"
TWO_HOPS = "mobility_two_hops"
TRIPS = "trips"
DESTINATIONS = "destinations"
FLOW_VIEWS = (MOBILITY, LOG_CONTEXT, TWO_HOPS, TRIPS, DESTINATIONS)
"""The views that are computed from the flows, in order; only :data:`MOBILITY` is a view of the paper's embedding."""
TRIP_FEATURES = 11
EARTH_RADIUS_M = 6_371_008.8
"""Mean radius of the Earth (IUGG), metres."""


def feature_widths(schema: Schema) -> dict[str, int]:
    """Width of every view of the paper's embedding that :func:`features` makes for ``schema``, in the model's order."""
    widths = {view: len(names) for view, names in schema.views.items()}
    if schema.mobility:
        widths[MOBILITY] = 2 * sum(widths.values()) + 2
    return widths


def all_widths(schema: Schema) -> dict[str, int]:
    """Width of everything that :func:`features` makes for ``schema`` and the default's head sees, prompts apart, in the
    model's order."""
    counts = sum(len(names) for names in schema.views.values())
    flows = {LOG_CONTEXT: 2 * counts, TWO_HOPS: 2 * counts, TRIPS: TRIP_FEATURES, DESTINATIONS: 12}
    widths = feature_widths(schema) | (flows if schema.mobility else {}) | {POSITION: 3}
    return widths if schema.places else {name: w for name, w in widths.items() if name not in (DESTINATIONS, POSITION)}


def features(city: City, names: Sequence[str] | None = None) -> dict[str, Array]:
    """The model's inputs, all float32, in the city's canonical order. N regions.

    Args:
        city: The city.
        names: The features to make; by default all that the city has.

    Returns:
        One (N, C) array of log1p counts per count view; the views of :func:`flow_features` where the city has flows;
        ``position`` (N, 3) in metres; the prompt columns (N, H) as they are. Those of several cities are each city's
        own, one after the other.
    """
    if city.parts:
        each = [features(part, names) for part in city.parts]
        return {name: np.concatenate([own[name] for own in each]) for name in each[0]}
    arrays = {view: np.log1p(counts) for view, counts in city.views.items()}
    position_m = local_position_m(city.lonlat)
    if city.flows is not None:
        views = FLOW_VIEWS if names is None else [name for name in FLOW_VIEWS if name in names]
        arrays |= flow_features(city.flows, np.concatenate(list(arrays.values()), axis=1), position_m, views)
    arrays[POSITION] = position_m
    made = {name: array.astype(np.float32) for name, array in arrays.items()} | dict(city.prompts)
    return made if names is None else {name: made[name] for name in names}


class _Averaging:
    """Averages over the regions that a region's flows lead to: a row-normalised matrix P (N, N) that is never formed.

    Args:
        rows, columns: int64 (E,), the two ends of every flow.
        weight: float64 (E,), not negative. A region without flows averages to zeros.
    """

    def __init__(self, rows: Array, columns: Array, weight: Array, *, n: int) -> None:
        self.rows, self.columns, self.n = rows, columns, n
        self.total = np.bincount(rows, weights=weight, minlength=n)  # (N,)
        self.share = weight / np.where(self.total == 0, 1, self.total)[rows]  # (E,)

    def of(self, x: Array) -> Array:
        """P x, column by column: memory stays at O(E).

        *Shape:* (N, F) → (N, F)
        """
        return np.stack([self.over_flows(column[self.columns]) for column in x.T], axis=1)

    def over_flows(self, value: Array) -> Array:
        """The mean of a quantity of the flows themselves.

        *Shape:* (E,) → (N,)
        """
        return np.bincount(self.rows, weights=self.share * value, minlength=self.n)


def flow_features(flows: Flows, x: Array, position_m: Array, views: Sequence[str] = FLOW_VIEWS) -> dict[str, Array]:
    """Features of where each region's flows lead to and come from.

    No width depends on N, and memory grows with the number of flows.

    P are the row-normalised flows (N, N), L the row-normalised logarithms log1p(flow), out- and inbound each:

    - ``mobility`` (N, 2·F + 2): [P_out x ‖ P_in x ‖ log1p outflow ‖ log1p inflow];
    - ``mobility_log`` (N, 2·F): L x, in which small flows count for more;
    - ``mobility_two_hops`` (N, 2·F): P P x (SIGN, Frasca et al. 2020: a graph network's reach without its layers);
    - ``trips`` (N, 11): totals, mean lengths under P and L, flow within the region and its shares, entropies of P;
    - ``destinations`` (N, 12): mean positions of the other ends, under P and L.

    Args:
        flows: Flows between the N regions, E of them.
        x: float64 (N, F), the count views.
        position_m: float64 (N, 3), :func:`local_position_m`.
        views: The views to make.
    """
    n = len(x)
    ends = ((flows.origin, flows.dest), (flows.dest, flows.origin))  # out, in

    def averages(weight: Array) -> list[_Averaging]:
        return [_Averaging(rows, columns, weight, n=n) for rows, columns in ends]

    plain, logs = averages(flows.flow), cache(lambda: averages(np.log1p(flows.flow)))
    context = [p.of(x) for p in plain]
    totals = [np.log1p(p.total) for p in plain]

    def trips() -> list[Array]:
        length_m = np.linalg.norm(position_m[flows.origin] - position_m[flows.dest], axis=1)
        inside = flows.origin == flows.dest
        within = np.bincount(flows.origin[inside], weights=flows.flow[inside], minlength=n)
        return [
            *totals,
            *(np.log1p(p.over_flows(length_m) / 1000) for p in (*plain, *logs())),
            np.log1p(within),
            *(within / np.where(p.total == 0, 1, p.total) for p in plain),
            *(p.over_flows(-np.log(np.where(p.share == 0, 1, p.share))) for p in plain),  # Σ −p log p, a mean under P
        ]

    columns: dict[str, Callable[[], list[Array]]] = {
        MOBILITY: lambda: [*context, *totals],
        LOG_CONTEXT: lambda: [p.of(x) for p in logs()],
        TWO_HOPS: lambda: [p.of(c) for p, c in zip(plain, context, strict=True)],
        TRIPS: trips,
        DESTINATIONS: lambda: [p.of(position_m) for p in (*plain, *logs())],
    }
    return {view: np.column_stack(columns[view]()) for view in views}


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
