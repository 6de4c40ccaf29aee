"""The transform that a training set's labels choose."""

import numpy as np
import pytest
import torch

from topt_deploy.config.settings import TargetConfig
from topt_deploy.train.target_scale import chosen_powers

AUTO = TargetConfig(transform="auto")


def city(n=120, seed=0):
    """Standardised features (N, 3), and counts that are the cube of something linear in them (N,)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    root = np.maximum(4 + x @ [1.0, 0.5, -0.4] + 0.3 * rng.normal(size=n), 0)
    return torch.tensor(x), torch.tensor(root**3)


def powers_of(x, counts, known=None):
    known = torch.ones(1, len(counts), dtype=torch.bool) if known is None else known
    return chosen_powers(x, counts, known, AUTO)[:, 0].tolist()


def test_counts_whose_root_is_linear_keep_the_root():
    assert powers_of(*city()) == [3.0]


def test_counts_are_left_as_they_are_where_zeros_tell_nothing_of_a_region():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(120, 3))
    counts = 40 + x @ [8.0, 4.0, -3.0] + rng.normal(size=120)
    counts[rng.random(120) < 1 / 3] = 0
    assert powers_of(torch.tensor(x), torch.tensor(counts)) == [1.0]


def test_many_zeros_that_the_features_tell_keep_the_root():
    x, counts = city()
    moved = (counts.pow(1 / 3) - 4).clamp(min=0).pow(3)
    assert (moved == 0).double().mean() > 0.4
    assert powers_of(x, moved) == [3.0]


def test_every_training_set_chooses_by_its_own_labels():
    x, counts = city()
    silent = torch.zeros(120, dtype=torch.bool)
    silent[::3] = True
    counts = torch.where(silent, 0.0, counts)
    known = torch.stack([~silent, torch.ones_like(silent)])
    assert powers_of(x, counts, known) == [3.0, 1.0]
    poisoned = torch.where(silent, 1e9, counts)
    assert powers_of(x, poisoned, known)[0] == 3.0


@pytest.mark.parametrize("transform", ["none", "sqrt", "cbrt", "log1p"])
def test_a_transform_that_the_settings_name_is_not_chosen(transform):
    x, counts = city(20)
    assert chosen_powers(x, counts, torch.ones(1, 20, dtype=torch.bool), TargetConfig(transform=transform)) is None
