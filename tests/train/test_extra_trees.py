"""The trees of the model against scikit-learn's, on the same side of every threshold."""

import numpy as np
import pytest
import torch
from builders import task_config
from sklearn.ensemble import ExtraTreesRegressor

from topt_deploy.train.extra_trees import fit_trees


def problem(n=60, features=5, rows=3, seed=0):
    """Features with ties (N, F), targets and training sets (S, N)."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.integers(0, 4, (n, 2)), rng.normal(size=(n, features - 2)) * 1e3], axis=1)
    targets = np.sin(x[:, 0]) + x[:, 2] / 1e3 + rng.normal(size=(rows, n)) / 10
    known = rng.random((rows, n)) < 0.8
    return torch.tensor(x, dtype=torch.float32), torch.tensor(targets), torch.tensor(known)


@pytest.mark.parametrize("depth", [1, 3, 9])
@pytest.mark.parametrize("kept", [slice(0, 3), slice(2, 3)], ids=["all", "the last"])
def test_they_say_what_scikit_learns_say(depth, kept):
    x, targets, known = problem()
    settings = task_config(ensemble={"enabled": True, "trees": 7, "tree_depth": depth}).ensemble
    model, predicted = fit_trees(x, targets, known, settings, seed=5, kept=kept)
    other = problem(n=500, seed=1)[0]
    for s in range(3):
        own = known[s].numpy()
        forest = ExtraTreesRegressor(7, max_depth=depth, random_state=5)
        forest.fit(x.numpy()[own], targets.numpy()[s][own])
        np.testing.assert_allclose(predicted[s], forest.predict(x.numpy()))
        if s in range(3)[kept]:
            found = model(other)[s - kept.start]
            np.testing.assert_allclose(found, forest.predict(other.numpy()), rtol=1e-5, atol=1e-6)
    assert model(other).shape == (kept.stop - kept.start, 500)


def test_a_feature_at_a_threshold_goes_to_the_left():
    """Of 0 and 1, cut anywhere between: whoever lies at the very threshold is with the smaller."""
    x, known = torch.tensor([[0.0], [1.0]]), torch.ones(1, 2, dtype=torch.bool)
    settings = task_config(ensemble={"enabled": True, "trees": 9, "tree_depth": 1}).ensemble
    model, _ = fit_trees(x, torch.tensor([[-1.0, 1.0]]), known, settings, seed=0, kept=slice(0, 1))
    for t, threshold in enumerate(model.threshold[0, :, 0]):
        above = torch.nextafter(threshold, torch.tensor(2.0))
        at = model(torch.stack([threshold, above])[:, None])
        other = np.mean([1.0 if threshold > own else -1.0 for own in np.delete(model.threshold[0, :, 0].numpy(), t)])
        np.testing.assert_allclose(at[0, 0], (8 * other - 1) / 9, atol=1e-6)
        np.testing.assert_allclose(at[0, 1], (8 * other + 1) / 9, atol=1e-6)


def test_a_training_set_of_one_label_says_it():
    x, targets, known = problem(rows=1)
    known[:] = False
    known[0, 4] = True
    settings = task_config(ensemble={"enabled": True, "trees": 2, "tree_depth": 4}).ensemble
    model, predicted = fit_trees(x, targets, known, settings, seed=0, kept=slice(0, 1))
    np.testing.assert_allclose(predicted, np.full((1, 60), targets[0, 4]))
    np.testing.assert_allclose(model(x), predicted, rtol=1e-6)
