"""The report's intervals, from the same scores as the bundle's (:mod:`topt_deploy.intervals`).

A region without a label gets the bundle's interval, which is CV+. One with a label is shown with the prediction of the
fold that did not see it, so its interval is that prediction plus and minus a quantile of the normalised scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from topt_deploy.intervals import COVERAGE, FOLDS, SizeTrend, carries, cv_plus, interval, stretch
from topt_deploy.model.topt import TopT, predict
from topt_deploy.run_folder import Run

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervals:
    """Intervals of :data:`topt_deploy.intervals.COVERAGE` around N predictions.

    Attributes:
        lower, upper: float64 (N,), counts.
        scores: Sorted, normalised where the run has fits of the folds.
        trend: How errors grow with the prediction; none where the run has no such fits.
        leverage: The median of the regions'; 0 where the run has no such fits.
    """

    lower: Array
    upper: Array
    scores: list[float]
    trend: SizeTrend
    leverage: float

    def around(self, prediction: Array) -> tuple[Array, Array]:
        """Ends around predictions of a region that is as far from the others as most are.

        *Shape:* (M,) → (M,), (M,)
        """
        return interval(prediction, self.scores, COVERAGE, stretch(prediction, np.array(self.leverage), self.trend))


def fold_predictions(model: TopT, inputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """Counts (N, K) as the fits of the K folds predict every region, by task; without those that have no such fits."""
    if all(rows == 1 for rows in model.spec.rows.values()):
        return {}  # nothing else of the model's outputs is needed here
    outputs = predict(model, inputs)
    return {task: outputs[task + FOLDS].double().numpy() for task in model.spec.config.tasks if task + FOLDS in outputs}


def read_intervals(
    run: Run, task: str, predicted: Array, held: Array, folds: Array | None, leverage: Array
) -> Intervals | None:
    """Intervals of one task; None with too few labels for them.

    Args:
        predicted: (N,), the held-out prediction, or the deployed model's where there is none.
        held: bool (N,), True where it is held out.
        folds: (N, K), what the fits of the folds say; None where the task has none.
        leverage: (N,), without the region itself.

    Raises:
        BadConfig: If an earlier version trained the run.
    """
    if folds is None:
        scores, trend, leverage = run.facts["scores"][task], SizeTrend(), np.zeros_like(predicted)
        by_fold = [scores]
    else:
        facts = run.of_folds(task)
        by_fold, trend = facts["fold_scores"], SizeTrend(**facts["size_trend"])
        scores = sorted(score for own in by_fold for score in own)
    if not carries(scores, COVERAGE):
        return None
    lower, upper = interval(predicted, scores, COVERAGE, stretch(predicted, leverage, trend))
    if folds is not None and not held.all():
        new = ~held
        lower[new], upper[new] = cv_plus(predicted[new], folds[new], by_fold, leverage[new], trend, COVERAGE)
    return Intervals(lower=lower, upper=upper, scores=scores, trend=trend, leverage=float(np.median(leverage)))
