import math

import numpy as np
import pytest
import torch
from scipy import stats

from topt_deploy.config.settings import TargetConfig
from topt_deploy.model.target import BEYOND, MAX_LOG, Target

COUNTS = torch.tensor([0.0, 1.0, 3.0, 8.0, 25.0, 400.0, 0.0, 12.0], dtype=torch.float64)
WEIGHTS = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0]]).float()
TRANSFORMS = {"none": lambda y: y, "sqrt": np.sqrt, "cbrt": np.cbrt, "log1p": np.log1p}


def target(transform="none", likelihood="gaussian", members=3, extrapolate=True):
    config = TargetConfig(transform=transform, likelihood=likelihood, extrapolate=extrapolate)
    return Target(members=members, config=config)


class TestBounds:
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_predictions_stay_within_what_each_members_labels_support(self, transform):
        layer = target(transform, extrapolate=False)
        layer.fit(COUNTS, WEIGHTS)
        low, high = (layer.counts(torch.full((3, 1), end)).numpy()[:, 0] for end in (-1e6, 1e6))
        for member, weights in enumerate(WEIGHTS.numpy()):
            own = TRANSFORMS[transform](COUNTS.numpy()[weights > 0])
            ends = own.min() - BEYOND * own.std(), own.max() + BEYOND * own.std()
            expected = [layer_inverse(transform, max(end, 0)) for end in ends]
            np.testing.assert_allclose([low[member], high[member]], expected, rtol=1e-4, atol=1e-4)

    def test_labels_of_others_move_no_bound(self):
        first, second = target(extrapolate=False), target(extrapolate=False)
        first.fit(COUNTS, WEIGHTS)
        second.fit(torch.where(WEIGHTS[1] > 0, COUNTS, 1e6), WEIGHTS)
        assert torch.equal(first.high[1], second.high[1])
        assert first.high[0] != second.high[0]

    def test_there_are_none_where_the_settings_say_so(self):
        layer = target()
        layer.fit(COUNTS, WEIGHTS)
        output = torch.tensor([[1e6]]).expand(3, 1)
        assert torch.equal(layer.bounded(output), output)


def layer_inverse(transform, value):
    """The count of a value on the transformed scale."""
    return {"none": value, "sqrt": value**2, "cbrt": value**3, "log1p": np.expm1(value)}[transform]


