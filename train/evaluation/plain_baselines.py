"""Plain baselines from scikit-learn: what a city would have without any of this.

Base features are log1p counts, log1p total flows and the position. ``+flow`` adds the counts averaged along the
flows, ``+neighbours`` those of the regions nearby, ``+lag`` the labels nearby (the spatially lagged target, Anselin
1988), and ``+sqrt`` fits √count. Settings are fixed, not tuned; only ridge's α is chosen, by leave-one-out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from topt_deploy.data.features import MOBILITY
from topt_deploy.errors import BadData

from ..boosted_trees import boosting, fit_predict, plain_inputs
from .problem import Method, Problem

Array = np.ndarray[Any, Any]

NEAREST = 5
"""Neighbours of a region."""
PARTS = ("sqrt", "flow", "neighbours", "lag")
"""The parts that a name may list after the regressor."""
RIDGE_ALPHAS = np.logspace(-2, 5, 22)
REGRESSORS: Mapping[str, Callable[[int], Any]] = {
    "ridge": lambda seed: make_pipeline(StandardScaler(), RidgeCV(RIDGE_ALPHAS)),
    "extra-trees": lambda seed: ExtraTreesRegressor(100, random_state=seed),
    "boosting": boosting,
}
"""By name, a regressor for a seed."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of the training labels."""

    def predict(self, problem: Problem, task: str, labels: Array, seeds: Sequence[int]) -> Array:
        """See :class:`.problem.Method`."""
        return np.repeat(np.nanmean(labels, axis=1, keepdims=True), labels.shape[1], axis=1)


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A regressor from scikit-learn.

    Attributes:
        regressor: One of :data:`REGRESSORS`.
        sqrt: True if it is fitted to √count; predictions are squared.
        flow: True if counts averaged along the flows, both ways, are among the features.
        neighbours: True if POI counts averaged over the nearest regions are.
        lag: True if the target averaged over the nearest labelled regions is, on the scale it is fitted on.
    """

    regressor: str
    sqrt: bool
    flow: bool
    neighbours: bool
    lag: bool

    @property
    def name(self) -> str:
        """Such as ``boosting+sqrt+flow``."""
        return "+".join([self.regressor, *(part for part in PARTS if getattr(self, part))])

    def predict(self, problem: Problem, task: str, labels: Array, seeds: Sequence[int]) -> Array:
        """See :class:`.problem.Method`.

        Raises:
            BadData: If the city lacks what the features are made of.
        """
        inputs = {name: tensor.double().cpu().numpy() for name, tensor in problem.inputs.items()}
        distance = problem.distance_m()
        x = self._features(inputs, distance)
        targets = np.sqrt(labels) if self.sqrt else labels
        predicted = []
        for target, seed in zip(targets, seeds, strict=True):
            lag = [_filled(nearest_mean(distance, target[:, None]), target)] if self.lag else []
            predicted.append(fit_predict(REGRESSORS[self.regressor](seed), np.concatenate([x, *lag], axis=1), target))
        return np.square(predicted) if self.sqrt else np.array(predicted)

    def _features(self, inputs: Mapping[str, Array], distance: Array) -> Array:
        """Features of every region, float64 (N, F)."""
        needed = ([MOBILITY] if self.flow else []) + (["poi"] if self.neighbours else [])
        missing = [name for name in needed if name not in inputs]
        if missing:
            raise BadData(
                f"{self.name}: the city lacks what its features are made of",
                expected=", ".join(needed),
                found=", ".join(inputs),
                fix="add the tables, or leave this baseline out with --baselines",
            )
        arrays = plain_inputs(inputs)
        if MOBILITY in arrays and not self.flow:
            arrays[MOBILITY] = arrays[MOBILITY][:, -2:]  # its last columns are the total flows
        near = [nearest_mean(distance, inputs["poi"])] if self.neighbours else []
        return np.concatenate([*arrays.values(), *near], axis=1)


def nearest_mean(distance_m: Array, values: Array) -> Array:
    """Inverse-distance mean over the nearest *other* regions that have values, :data:`NEAREST` of them.

    A region's own values never enter. Below a metre all distances count the same.

    Args:
        distance_m: (N, N).
        values: float64 (N, F); rows of NaN mark regions without.

    Returns:
        float64 (N, F); NaN where no other region of the same city has values.
    """
    usable = np.where(np.isnan(values).any(axis=1), np.inf, distance_m)
    np.fill_diagonal(usable, np.inf)
    nearest = np.argsort(usable, axis=1, kind="stable")[:, :NEAREST]  # (N, K)
    weight = 1 / np.maximum(np.take_along_axis(usable, nearest, axis=1), 1)  # 0 where too few regions have values
    total, weights = np.einsum("nk,nkf->nf", weight, np.nan_to_num(values)[nearest]), weight.sum(axis=1, keepdims=True)
    mean: Array = np.divide(total, weights, out=np.full_like(total, np.nan), where=weights > 0)
    return mean


def _filled(lag: Array, target: Array) -> Array:
    """The mean of all training labels where no region of the same city has one."""
    return np.where(np.isnan(lag), np.nanmean(target), lag)


def _plain() -> dict[str, Callable[[], Method]]:
    """Every combination; neighbours' POI come with flow context only."""
    settings = product(REGRESSORS, (False, True), ((False, False), (True, False), (True, True)), (False, True))
    methods = [
        Plain(regressor=regressor, sqrt=sqrt, flow=flow, neighbours=neighbours, lag=lag)
        for regressor, sqrt, (flow, neighbours), lag in settings
    ]
    return {"mean": Mean} | {method.name: partial(replace, method) for method in methods}


PLAIN: Mapping[str, Callable[[], Method]] = _plain()
"""By name, a factory."""
