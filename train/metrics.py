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


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """A run's figures for one task.

    Attributes:
        held_out: Over the regions' own held-out folds, weights of the last epoch: what to expect on regions whose
            label is unknown.
        in_sample: The deployed model on regions it was trained on: how closely it fits, not how well it predicts.
        mean: Predicting the training folds' mean, under the same folds.
        trees: :func:`topt_deploy.train.boosted_trees.boosted_trees`, under the same folds.
    """

    held_out: Metrics
    in_sample: Metrics
    mean: Metrics
    trees: Metrics


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
