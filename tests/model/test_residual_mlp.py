"""The ensemble's network against loops over its members."""

import numpy as np
import pytest
import torch
from oracles import array, member_linear

from topt_deploy.config.settings import EnsembleConfig
from topt_deploy.model.residual_mlp import SKIP_SCALE, ResidualMlp

N, F, M = 11, 6, 3


def network(seed=0, members=M, **settings):
    torch.manual_seed(seed)
    made = ResidualMlp(members=members, inputs=F, config=EnsembleConfig(**{"width": 5, "layers": 2, **settings}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    made.standardize.fit(values(40, seed=1))
    return made


def values(n=N, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(3, [1, 20, 0.1, 5, 2, 1], (n, F))).float()


def by_loop(x, module, member):
    """h = relu(W₀x), h + relu(W h) as often as there are layers, and a linear map of h and of x."""
    x = (array(x) - array(module.standardize.mean)) / array(module.standardize.scale)
    h = np.maximum(member_linear(x, module.first, member), 0)
    for layer in module.layers:
        h = h + np.maximum(member_linear(h, layer, member), 0)
    return (member_linear(h, module.out, member) + member_linear(x, module.skip, member))[:, 0]


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("members", [1, 4])
def test_every_member_is_the_loops(layers, members):
    module, x = network(layers=layers, members=members).eval(), values()
    found = module(x)
    assert found.shape == (members, N)
    for member in range(members):
        np.testing.assert_allclose(found[member].detach(), by_loop(x, module, member), rtol=1e-4, atol=1e-5)
    assert members == 1 or found.std(dim=0).min() > 0.01


def test_the_direct_path_starts_small():
    module = ResidualMlp(members=50, inputs=F, config=EnsembleConfig(width=20))
    largest = module.skip.weight.abs().max().item()
    assert 0.9 * SKIP_SCALE / F**0.5 < largest <= SKIP_SCALE / F**0.5


@pytest.mark.parametrize("n", [1, 2, 200])
def test_a_region_is_predicted_from_its_own_row(n):
    module, x = network().eval(), values(n)
    out = module(x)
    assert out.shape == (M, n)
    torch.testing.assert_close(module(x[-1:])[:, 0], out[:, -1], rtol=1e-5, atol=1e-5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x[order]), out[:, order], rtol=1e-5, atol=1e-5)


def test_no_member_reaches_another():
    module = network(input_dropout=0.0, dropout=0.0).train()
    module(values())[1].sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad[[0, 2]] == 0).all(), name
        assert (parameter.grad[1] != 0).any(), name


class TestDropout:
    def test_is_off_in_evaluation(self):
        module = network(input_dropout=0.5, dropout=0.5).eval()
        assert torch.equal(module(values()), module(values()))
        without = network(input_dropout=0.0, dropout=0.0).train()
        torch.testing.assert_close(without(values()), module(values()))

    @pytest.mark.parametrize("rates", [(0.5, 0.0), (0.0, 0.5)], ids=["inputs", "hidden"])
    def test_each_member_draws_its_own_in_training(self, rates):
        module = network(input_dropout=rates[0], dropout=rates[1]).train()
        with torch.no_grad():  # members that differ in nothing else
            for parameter in module.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter).clone())
        out = module(values())
        assert not torch.equal(out, module(values()))
        assert (out.std(dim=0) > 0).float().mean() > 0.8

    def test_dropped_features_take_the_direct_path_with_them(self):
        """All hidden paths shut: what is left is a sum over the kept features, each doubled."""
        module = network(input_dropout=0.5).train()
        with torch.no_grad():
            module.out.weight.zero_()
            module.out.bias.zero_()
            module.skip.bias.zero_()
        x = values()
        terms = 2 * module.skip.weight[..., 0][:, None] * module.standardize(x)  # (M, N, F)
        masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * F)
        possible = torch.einsum("mnf,kf->mnk", terms, masks)
        out = module(x).detach()
        assert ((possible - out[..., None]).abs().amin(dim=2) < 1e-4).all()
        assert ((terms.sum(dim=2) - out).abs() > 1e-3).float().mean() > 0.8
