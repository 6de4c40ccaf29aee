"""The plain baseline that every run is held against: boosted trees on √count, under the run's own folds."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.ensemble import GradientBoostingRegressor

from topt_deploy.columns import PROMPT_PREFIX

Array = np.ndarray[Any, Any]


def boosted_trees(inputs: Mapping[str, Array], labels: Array, fold: Array) -> Array:
    """Held-out predictions of gradient boosting (scikit-learn) on √count.

    The features are the model's own without the prompts: logarithms of counts, the same averaged along the flows
    that leave and enter a region, total flows, and the position. Settings are fixed, not tuned.

    Args:
        inputs: :func:`topt_deploy.features.features`.
        labels: float64 (N,).
        fold: int64 (N,), the fold a region is held out in; -1 for none.

    Returns:
        float64 (N,); NaN for regions that take no part.
    """
    x = np.concatenate([a for name, a in inputs.items() if not name.startswith(PROMPT_PREFIX)], axis=1)
    predicted = np.full(len(labels), np.nan)
    for k in range(int(fold.max()) + 1):
        train, test = (fold >= 0) & (fold != k), fold == k
        trees = GradientBoostingRegressor(
            n_estimators=300, learning_rate=0.05, max_depth=3, subsample=0.7, max_features=0.3, random_state=0
        )
        trees.fit(x[train], np.sqrt(labels[train]))
        predicted[test] = np.square(np.maximum(trees.predict(x[test]), 0))
    return predicted
