"""Regions that are unlike those that the model was trained on, and the reasons."""

from typing import Any

import numpy as np

from topt_deploy.bundle.manifest import Manifest
from topt_deploy.data.city import City
from topt_deploy.data.features import range_columns

Array = np.ndarray[Any, Any]

REASONS_SHOWN = 3
RANGE_BEYOND = 0.5
"""How far outside the training range a single quantity is a reason for doubt: half of the range's own width, in
logarithms. Less is common in any other city."""


def extrapolated(manifest: Manifest, city: City, leverage: Array | None) -> list[str]:
    """Per region, in canonical order, why it is unlike the training regions; empty where it is not.

    By its leverage, or by a quantity that lies far outside the training range (:data:`RANGE_BEYOND`), and then with
    all that lie outside; by these alone where the bundle's graph puts out no leverage.
    """
    outside: list[list[str]] = [[] for _ in range(len(city))]
    columns = range_columns(city, manifest.schema)
    values = np.array([*columns.values()]).reshape(len(columns), len(city))
    ranges = np.array([manifest.ranges[column] for column in columns]).reshape(-1, 2, 1)
    low, high = ranges[:, 0], ranges[:, 1]
    names, sides = list(columns), ("below", "above")
    for column, side, region in np.argwhere(np.stack([values < low, values > high], axis=1)).tolist():
        outside[region].append(f"{names[column]} {sides[side]} the training range")
    far = manifest.leverage
    wide = np.log1p(np.maximum(np.stack([low, high]), 0))
    reach = RANGE_BEYOND * (wide[1] - wide[0])
    logs = np.log1p(np.maximum(values, 0))
    absurd = ((logs < wide[0] - reach) | (logs > wide[1] + reach)).any(axis=0)
    if leverage is not None and far is not None:
        over = leverage / max(float(far["threshold"]), 1e-12)
        for region, times in enumerate(over.tolist()):
            # What lies outside of a single range is common, and no reason for doubt alone.
            told = f"unlike the training regions: leverage {times:.2g} times the largest that is trusted"
            outside[region] = [told] * (times > 1) + (outside[region] if times > 1 or absurd[region] else [])
    return [
        "; ".join(r[:REASONS_SHOWN]) + (f"; {len(r) - REASONS_SHOWN} more" if len(r) > REASONS_SHOWN else "")
        for r in outside
    ]
