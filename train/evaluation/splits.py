"""Outer folds, and the rows of training labels they leave: the one place that knows what is held out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.cluster import KMeans

from topt_deploy.errors import BadData

from ..metrics import Metrics, metrics
from ..prompt4re import fold_of

Array = np.ndarray[Any, Any]

FOLDS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """Repeated folds over the labelled regions. R repetitions, N regions, S = Σ folds training sets.

    Attributes:
        labels: float64 (N,), NaN where unknown.
        fold: int64 (R, N), the fold each region is held out in, 0 … K-1; -1 for regions that take no part.
        seeds: Seed of every repetition (R).
    """

    labels: Array
    fold: Array
    seeds: tuple[int, ...]

    def rows(self) -> Array:
        """Repetition and held-out fold of every training set, int64 (S, 2)."""
        return np.array([(r, k) for r, fold in enumerate(self.fold) for k in range(int(fold.max()) + 1)])

    def row_seeds(self) -> list[int]:
        """Seed of every training set (S): its repetition's."""
        return [self.seeds[r] for r, _ in self.rows()]

    def training_labels(self) -> Array:
        """float64 (S, N): the labels of each training set; NaN where held out, unknown, or taking no part."""
        repetition, held_out = self.rows().T
        fold = self.fold[repetition]  # (S, N)
        return np.where((fold >= 0) & (fold != held_out[:, None]), self.labels, np.nan)

    def held_out(self, predictions: Array) -> Array:
        """Each region as predicted by the training set that it was held out of.

        Args:
            predictions: float64 (S, N), counts.

        Returns:
            float64 (R, N); NaN for regions that take no part.
        """
        rows = self.rows()
        if predictions.shape != (len(rows), len(self.labels)) or not (predictions >= 0).all():  # NaN too
            raise ValueError(f"predictions must be counts of shape {(len(rows), len(self.labels))}")
        own = np.full(self.fold.shape, np.nan)
        for prediction, (r, k) in zip(predictions, rows, strict=True):
            mine = self.fold[r] == k
            own[r, mine] = prediction[mine]
        return own


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Held-out predictions of one method for one task.

    Attributes:
        labels: float64 (N,).
        fold: int64 (R, N); -1 for regions that take no part.
        prediction: float64 (R, N); NaN for regions that take no part.
    """

    labels: Array
    fold: Array
    prediction: Array

    def truth(self) -> Array:
        """The labels of the regions that take part, float64 (N,); NaN for the others."""
        return np.where((self.fold >= 0).all(axis=0), self.labels, np.nan)

    def metrics(self) -> list[Metrics]:
        """Over all regions' held-out predictions, for every repetition (R)."""
        return [metrics(self.truth(), prediction) for prediction in self.prediction]


def chosen_by_other_folds(candidates: Mapping[str, HeldOut]) -> tuple[HeldOut, Array]:
    """The predictions of whoever takes one of several methods without a look at the fold it is then held against.

    For every fold the method is taken that has the smallest mean absolute error on all other folds. What it predicted
    of those was fitted with this fold's labels, which favours the choice a little. With two folds or more.

    Args:
        candidates: By name, of the same splits.

    Returns:
        The predictions, and the number of the method behind each, int64 (R, N); -1 for regions that take no part.
    """
    own = list(candidates.values())
    fold, truth = own[0].fold, own[0].truth()
    errors = np.abs(np.stack([held_out.prediction for held_out in own]) - truth)  # (M, R, N)
    number = np.full(fold.shape, -1)
    for r, of_region in enumerate(fold):
        for k in range(of_region.max() + 1):
            others = (of_region >= 0) & (of_region != k) & ~np.isnan(truth)
            number[r, of_region == k] = errors[:, r, others].mean(axis=1).argmin()
    taken = np.take_along_axis(np.stack([held_out.prediction for held_out in own]), number[None], axis=0)[0]
    return replace(own[0], prediction=np.where(number >= 0, taken, np.nan)), number


@dataclass(frozen=True, kw_only=True, eq=False)
class CitySplits(Splits):
    """Whole cities held out in turns, but for a few labels of each.

    Attributes:
        part: int64 (N,), the number of the city that each region is of, among the K cities with labels; -1 for none.
        few: bool (R, N), the regions whose labels join the training of the row that their city is held out of.
    """

    part: Array
    few: Array

    def training_labels(self) -> Array:
        """See :meth:`Splits.training_labels`."""
        repetition, held_out = self.rows().T
        return np.where((self.part != held_out[:, None]) | self.few[repetition], self.labels, np.nan)


def transfer(labels: Array, part: Array, *, seeds: Sequence[int], few: int = 0) -> CitySplits:
    """Every city a fold.

    Args:
        labels: float64 (N,), NaN where unknown.
        part: int64 (N,), the number of the city that each region is of.
        few: So many labelled regions of the held-out city, drawn at random, join the training.

    Raises:
        BadData: With fewer than two cities with labels, or no region left to hold out.
    """
    known = ~np.isnan(labels)
    numbers, ranks = np.unique(part[known], return_inverse=True)
    if len(numbers) < 2:
        raise BadData("too few cities with labels to hold one out", expected="at least 2", found=len(numbers))
    if (fewest := int(np.bincount(ranks).min())) <= few:
        raise BadData(
            "a city has too few labelled regions to hold any out", expected=f"more than {few}", found=fewest,
            fix="lower --labels, or leave the city out",
        )  # fmt: skip
    rank = np.full(len(labels), -1)
    rank[known] = ranks
    drawn = np.zeros((len(seeds), len(labels)), bool)
    for r, seed in enumerate(seeds):
        for k in range(len(numbers)):
            drawn[r, np.random.default_rng([seed, k]).permutation(np.flatnonzero(rank == k))[:few]] = True
    fold = np.where(drawn, -1, rank)
    return CitySplits(labels=labels, fold=fold, seeds=tuple(seeds), part=rank, few=drawn)


def honest(labels: Array, *, seeds: Sequence[int], folds: int = FOLDS) -> Splits:
    """KFold(folds, shuffle=True, random_state=seed) over the labelled regions, once per seed.

    With fewer labelled regions than folds, every region is a fold.

    Args:
        labels: float64 (N,), NaN where unknown.

    Raises:
        BadData: With fewer than 3 labelled regions.
    """
    fold = np.stack([fold_of(labels, folds=folds, seed=seed, drop_zeros=False) for seed in seeds])
    return Splits(labels=labels, fold=fold, seeds=tuple(seeds))


def spatial(labels: Array, position: Array, *, seeds: Sequence[int], folds: int = FOLDS) -> Splits:
    """Spatial blocks as folds (Roberts et al., Ecography 2017): k-means on the labelled regions' positions.

    No block is empty; regions at one and the same place are in one block, so that there are never more blocks than
    places.

    Args:
        labels: float64 (N,), NaN where unknown.
        position: (N, 3), :func:`topt_deploy.data.features.local_position_m`.

    Raises:
        BadData: If the labelled regions lie at fewer than 3 places.
    """
    known = ~np.isnan(labels)
    places = len(np.unique(position[known], axis=0))
    if places < 3:
        raise BadData("too few places with a label for spatial blocks", expected="at least 3", found=places)
    fold = np.full((len(seeds), len(labels)), -1)
    for r, seed in enumerate(seeds):
        fold[r, known] = KMeans(min(folds, places), n_init=10, random_state=seed).fit_predict(position[known])
    return Splits(labels=labels, fold=fold, seeds=tuple(seeds))
