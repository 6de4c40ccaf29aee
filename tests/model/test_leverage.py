"""Leverage against its definition, and what it tells apart."""

import numpy as np
import torch

from topt_deploy.data.features import POSITION
from topt_deploy.model.leverage import Leverage

WIDTHS = {"poi": 6, "trips": 4, POSITION: 3}


def city(n=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, width, generator=generator) * 3 + 1 for name, width in WIDTHS.items()}


def test_it_is_the_ridge_leverage_of_the_fitted_regions():
    inputs, fitted = city(), torch.arange(30) % 3 > 0
    found = Leverage.fit(WIDTHS, inputs, fitted)
    x = torch.cat([inputs["poi"], inputs["trips"]], dim=1).double()
    z = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    gram = z[fitted].T @ z[fitted]
    ridge = gram.trace() / 10
    expected = ((z @ torch.linalg.inv(gram + ridge * torch.eye(10))) * z).sum(dim=1)
    np.testing.assert_allclose(found(inputs), expected, rtol=1e-3, atol=1e-4)
    # Left out, a region counts as one that was never fitted.
    left_out = found.left_out(inputs, fitted)
    i = int(fitted.nonzero()[0])
    others = gram - torch.outer(z[i], z[i]) + ridge * torch.eye(10)
    np.testing.assert_allclose(left_out[i], float(z[i] @ torch.linalg.inv(others) @ z[i]), rtol=1e-3)
    np.testing.assert_allclose(left_out[~fitted.numpy()], found(inputs)[~fitted], rtol=1e-5)


def test_fewer_regions_than_features_have_one_too():
    inputs, fitted = city(), torch.arange(30) < 5
    found = Leverage.fit(WIDTHS, inputs, fitted)
    assert found.factor.shape == (10, 5)
    assert (found(inputs)[:5] < 1).all()


def test_a_region_unlike_all_others_stands_out_and_another_place_does_not():
    inputs, fitted = city(), torch.ones(30, dtype=torch.bool)
    found = Leverage.fit(WIDTHS, inputs, fitted)
    odd = {name: x[:1].clone() for name, x in inputs.items()}
    elsewhere = odd | {POSITION: odd[POSITION] + 1e6}
    torch.testing.assert_close(found(elsewhere), found(odd))
    odd["poi"] = odd["poi"] + 100
    assert float(found(odd)) > 3 * float(found(inputs).max())
