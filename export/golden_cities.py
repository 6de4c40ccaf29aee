"""Synthetic cities for the parity gate, and the golden ones among them, which travel with a bundle.

They are drawn within the training ranges, so no row of the training city leaves it with the bundle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from topt_deploy.bundle.enlarged_city import enlarged
from topt_deploy.model.row_tiles import starts
from topt_deploy.model.topt import EnsembleHead, TaskHead, TopT

CENTRE_LONLAT = (0.0, 45.0)
FLOWS_PER_REGION = 6
SPREAD_ROWS = 32
"""Regions of an enlarged city whose expected predictions travel with a bundle, besides the ends of its tiles."""


@dataclass(frozen=True, kw_only=True)
class SyntheticCity:
    """The two input tables of a synthetic city; ``mobility`` is None where the model reads no flows."""

    regions: pa.Table
    mobility: pa.Table | None

    def enlarged(self, regions: int) -> "SyntheticCity":
        """A larger city of its values (:mod:`topt_deploy.bundle.enlarged_city`)."""
        tables = enlarged(self.regions, self.mobility, regions)
        return SyntheticCity(regions=tables[0], mobility=tables[1])


def synthetic_city(
    model: TopT, ranges: Mapping[str, tuple[float, float]], position_m: np.ndarray, *, regions: int, seed: int
) -> SyntheticCity:
    """Draw a city that the model could have been trained on, as dense as the one that it was.

    Args:
        model: The trained model: its schema and its prompt bases.
        ranges: Training ranges by column.
        position_m: The training city's ``position`` (:func:`topt_deploy.data.features.features`).
        regions: N.
        seed: Seed of the draw.
    """
    rng = np.random.default_rng(seed)
    schema = model.spec.schema
    ids = [f"G{i:05d}" for i in range(regions)]
    area_m2 = 6 * np.square(position_m).sum(axis=1).mean()  # of a square whose points lie as far from its centre
    side_deg = np.sqrt(area_m2 * regions / len(position_m)) / 111_000
    lonlat = np.array(CENTRE_LONLAT) + rng.uniform(-0.5, 0.5, (regions, 2)) * min(side_deg, 60.0)
    columns: dict[str, pa.Array] = {
        "region_id": pa.array(ids),
        "lon": pa.array(lonlat[:, 0]),
        "lat": pa.array(lonlat[:, 1]),
    }
    for view, names in schema.views.items():
        for name in names:
            low, high = ranges[f"{view}_{name}"]
            log = rng.uniform(np.log1p(low), np.log1p(high), regions)
            columns[f"{view}_{name}"] = pa.array(np.rint(np.expm1(log)))
    for column, vectors in _prompts(model, regions, rng).items():
        columns[column] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    mobility = None
    if schema.mobility:
        count = FLOWS_PER_REGION * regions
        ends = rng.integers(regions, size=(2, count))
        flow = np.rint(np.expm1(rng.uniform(0, np.log1p(ranges["outflow"][1]), count))) + 1
        mobility = pa.table(
            {"origin_id": [ids[i] for i in ends[0]], "dest_id": [ids[i] for i in ends[1]], "flow": flow}
        )
    return SyntheticCity(regions=pa.table(columns), mobility=mobility)


def _prompts(model: TopT, regions: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Prompt vectors with independent standard normal coordinates in the basis of the first task that reads them."""
    drawn: dict[str, np.ndarray] = {}
    for task, settings in model.spec.config.tasks.items():
        column = settings.prompt_column(task)
        head = model.heads[task]
        assert isinstance(head, (TaskHead, EnsembleHead))
        if column is None or column in drawn or head.basis is None:
            continue
        inverse = torch.linalg.pinv(head.basis.basis.double())  # (R, H)
        coordinates = torch.tensor(rng.standard_normal((regions, inverse.shape[0])))
        drawn[column] = (coordinates @ inverse + head.basis.mean).float().numpy()
    return drawn


def expected_table(outputs: Mapping[str, np.ndarray], rows: Sequence[int] | None = None) -> pa.Table:
    """A model's outputs for a city, (N,) or (N, K) each, as a table with one row per region.

    Args:
        outputs: By name.
        rows: The regions to keep; all by default.
    """
    columns = {}
    for name, values in outputs.items():
        kept = np.ascontiguousarray(values if rows is None else values[list(rows)])
        flat = pa.array(kept.ravel())
        columns[name] = flat if kept.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, kept.shape[1])
    return pa.table(columns)


def telling_rows(n: int) -> list[int]:
    """Regions whose predictions stand for those of a city of N: the ends of every tile, and some in between."""
    spread = np.linspace(0, n - 1, SPREAD_ROWS).round().astype(int).tolist()
    ends = [row for start in starts(n) for row in (start - 1, start) if row >= 0]
    return sorted({*spread, *ends, n - 1})
