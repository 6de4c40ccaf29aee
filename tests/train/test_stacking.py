"""Weights of an ensemble's parts, from inner folds."""

import numpy as np

from topt_deploy.train.stacking import ENOUGH, EQUAL, stack, with_inner


def parts(n, seed=0):
    """Labels of one training set (1, N), and what three parts say of them: the truth, half of it, and noise."""
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(1, n))
    rows = with_inner(labels, folds=3, seed=0)
    truth = np.repeat(labels, len(rows.parents), axis=0)
    return rows, truth, np.stack([truth, 0.5 * truth, rng.normal(size=truth.shape)])


def test_the_part_that_is_right_gets_all_but_the_share_that_is_drawn_to_equal_weights():
    for n in (30, 300):
        rows, truth, outputs = parts(n)
        share = EQUAL / (EQUAL + n)
        weights = stack(outputs[[0, 2]], truth, rows)
        np.testing.assert_allclose(weights, [[share / 2 + 1 - share, share / 2]], atol=1e-6)


def test_too_few_labels_weigh_all_parts_the_same():
    rows, truth, outputs = parts(ENOUGH - 1)
    np.testing.assert_allclose(stack(outputs, truth, rows), 1 / 3)


def test_a_part_that_has_to_earn_its_weight_has_no_share_of_the_equal_ones():
    for n in (30, 300):
        rows, truth, outputs = parts(n)
        share = EQUAL / (EQUAL + n)
        worthless = stack(outputs, truth, rows, earned=[False, False, True])
        np.testing.assert_allclose(worthless, [[share / 2 + 1 - share, share / 2, 0]], atol=1e-6)
        right = stack(outputs, truth, rows, earned=[True, False, False])
        np.testing.assert_allclose(right, [[1 - share, share / 2, share / 2]], atol=1e-6)


def test_without_enough_labels_it_has_none_and_alone_it_has_all():
    rows, truth, outputs = parts(ENOUGH - 1)
    np.testing.assert_allclose(stack(outputs, truth, rows, earned=[False, True, False]), [[0.5, 0, 0.5]])
    np.testing.assert_allclose(stack(outputs[:1], truth, rows, earned=[True]), [[1]])
