"""Regression metrics of the field, over labelled regions."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """MAE and RMSE in counts, R² (coefficient of determination), and the number of regions they are over."""

    mae: float
    rmse: float
    r2: float | None
    regions: int


def metrics(truth: Array, prediction: Array) -> Metrics:
    """Metrics over the regions whose truth is not NaN.

    R² is 1 − SSE/SST with SST about the mean of the same labels; None where they do not vary.

    *Shape:* (N,), (N,)
    """
    known = ~np.isnan(truth)
    y, p = truth[known].astype(np.float64), prediction[known].astype(np.float64)
    error = p - y
    total = float(np.square(y - y.mean()).sum())
    return Metrics(
        mae=float(np.abs(error).mean()),
        rmse=float(np.sqrt(np.square(error).mean())),
        r2=1 - float(np.square(error).sum()) / total if total > 0 else None,
        regions=int(known.sum()),
    )
