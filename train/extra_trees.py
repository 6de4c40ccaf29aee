"""Fit the tree part of an ensemble head with scikit-learn, and put its trees into the model's form."""

from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.ensemble import ExtraTreesRegressor
from torch import Tensor

from topt_deploy.config.settings import EnsembleConfig
from topt_deploy.model.trees import Trees

Array = np.ndarray[Any, Any]


def fit_trees(
    x: Tensor, targets: Tensor, known: Tensor, settings: EnsembleConfig, *, seed: int, kept: slice
) -> tuple[Trees, Tensor]:
    """Fit extremely randomised trees to every training set.

    Args:
        x: Features (N, F).
        targets: (S, N), on each training set's standardised target scale.
        known: bool (S, N), the training sets.
        settings: Number and depth of the trees.
        seed: Of the splits, the same for every training set.
        kept: The training sets whose trees the model holds.

    Returns:
        The model's trees, and what those of every training set say of all regions, float64 (S, N).
    """
    features, aims, rows = x.float().cpu().numpy(), targets.double().cpu().numpy(), known.cpu().numpy()
    holds = range(len(rows))[kept]
    model = Trees(rows=len(holds), trees=settings.trees, depth=settings.tree_depth)
    predicted = np.empty(aims.shape)
    for s, (aim, row) in enumerate(zip(aims, rows, strict=True)):
        forest = ExtraTreesRegressor(settings.trees, max_depth=settings.tree_depth, random_state=seed)
        with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
            predicted[s] = forest.fit(features[row], aim[row]).predict(features)
        if s in holds:
            for t, one in enumerate(forest.estimators_):
                _fill(model, (s - holds.start, t), one.tree_)
    return model.to(x.device), torch.from_numpy(predicted).to(x.device)


def _fill(model: Trees, place: tuple[int, int], tree: Any) -> None:
    """Put a tree of scikit-learn's, whose nodes are in any order, into the nodes of a perfect one."""
    feature, threshold, value = (array[place].numpy() for array in (model.feature, model.threshold, model.value))
    below = _at_most(tree.threshold)
    reached = [(0, 0)]  # nodes here, and scikit-learn's
    while reached:
        node, own = reached.pop()
        if node >= len(feature):
            value[node - len(feature)] = tree.value[own, 0, 0]
        elif tree.children_left[own] < 0:  # a leaf: its threshold stays infinite
            reached.append((2 * node + 1, own))
        else:
            feature[node], threshold[node] = tree.feature[own], below[own]
            reached += [(2 * node + 1, tree.children_left[own]), (2 * node + 2, tree.children_right[own])]


def _at_most(thresholds: Array) -> Array:
    """The largest float32 numbers that are no larger: features in float32 lie on the same side of either."""
    near = thresholds.astype(np.float32)
    return np.where(near > thresholds, np.nextafter(near, np.float32(-np.inf)), near)