class TestGaussian:
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_round_trip(self, transform):
        layer = target(transform)
        scaled = layer.fit(COUNTS, WEIGHTS)
        assert scaled.shape == (3, len(COUNTS))
        np.testing.assert_allclose(layer.counts(scaled.float()).numpy(), COUNTS.expand(3, -1), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_is_standardised_over_each_members_own_training_regions(self, transform):
        layer = target(transform)
        scaled = layer.fit(COUNTS, WEIGHTS).numpy()
        for member, weights in enumerate(WEIGHTS.numpy()):
            own = TRANSFORMS[transform](COUNTS.numpy()[weights == 1])
            expected = (TRANSFORMS[transform](COUNTS.numpy()) - own.mean()) / own.std()
            np.testing.assert_allclose(scaled[member], expected, rtol=1e-5, atol=1e-6)

    def test_other_members_regions_do_not_reach_a_member(self):
        poisoned = COUNTS.clone()
        poisoned[1] = 1e9
        clean, changed = target("sqrt"), target("sqrt")
        clean.fit(COUNTS, WEIGHTS)
        changed.fit(poisoned, WEIGHTS)
        assert torch.equal(clean.mean[1], changed.mean[1])
        assert torch.equal(clean.scale[1], changed.scale[1])
        assert not torch.equal(clean.mean[0], changed.mean[0])

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_predictions_are_never_negative_and_finite(self, transform):
        layer = target(transform)
        layer.fit(COUNTS, WEIGHTS)
        counts = layer.counts(torch.linspace(-1e4, 1e4, 9).expand(3, -1))
        assert (counts >= 0).all()
        assert torch.isfinite(counts).all()
        assert (counts[:, 0] == 0).all()

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_loss_is_the_mean_squared_error_over_training_regions(self, transform):
        layer = target(transform)
        scaled = layer.fit(COUNTS, WEIGHTS).numpy()
        output = torch.randn(3, len(COUNTS), generator=torch.Generator().manual_seed(0))
        loss = layer.loss(output, COUNTS, WEIGHTS)
        for member, weights in enumerate(WEIGHTS.numpy()):
            chosen = weights == 1
            expected = np.square(output[member].numpy() - scaled[member])[chosen].mean()
            assert loss[member].item() == pytest.approx(expected, rel=1e-5)

    def test_labels_that_do_not_vary_are_survived(self):
        layer = target()
        scaled = layer.fit(torch.full((8,), 5.0, dtype=torch.float64), WEIGHTS)
        assert torch.isfinite(scaled).all()
        np.testing.assert_allclose(layer.counts(torch.zeros(3, 8)), 5)


class TestLogLink:
    def log_rate(self, layer, output):
        return output.double().numpy() * layer.scale.double().numpy() + layer.mean.double().numpy()

    @pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
    def test_the_output_is_a_standardised_log_rate(self, likelihood):
        layer = target(likelihood=likelihood)
        layer.fit(COUNTS, WEIGHTS)
        output = torch.randn(3, len(COUNTS), generator=torch.Generator().manual_seed(1))
        np.testing.assert_allclose(layer.counts(output), np.exp(self.log_rate(layer, output)), rtol=1e-5)
        own = np.log1p(COUNTS.numpy())
        assert layer.mean[0].item() == pytest.approx(own.mean())
        assert layer.scale[0].item() == pytest.approx(own.std())

    def test_poisson_loss_is_the_log_likelihood_up_to_a_constant_and_a_unit(self):
        layer = target(likelihood="poisson")
        layer.fit(COUNTS, WEIGHTS)
        generator = torch.Generator().manual_seed(2)
        a, b = (torch.randn(3, len(COUNTS), generator=generator) for _ in range(2))
        difference = (layer.loss(a, COUNTS, WEIGHTS) - layer.loss(b, COUNTS, WEIGHTS)).numpy()
        y = COUNTS.numpy()
        for member, weights in enumerate(WEIGHTS.numpy()):
            chosen = weights == 1
            unit = max(y[chosen].mean(), 1)
            likelihoods = [
                stats.poisson.logpmf(y, np.exp(self.log_rate(layer, output)[member]))[chosen].mean()
                for output in (a, b)
            ]
            assert difference[member] == pytest.approx((likelihoods[1] - likelihoods[0]) / unit, rel=1e-4)

    @pytest.mark.parametrize("log_dispersion", [-3.0, 0.0, 1.2])
    def test_negative_binomial_loss_is_the_log_likelihood_up_to_a_constant(self, log_dispersion):
        layer = target(likelihood="negative_binomial")
        layer.fit(COUNTS, WEIGHTS)
        with torch.no_grad():
            layer.log_dispersion.fill_(log_dispersion)
        output = torch.randn(3, len(COUNTS), generator=torch.Generator().manual_seed(3))
        loss = layer.loss(output, COUNTS, WEIGHTS)
        y, size = COUNTS.numpy(), math.exp(-log_dispersion)  # variance = rate + rate² / size
        for member, weights in enumerate(WEIGHTS.numpy()):
            chosen = weights == 1
            rate = np.exp(self.log_rate(layer, output)[member])
            likelihood = stats.nbinom.logpmf(y, size, size / (size + rate))
            constant = np.array([math.lgamma(v + 1) for v in y])
            expected = -(likelihood + constant)[chosen].mean()
            assert loss[member].item() == pytest.approx(expected, rel=1e-4)

    def test_the_dispersion_is_learnt(self):
        layer = target(likelihood="negative_binomial")
        layer.fit(COUNTS, WEIGHTS)
        layer.loss(torch.zeros(3, len(COUNTS)), COUNTS, WEIGHTS).sum().backward()
        assert layer.log_dispersion.grad.abs().min() > 0

    @pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
    def test_absurd_outputs_stay_finite(self, likelihood):
        layer = target(likelihood=likelihood)
        layer.fit(COUNTS, WEIGHTS)
        for value in (-1e6, 1e6):
            output = torch.full((3, len(COUNTS)), value)
            assert torch.isfinite(layer.loss(output, COUNTS, WEIGHTS)).all()
            assert layer.counts(output).max() <= math.exp(MAX_LOG) * 1.001


@pytest.mark.parametrize("likelihood", ["gaussian", "poisson", "negative_binomial"])
def test_regions_without_weight_have_no_gradient(likelihood):
    layer = target(likelihood=likelihood)
    layer.fit(COUNTS, WEIGHTS)
    output = torch.zeros(3, len(COUNTS), requires_grad=True)
    layer.loss(output, COUNTS, WEIGHTS).sum().backward()
    assert (output.grad[WEIGHTS == 0] == 0).all()
    assert (output.grad[WEIGHTS == 1] != 0).any()
