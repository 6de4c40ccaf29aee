"""A larger city made of a golden city's values, so that the self-test crosses tiles and the bundle does not grow.

This is a part of the bundle's format: a bundle holds what PyTorch predicts of these very cities. Only integers, copies
of values and square roots are used, which every machine computes to the same bit.
"""

import numpy as np
import pyarrow as pa

from topt_deploy.data.columns import FLOW_COLUMNS, REGION_ID

WIDEST_DEGREES = 60.0
"""Of a side of the square that the regions lie in."""
MOST_FLOWS = 1_000_000
"""A bundle must not make a machine run out of memory."""


def enlarged(regions: pa.Table, mobility: pa.Table | None, n: int) -> tuple[pa.Table, pa.Table | None]:
    """A city of N regions, as dense as the golden one, whose columns are drawn anew from that one's values.

    Args:
        regions: The golden city's regions, with ``lon`` and ``lat``.
        mobility: Its flows; None where the model reads none. The larger city has as many per region.
        n: N.

    Returns:
        Both tables, in the golden city's columns.

    Raises:
        ValueError: If it would have more than :data:`MOST_FLOWS`.
    """
    ids = pa.array([f"E{i:05d}" for i in range(n)])
    columns = {}
    for stream, name in enumerate(regions.column_names):
        column, drawn = regions.column(name), _drawn(n, stream)
        if name == REGION_ID:
            columns[name] = pa.chunked_array([ids])
        elif name in ("lon", "lat"):
            columns[name] = pa.chunked_array([_spread(column.to_numpy(), drawn)])
        else:
            columns[name] = column.take(_among(drawn, len(regions)))
    if mobility is None:
        return pa.table(columns), None
    flows, stream = len(mobility) * n // len(regions), len(columns)
    if flows > MOST_FLOWS:
        raise ValueError(f"an enlarged city of {flows:,} flows")
    origin, dest, flow = FLOW_COLUMNS
    ends = {name: ids.take(_among(_drawn(flows, stream + i), n)) for i, name in enumerate((origin, dest))}
    sizes = mobility.column(flow).take(_among(_drawn(flows, stream + 2), len(mobility)))
    return pa.table(columns), pa.table({**ends, flow: sizes})


def _drawn(count: int, stream: int) -> np.ndarray:
    """Numbers without a pattern, uint64 (count,): SplitMix64 (Steele, Lea and Flood 2014) of a stream's positions."""
    z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def _among(drawn: np.ndarray, rows: int) -> pa.Array:
    return pa.array((drawn % np.uint64(rows)).astype(np.int64))


def _spread(degrees: np.ndarray, drawn: np.ndarray) -> pa.Array:
    """Coordinates float64 (n,) around the golden city's centre, in a square whose area grows with n."""
    low, high = degrees.min(), degrees.max()
    side = min((high - low) * np.sqrt(len(drawn) / len(degrees)), WIDEST_DEGREES)
    share = (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return pa.array((low + high) / 2 + (share - 0.5) * side)
