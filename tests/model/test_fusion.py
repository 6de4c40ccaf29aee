import math

import numpy as np
import oracles
import pytest
import torch
from builders import SREL
from torch import nn

from topt_deploy.model.fusion import ExternalAttention, IntraViewBlock, ScoreFeature, ViewEncoder, ViewFusion

N, V, WIDTH = 5, 3, SREL.width


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


class TestScoreFeature:
    @pytest.mark.parametrize("n", [1, 2, N])
    def test_matches_a_loop_over_region_channel_and_neighbour(self, n):
        layer = ScoreFeature(width=WIDTH, channels=4)
        nn.init.normal_(layer.scale, std=5.0)
        scores = torch.rand(n, n)
        expected = oracles.score_feature(oracles.array(scores), layer)
        np.testing.assert_allclose(layer(scores).detach(), expected, rtol=1e-4, atol=1e-5)

    def test_pools_over_the_row_not_the_column(self):
        layer = ScoreFeature(width=WIDTH, channels=4)
        scores = torch.rand(N, N)
        changed = scores.clone()
        changed[1] += torch.rand(N)
        moved = (layer(changed) - layer(scores)).abs().amax(dim=1) > 1e-6
        assert moved.tolist() == [False, True, False, False, False]


def test_intra_view_block_matches_its_equations():
    block = IntraViewBlock(SREL).eval()
    x = torch.randn(N, WIDTH)
    mixed, weights = oracles.self_attention(oracles.array(x), block.attention)
    feature = oracles.score_feature(weights, block.score_feature)
    expected = oracles.feed_forward(oracles.array(x), mixed + feature, block.feed_forward)
    np.testing.assert_allclose(block(x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_view_encoder_matches_its_equations():
    encoder = ViewEncoder(features=4, config=SREL).eval()
    x = torch.randn(N, 4) * 3 + 2
    encoder.standardize.fit(x)
    expected = oracles.view_encoder(oracles.array(x), encoder)
    np.testing.assert_allclose(encoder(x).detach(), expected, rtol=1e-4, atol=1e-5)


class TestExternalAttention:
    def test_matches_a_loop(self):
        layer = ExternalAttention(width=WIDTH, memory=4)
        x = torch.randn(N, V, WIDTH) * 2
        expected = oracles.external_attention(oracles.array(x), layer)
        np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-4, atol=1e-5)

    def test_regions_do_not_mix(self):
        layer = ExternalAttention(width=WIDTH, memory=4)
        x = torch.randn(N, V, WIDTH)
        torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]))

    def test_every_output_is_a_convex_mixture_of_the_memory(self):
        layer = ExternalAttention(width=WIDTH, memory=4)
        nn.init.ones_(layer.values.weight)
        torch.testing.assert_close(layer(torch.randn(N, V, WIDTH)), torch.ones(N, V, WIDTH))


class TestViewFusion:
    @pytest.mark.parametrize("views", [1, 2, V])
    def test_matches_loops(self, views):
        fusion = ViewFusion(SREL)
        nn.init.normal_(fusion.score.weight, std=2.0)
        x = torch.randn(N, views, WIDTH) * 2
        expected, expected_weights = oracles.view_fusion(oracles.array(x), fusion)
        out, weights = fusion(x)
        np.testing.assert_allclose(out.detach(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weights.detach(), expected_weights, rtol=1e-4, atol=1e-6)

    def test_view_weights_sum_to_one(self):
        weights = ViewFusion(SREL)(torch.randn(N, V, WIDTH))[1]
        assert weights.shape == (V,)
        assert math.isclose(weights.sum().item(), 1.0, rel_tol=1e-6)

    def test_the_mixture_is_normalised(self):
        fusion = ViewFusion(SREL)
        x = torch.randn(N, V, WIDTH)
        before = fusion(x)[0]
        with torch.no_grad():
            fusion.mix_own.mul_(7)
            fusion.mix_others.mul_(7)
        torch.testing.assert_close(fusion(x)[0], before)


def test_the_score_features_own_backward_is_the_gradient():
    from topt_deploy.model.fusion import _PooledScores

    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(4, dtype=torch.double, generator=generator, requires_grad=True)
    scores = torch.rand(7, 7, dtype=torch.double, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(_PooledScores.apply, (scale, scores))
