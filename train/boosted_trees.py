"""The plain baseline that every run is held against: boosted trees on √count, under the run's own folds."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import sklearn
from sklearn.ensemble import GradientBoostingRegressor

from topt_deploy.data.columns import PROMPT_PREFIX
from topt_deploy.data.features import FLOW_VIEWS, MOBILITY

Array = np.ndarray[Any, Any]


def plain_inputs(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs of plain baselines: count views, flow context, position. Each (N, F).

    Args:
        inputs: :func:`topt_deploy.data.features.features`.
    """
    left_out = {*FLOW_VIEWS} - {MOBILITY}
    return {name: x for name, x in inputs.items() if not (name in left_out or name.startswith(PROMPT_PREFIX))}


def boosting(seed: int) -> GradientBoostingRegressor:
    """Gradient boosting (Friedman 2001) as every baseline here uses it; settings are fixed, not tuned."""
    return GradientBoostingRegressor(
        n_estimators=300, learning_rate=0.05, max_depth=3, subsample=0.7, max_features=0.3, random_state=seed
    )


def fit_predict(regressor: Any, x: Array, targets: Array) -> Array:
    """Fit a scikit-learn regressor where the target is known, and predict every region; never below 0.

    *Shape:* features (N, F), targets (N,) with NaN where unknown → (N,)
    """
    known = ~np.isnan(targets)
    # Every tree of a boosting would check the same numbers and settings again, which takes a fifth of the time.
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        predicted: Array = regressor.fit(x[known], targets[known]).predict(x)
    return np.maximum(predicted, 0)


def boosted_trees(inputs: Mapping[str, Array], labels: Array, fold: Array) -> Array:
    """Held-out predictions of gradient boosting (scikit-learn) on √count.

    The features are logarithms of counts, the same averaged along the flows that leave and enter a region, total
    flows, and the position.

    Args:
        inputs: :func:`topt_deploy.data.features.features`.
        labels: float64 (N,).
        fold: int64 (N,), the fold a region is held out in; -1 for none.

    Returns:
        float64 (N,); NaN for regions that take no part.
    """
    x = np.concatenate([*plain_inputs(inputs).values()], axis=1)
    predicted = np.full(len(labels), np.nan)
    for k in range(int(fold.max()) + 1):
        targets = np.where((fold >= 0) & (fold != k), np.sqrt(labels), np.nan)
        predicted[fold == k] = np.square(fit_predict(boosting(0), x, targets))[fold == k]
    return predicted
