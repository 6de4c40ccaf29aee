from dataclasses import replace

import numpy as np
import pytest
from sklearn.model_selection import KFold

from topt_deploy.errors import BadData
from topt_deploy.train.evaluation.splits import HeldOut, Splits, chosen_by_other_folds, honest, spatial

LABELS = np.random.default_rng(0).poisson(30, 23).astype(float)
LABELS[[2, 7, 11]] = np.nan
KNOWN = np.flatnonzero(~np.isnan(LABELS))
POSITION = np.random.default_rng(1).normal(scale=5000, size=(23, 3))


def both(seeds=(4, 9), folds=5):
    return [honest(LABELS, seeds=seeds, folds=folds), spatial(LABELS, POSITION, seeds=seeds, folds=folds)]


@pytest.mark.parametrize("splits", both(), ids=["honest", "spatial"])
class TestBoth:
    def test_each_labelled_region_is_held_out_once_per_repetition(self, splits):
        assert splits.fold.shape == (2, 23)
        for fold in splits.fold:
            assert np.flatnonzero(fold >= 0).tolist() == KNOWN.tolist()
            assert np.unique(fold[KNOWN]).tolist() == [0, 1, 2, 3, 4]
        assert (splits.fold[0] != splits.fold[1]).any()

    def test_a_training_set_has_every_label_but_those_held_out(self, splits):
        rows, training = splits.rows(), splits.training_labels()
        assert training.shape == (10, 23)
        assert rows.tolist() == [[r, k] for r in range(2) for k in range(5)]
        assert splits.row_seeds() == [4] * 5 + [9] * 5
        for (r, k), row in zip(rows, training, strict=True):
            for n in range(23):
                if splits.fold[r, n] in (-1, k):
                    assert np.isnan(row[n])
                else:
                    assert row[n] == LABELS[n]

    def test_each_region_is_read_from_the_training_set_that_it_was_held_out_of(self, splits):
        predictions = np.arange(10.0)[:, None] * 100 + np.arange(23)
        own = splits.held_out(predictions)
        for r in range(2):
            for n in range(23):
                if n in KNOWN:
                    assert own[r, n] == (5 * r + splits.fold[r, n]) * 100 + n
                else:
                    assert np.isnan(own[r, n])

    @pytest.mark.parametrize("shape", [(9, 23), (10, 22), (10,)])
    def test_predictions_of_another_shape_are_a_bug(self, splits, shape):
        with pytest.raises(ValueError, match=r"\(10, 23\)"):
            splits.held_out(np.ones(shape))

    @pytest.mark.parametrize("value", [np.nan, -1e-9])
    def test_predictions_that_are_no_counts_are_a_bug(self, splits, value):
        predictions = np.ones((10, 23))
        predictions[3, 5] = value
        with pytest.raises(ValueError, match="must be counts"):
            splits.held_out(predictions)

    def test_the_same_seeds_give_the_same_folds(self, splits):
        (again,) = [s for s in both() if (s.fold == splits.fold).all()]
        assert again is not splits


def test_honest_folds_are_scikit_learns():
    splits = honest(LABELS, seeds=(3,))
    for k, (_, held_out) in enumerate(KFold(10, shuffle=True, random_state=3).split(KNOWN)):
        assert np.flatnonzero(splits.fold[0] == k).tolist() == KNOWN[held_out].tolist()


def test_a_block_is_the_regions_nearest_to_its_centre():
    fold = spatial(LABELS, POSITION, seeds=(0,), folds=4).fold[0]
    centres = np.stack([POSITION[fold == k].mean(axis=0) for k in range(4)])
    for n in KNOWN:
        assert np.argmin(np.linalg.norm(centres - POSITION[n], axis=1)) == fold[n]


def test_repetitions_may_have_different_numbers_of_folds():
    fold = np.array([[0, 1, 2, 0], [0, 0, 1, 1]])
    splits = Splits(labels=np.arange(4.0), fold=fold, seeds=(0, 1))
    assert splits.rows().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    own = splits.held_out(np.repeat(np.arange(5.0)[:, None], 4, axis=1))
    assert own.tolist() == [[0, 1, 2, 0], [3, 3, 4, 4]]


def test_fewer_regions_than_folds_are_a_fold_each():
    labels = np.array([1.0, np.nan, 3.0, 4.0, 5.0])
    for splits in (honest(labels, seeds=(0,)), spatial(labels, POSITION[:5], seeds=(0,))):
        assert sorted(splits.fold[0]) == [-1, 0, 1, 2, 3]


def test_regions_at_one_place_share_a_block():
    position = np.repeat(POSITION[:4], 3, axis=0)
    fold = spatial(np.ones(12), position, seeds=(0,)).fold[0]
    assert len(set(fold)) == 4
    assert (fold.reshape(4, 3) == fold.reshape(4, 3)[:, :1]).all()


def test_too_few_labels_or_places_are_refused():
    with pytest.raises(BadData, match="at least 3"):
        honest(np.array([1.0, 2.0, np.nan, np.nan]), seeds=(0,))
    with pytest.raises(BadData, match="at least 3"):
        spatial(np.ones(6), np.repeat(POSITION[:2], 3, axis=0), seeds=(0,))


def test_a_choice_among_methods_does_not_see_the_fold_it_is_held_against():
    """Six regions, three folds. The first method is the best of all by hindsight, for it is right about fold 0."""
    labels = np.array([10.0, 10, 20, 20, 30, 30])
    fold = np.array([[0, 0, 1, 1, 2, -1]])
    predictions = {"a": [10, 10, 29, 29, 39, 0], "b": [50, 50, 22, 22, 32, 0]}
    candidates = {
        name: HeldOut(labels=labels, fold=fold, prediction=np.array([p], float)) for name, p in predictions.items()
    }
    chosen, number = chosen_by_other_folds(candidates)
    # Fold 0: b has errors 2, 2, 2 elsewhere, a 9, 9, 9. Folds 1 and 2: a has 0, 0, 9 elsewhere, b 40, 40, 2.
    np.testing.assert_array_equal(number, [[1, 1, 0, 0, 0, -1]])
    np.testing.assert_array_equal(chosen.prediction, [[50, 50, 29, 29, 39, np.nan]])
    changed = {n: replace(c, prediction=np.where(fold == 0, 1e6, c.prediction)) for n, c in candidates.items()}
    assert (chosen_by_other_folds(changed)[1][fold == 0] == 1).all(), "fold 0 chooses for itself by the others alone"


def test_a_choice_is_made_in_every_repetition_and_among_more_than_32_methods():
    rng = np.random.default_rng(0)
    labels = rng.gamma(2, 50, 30)
    splits = honest(labels, seeds=(0, 1), folds=5)
    candidates = {
        str(m): HeldOut(labels=labels, fold=splits.fold, prediction=labels + rng.normal(0, 1 + m % 7, (2, 30)))
        for m in range(40)
    }
    chosen, number = chosen_by_other_folds(candidates)
    for r in range(2):
        for i in range(30):
            others = splits.fold[r] != splits.fold[r, i]
            errors = [np.abs(c.prediction[r] - labels)[others].mean() for c in candidates.values()]
            assert number[r, i] == np.argmin(errors)
            assert chosen.prediction[r, i] == candidates[str(number[r, i])].prediction[r, i]
