import numpy as np
import oracles
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from topt_deploy.model.layers import Dropout, FeedForward, SelfAttention, Standardize

HEADS = (1, 2, 4)
N, WIDTH = 6, 8


def attention_and_input(heads, dropout=0.0):
    torch.manual_seed(heads)
    layer = SelfAttention(width=WIDTH, heads=heads, dropout=dropout)
    nn.init.normal_(layer.qkv.bias)  # starts at zero, and would hide a bias that is lost
    return layer.eval(), torch.randn(N, WIDTH), torch.randn(N, N) * 2


class TestStandardize:
    def test_matches_scikit_learn(self):
        x = np.random.default_rng(0).normal(3, [1, 10, 0.01], (20, 3)).astype(np.float32)
        layer = Standardize(3)
        layer.fit(torch.from_numpy(x))
        expected = StandardScaler().fit_transform(x.astype(np.float64))
        np.testing.assert_allclose(layer(torch.from_numpy(x)), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("value", [0.0, 0.1, 4096.3])
    def test_a_constant_feature_becomes_zero_and_a_new_value_stays_finite(self, value):
        x = torch.full((9, 1), value)
        layer = Standardize(1)
        layer.fit(x)
        assert layer.scale.item() == 1
        assert layer(x).abs().max() < 1e-3
        assert layer(x + 2).max() < 2.001

    def test_starts_as_the_identity(self):
        x = torch.randn(4, 3)
        torch.testing.assert_close(Standardize(3)(x), x, rtol=0, atol=0)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("heads", HEADS)
class TestSelfAttention:
    def test_matches_a_loop(self, heads, biased):
        layer, x, bias = attention_and_input(heads)
        out, weights = layer(x, bias if biased else None, read=nn.Identity())
        expected, expected_weights = oracles.self_attention(
            oracles.array(x), layer, oracles.array(bias) if biased else None
        )
        np.testing.assert_allclose(out.detach(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weights.detach(), expected_weights, rtol=1e-4, atol=1e-6)

    def test_matches_torch_multihead_attention(self, heads, biased):
        layer, x, bias = attention_and_input(heads)
        reference = nn.MultiheadAttention(WIDTH, heads, batch_first=True)
        with torch.no_grad():
            reference.in_proj_weight.copy_(layer.qkv.weight)
            reference.in_proj_bias.copy_(layer.qkv.bias)
            reference.out_proj.load_state_dict(layer.out.state_dict())
            expected, expected_weights = reference(x, x, x, attn_mask=bias if biased else None)
            out, weights = layer(x, bias if biased else None, read=nn.Identity())
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)

    def test_matches_scaled_dot_product_attention(self, heads, biased):
        layer, x, bias = attention_and_input(heads)
        q, k, v = (part.reshape(N, heads, -1).transpose(0, 1) for part in layer.qkv(x).chunk(3, dim=1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias if biased else None)
        out, _ = layer(x, bias if biased else None)
        torch.testing.assert_close(out, layer.out(mixed.transpose(0, 1).reshape(N, WIDTH)))


def test_bias_moves_attention_towards_the_regions_it_favours():
    layer, x, _ = attention_and_input(2)
    bias = torch.zeros(N, N)
    bias[2, 5] = 3.0
    before, after = (layer(x, given, read=nn.Identity())[1] for given in (None, bias))
    assert after[2, 5] > before[2, 5]
    torch.testing.assert_close(after[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])


def test_attention_weights_are_returned_without_dropout():
    layer, x, _ = attention_and_input(2, dropout=0.5)
    expected = layer(x, read=nn.Identity())[1]
    out, weights = layer.train()(x, read=nn.Identity())
    torch.testing.assert_close(weights, expected)
    assert not torch.allclose(out, layer.eval()(x)[0])


def test_feed_forward_matches_a_loop():
    torch.manual_seed(0)
    layer = FeedForward(width=WIDTH, inner=12, dropout=0.3).eval()
    for norm in (layer.norm1, layer.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x, update = torch.randn(N, WIDTH), torch.randn(N, WIDTH)
    expected = oracles.feed_forward(oracles.array(x), oracles.array(update), layer)
    np.testing.assert_allclose(layer(x, update).detach(), expected, rtol=1e-4, atol=1e-5)


def test_feed_forward_and_attention_are_a_post_norm_encoder_layer():
    layer, x, bias = attention_and_input(2)
    rest = FeedForward(width=WIDTH, inner=12, dropout=0.0).eval()
    # In training mode, for the fused path that evaluation takes misreads a float mask.
    reference = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True, norm_first=False).train()
    with torch.no_grad():
        reference.self_attn.in_proj_weight.copy_(layer.qkv.weight)
        reference.self_attn.in_proj_bias.copy_(layer.qkv.bias)
        reference.self_attn.out_proj.load_state_dict(layer.out.state_dict())
        for name in ("linear1", "linear2", "norm1", "norm2"):
            getattr(reference, name).load_state_dict(getattr(rest, name).state_dict())
        expected = reference(x[None], src_mask=bias)[0]
        torch.testing.assert_close(rest(x, layer(x, bias)[0]), expected, rtol=1e-5, atol=1e-5)


class TestDropout:
    def test_drops_at_its_rate_and_keeps_the_mean(self):
        torch.manual_seed(0)
        out = Dropout(0.3)(torch.ones(501, 403))
        assert abs((out == 0).double().mean().item() - 0.3) < 4 * (0.3 * 0.7 / out.numel()) ** 0.5
        torch.testing.assert_close(out[out > 0], torch.full_like(out[out > 0], 1 / 0.7), rtol=1e-4, atol=0)
        assert abs(out.double().mean().item() - 1) < 0.01

    def test_is_nothing_in_evaluation_or_at_rate_zero(self):
        x = torch.randn(5, 3)
        assert Dropout(0.5).eval()(x) is x
        assert Dropout(0.0)(x) is x

    def test_neighbours_are_dropped_independently(self):
        torch.manual_seed(0)
        dropped = (Dropout(0.5)(torch.ones(4000, 64)) == 0).double()
        together = torch.corrcoef(dropped.T).fill_diagonal_(0).abs().amax()
        assert together < 0.1
