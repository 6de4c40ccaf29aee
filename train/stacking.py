"""Weights of the parts of an ensemble: stacked regressions (Breiman 1996), inside each training set alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls
from sklearn.model_selection import GroupKFold, KFold

from .prompt4re import by_city

Array = np.ndarray[Any, Any]

ENOUGH = 20
"""A training set with fewer labels has all parts weigh the same: so few errors tell parts apart by chance."""
EQUAL = 50
"""The belief that all parts are worth the same weighs as much as so many labels: with n of them, the weights are drawn
to equal ones by the share 50 / (50 + n)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldRows:
    """Training sets, and those that are left of them without one of their inner folds.

    Attributes:
        labels: float64 (S, N), the training sets first; NaN where unknown or held out.
        outer: How many they are.
        parents: For every row, the training set that it is, or is a part of.
    """

    labels: Array
    outer: int
    parents: Sequence[int]

    def kept(self, rows: int) -> slice:
        """The rows that a head holds the fits of: the last so many training sets."""
        return slice(self.outer - rows, self.outer)


def with_inner(labels: Array, *, folds: int, seed: int, part: Array | None = None) -> FoldRows:
    """Add the inner folds' rows to those of the training sets.

    Args:
        labels: float64 (S, N), a training set per row.
        folds: Inner folds; below 2 there are none.
        seed: Of their shuffling.
        part: int64 (N,), the number of the city that each region is of; None for one city. Inner folds hold out whole
            cities where the outer ones would (:func:`.prompt4re.by_city`).
    """
    rows, parents = [*labels], list(range(len(labels)))
    for s, own in enumerate(labels):
        known = np.flatnonzero(~np.isnan(own))
        if folds < 2 or len(known) < ENOUGH:
            continue
        split = KFold(folds, shuffle=True, random_state=seed).split(known)
        if part is not None and by_city(own, part):
            cities = part[known]
            split = GroupKFold(min(folds, len(np.unique(cities)))).split(known, groups=cities)
        for _, held_out in split:
            left = own.copy()
            left[known[held_out]] = np.nan
            rows.append(left)
            parents.append(s)
    return FoldRows(labels=np.array(rows), outer=len(labels), parents=parents)


def stack(outputs: Array, targets: Array, rows: FoldRows, *, earned: Sequence[bool] = ()) -> Array:
    """Weights of the parts, for every training set: non-negative least squares of its labels on what the parts say of
    inner folds that they did not train on, scaled to add up to 1 and drawn to equal weights (:data:`EQUAL`).

    Args:
        outputs: float64 (P, S, N), on each row's own standardised target scale.
        targets: float64 (S, N), the labels on it; anything where a row does not have them.
        rows: The S rows.
        earned: True for parts that have the weight they earn and no share of the equal ones. By default none, and none
            either where all would be.

    Returns:
        float64 (training sets, P).
    """
    parts = len(outputs)
    shares = np.array([not own for own in earned] if earned and not all(earned) else [True] * parts)
    equal = shares / shares.sum()
    weights = np.tile(equal, (rows.outer, 1))
    for s in range(rows.outer):
        inner = [row for row in range(rows.outer, len(rows.parents)) if rows.parents[row] == s]
        if not inner or parts == 1:
            continue
        known = ~np.isnan(rows.labels[s])
        held_out = [(row, np.flatnonzero(known & np.isnan(rows.labels[row]))) for row in inner]
        seen = np.concatenate([outputs[:, row, regions].T for row, regions in held_out])
        truth = np.concatenate([targets[row, regions] for row, regions in held_out])
        found, _ = nnls(seen, truth)
        if found.sum() > 0:
            shrink = EQUAL / (EQUAL + len(truth))
            weights[s] = shrink * equal + (1 - shrink) * found / found.sum()
    return weights
