from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from builders import PROMPT4RE
from sklearn.linear_model import Ridge
from torch import nn

from topt_deploy.model.prompt4re import (
    ALPHAS,
    Alignment,
    MemberLayerNorm,
    MemberLinear,
    Prompt4Re,
    PromptBasis,
    RidgeFit,
    ridge,
)

M, N, WIDTH, RANK = 3, 6, 8, 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def qwen_like(n=20, width=300):
    """Prompt vectors as Qwen gives them: one direction but for small deviations, in float16."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=width) * 15
    return torch.from_numpy((common + rng.normal(size=(n, width)) * 0.02).astype(np.float16)).float()


def standardised(x):
    x = x.double().numpy()
    std = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(std == 0, np.inf, std)


def unexplained(basis, prompts):
    """The share of the standardised vectors that no linear map of the coordinates gives."""
    coordinates = basis(prompts).double().numpy()
    target = standardised(prompts)
    coordinates = np.concatenate([coordinates, np.ones((len(coordinates), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(coordinates, target, rcond=None)
    return np.square(coordinates @ solution - target).sum() / np.square(target).sum()


class TestPromptBasis:
    @pytest.mark.parametrize("shape", [(20, 7), (20, 300), (3, 50)], ids=["tall", "wide", "few"])
    def test_all_components_give_any_linear_map_of_the_standardised_vectors(self, shape):
        prompts = torch.randn(shape) * torch.rand(shape[1]) * 5 + torch.randn(shape[1])
        basis = PromptBasis.fit(prompts)
        assert basis.basis.shape == (shape[1], min(shape[0] - 1, shape[1]))
        assert unexplained(basis, prompts) < 1e-8

    def test_nearly_parallel_vectors_keep_what_tells_them_apart(self):
        prompts = qwen_like()
        cosine = torch.nn.functional.cosine_similarity(prompts[0], prompts[1], dim=0)
        assert cosine > 0.99999  # the case that was measured on the authors' files
        basis = PromptBasis.fit(prompts)
        assert basis.basis.shape[1] == len(prompts) - 1
        assert unexplained(basis, prompts) < 1e-4
        assert basis(prompts).square().mean() == pytest.approx(1, rel=1e-2)

    def test_what_all_dimensions_share_does_not_hide_the_rest(self):
        shared, rest = torch.randn(20, 1), torch.randn(20, 300)
        prompts = shared * (1 + torch.rand(300)) + 1e-3 * rest
        basis = PromptBasis.fit(prompts)
        assert basis.basis.shape[1] == 19
        assert unexplained(basis, prompts) < 1e-8

    def test_a_new_regions_vector_is_rotated_as_it_was_standardised(self):
        prompts, new = torch.randn(9, 6) + 4, torch.randn(4, 6) + 4
        basis = PromptBasis.fit(prompts)
        mean, std = prompts.double().mean(0), prompts.double().std(0, correction=0)
        # All components kept of a tall matrix: a rotation, which keeps every distance but for one scale.
        expected = torch.pdist((new.double() - mean) / std)
        scale = torch.pdist(basis(new).double()) / expected
        torch.testing.assert_close(scale, scale.mean().expand_as(scale), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("value", [0.0, 3.3, -512.7])
    def test_constant_dimensions_are_harmless(self, value):
        prompts = torch.randn(12, 5)
        padded = torch.cat([torch.full((12, 2), value), prompts], dim=1)
        torch.testing.assert_close(
            PromptBasis.fit(padded)(padded), PromptBasis.fit(prompts)(prompts), rtol=1e-4, atol=1e-5
        )
        basis = PromptBasis.fit(padded)
        assert torch.isfinite(basis.basis).all()
        assert (basis.basis[:2] == 0).all()

    def test_a_constant_dimension_that_moves_at_the_customers_carries_nothing(self):
        padded = torch.cat([torch.full((12, 1), 2.0), torch.randn(12, 5)], dim=1)
        basis = PromptBasis.fit(padded)
        moved = padded.clone()
        moved[:, 0] = 1e4
        torch.testing.assert_close(basis(moved), basis(padded), rtol=0, atol=0)

    def test_prompts_that_are_all_the_same_give_zeros(self):
        prompts = torch.randn(1, 5).expand(8, 5)
        out = PromptBasis.fit(prompts)(prompts)
        assert out.shape == (8, 1)
        assert out.abs().max() == 0

    def test_keeps_the_first_principal_components(self):
        prompts = torch.randn(30, 6) @ torch.randn(6, 6)
        kept = PromptBasis.fit(prompts, components=2)(prompts).double().numpy()
        _, singular, right = np.linalg.svd(standardised(prompts), full_matrices=False)
        expected = standardised(prompts) @ right[:2].T
        for component in range(2):
            correlation = np.corrcoef(kept[:, component], expected[:, component])[0, 1]
            assert abs(correlation) == pytest.approx(1, abs=1e-6)
        ratio = kept.std(axis=0)[0] / kept.std(axis=0)[1]
        assert ratio == pytest.approx(singular[0] / singular[1], rel=1e-4)  # not whitened
        assert np.square(kept).mean() == pytest.approx(1, rel=1e-4)

    def test_asking_for_more_components_than_there_are_keeps_all(self):
        prompts = torch.randn(6, 20)
        assert PromptBasis.fit(prompts, components=64).basis.shape[1] == 5

    def test_signs_do_not_depend_on_the_order_of_regions(self):
        prompts = torch.randn(15, 8)
        order = torch.randperm(15)
        torch.testing.assert_close(
            PromptBasis.fit(prompts[order])(prompts), PromptBasis.fit(prompts)(prompts), rtol=1e-3, atol=1e-4
        )


def test_member_linear_is_m_linear_layers():
    layer = MemberLinear(M, 4, 2)
    nn.init.normal_(layer.bias)
    shared, own = torch.randn(1, N, 4), torch.randn(M, N, 4)
    for x in (shared, own):
        for member in range(M):
            expected = nn.functional.linear(x[member % len(x)], layer.weight[member].T, layer.bias[member, 0])
            torch.testing.assert_close(layer(x)[member], expected)


def test_member_layer_norm_is_m_layer_norms():
    layer = MemberLayerNorm(M, 4)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(M, N, 4) * 5
    for member in range(M):
        expected = nn.functional.layer_norm(x[member], (4,), layer.weight[member, 0], layer.bias[member, 0])
        torch.testing.assert_close(layer(x)[member], expected)


def shaken(module):
    """Every parameter away from its start, so that zeros and ones hide nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return module.eval()


class TestAlignment:
    @pytest.mark.parametrize(("heads", "inner"), [(1, 6), (2, 8), (4, 8)])
    def test_every_member_matches_a_loop(self, heads, inner):
        config = replace(PROMPT4RE, heads=heads)
        layer = shaken(Alignment(members=M, inputs=WIDTH, inner=inner, rank=RANK, config=config))
        embedding, prompts = torch.randn(N, WIDTH), torch.randn(N, RANK)
        out = layer(embedding[None], prompts[None])
        assert out.shape == (M, N, inner)
        for member in range(M):
            expected = oracles.alignment(oracles.array(embedding), oracles.array(prompts), layer, member)
            np.testing.assert_allclose(out[member].detach(), expected, rtol=1e-4, atol=1e-5)

    def test_is_permutation_equivariant(self):
        layer = shaken(Alignment(members=M, inputs=WIDTH, inner=8, rank=RANK, config=PROMPT4RE))
        embedding, prompts, order = torch.randn(1, N, WIDTH), torch.randn(1, N, RANK), torch.randperm(N)
        torch.testing.assert_close(
            layer(embedding[:, order], prompts[:, order]),
            layer(embedding, prompts)[:, order],
            rtol=1e-4,
            atol=1e-5,
        )


def head(prompted=True, members=M, **settings):
    return shaken(
        Prompt4Re(
            members=members,
            inputs=WIDTH,
            width=WIDTH,
            rank=RANK if prompted else 0,
            config=replace(PROMPT4RE, **settings),
        )
    )


def ridge_fit(weight, intercept):
    return RidgeFit(coefficients=weight, intercepts=intercept, alphas=torch.ones(M))


VARIANTS = {
    "paper": {},
    "hidden": {"hidden": 5},
    "own width": {"width": 12, "heads": 4},
    "own widths": {"width": 12, "heads": 4, "value_width": 8, "soft_prompt": 5},
    "own soft prompt, no alignment": {"alignment": False, "soft_prompt": 3},
    "no alignment": {"alignment": False},
    "no alignment, hidden": {"alignment": False, "hidden": 4},
}


class TestPrompt4Re:
    @pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
    def test_every_member_matches_the_equations(self, settings):
        model = head(**settings)
        embedding, prompts = torch.randn(N, WIDTH), torch.randn(N, RANK)
        out = model(embedding, prompts)
        assert out.shape == (M, N)
        for member in range(M):
            expected = oracles.prompt4re(oracles.array(embedding), oracles.array(prompts), model, member)
            np.testing.assert_allclose(out[member].detach(), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("hidden", [0, 5])
    def test_without_prompts_it_is_a_network_on_the_embedding(self, hidden):
        model = head(prompted=False, hidden=hidden)
        embedding = torch.randn(N, WIDTH)
        for member in range(M):
            expected = oracles.prompt4re(oracles.array(embedding), None, model, member)
            np.testing.assert_allclose(model(embedding, None)[member].detach(), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
    def test_members_do_not_talk_to_each_other(self, settings):
        model = head(**settings)
        embedding, prompts = torch.randn(N, WIDTH), torch.randn(N, RANK)
        before = model(embedding, prompts)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert len(parameter) == M, name
                parameter[1] += torch.randn_like(parameter[1])
        after = model(embedding, prompts)
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.equal(before[1], after[1])

    @pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
    def test_gradients_stay_with_their_member(self, settings):
        model = head(**settings)
        model(torch.randn(N, WIDTH), torch.randn(N, RANK))[0].square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad[1:].abs().max() == 0, name

    def test_starts_from_the_ridge_fit(self):
        for hidden in (0, 5):
            model = Prompt4Re(
                members=M, inputs=WIDTH, width=WIDTH, rank=RANK, config=replace(PROMPT4RE, hidden=hidden)
            ).eval()
            weight, intercept = torch.randn(M, WIDTH), torch.randn(M)
            model.start_from_ridge(ridge_fit(weight, intercept), prompts_from_zero=True)
            embedding = torch.randn(N, WIDTH)
            expected = weight @ embedding.T + intercept[:, None]
            torch.testing.assert_close(model(embedding, torch.randn(N, RANK)), expected, rtol=1e-4, atol=1e-5)

    def test_the_papers_start_leaves_the_prompts_part_at_random(self):
        model = Prompt4Re(members=M, inputs=WIDTH, width=WIDTH, rank=RANK, config=PROMPT4RE).eval()
        before = model.linear.weight.clone()
        weight = torch.randn(M, WIDTH)
        model.start_from_ridge(ridge_fit(weight, torch.zeros(M)), prompts_from_zero=False)
        torch.testing.assert_close(model.linear.weight[:, :WIDTH, 0], weight)
        torch.testing.assert_close(model.linear.weight[:, WIDTH:], before[:, WIDTH:], rtol=0, atol=0)
        assert before[:, WIDTH:].abs().min() > 0


def regression(n=40, width=6, noise=2.0):
    """x (N, I), y (M, N) and the regions (M, N) that each member is fitted on."""
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (n, width))
    y = x @ rng.normal(size=(width, M)) + rng.normal(5, noise, (n, M))
    return x, y.T.copy(), (rng.random((M, n)) < 0.7).astype(float)


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("width", [6, 60], ids=["tall", "wide"])
def test_ridge_matches_scikit_learn_member_by_member(alpha, width):
    x, y, weights = regression(width=width)
    fit = ridge(*map(torch.from_numpy, (x, y, weights)), alpha)
    assert fit.alphas.tolist() == [alpha] * M
    for member in range(M):
        chosen = weights[member] == 1
        expected = Ridge(alpha=alpha).fit(x[chosen], y[member, chosen])
        np.testing.assert_allclose(fit.coefficients[member], expected.coef_, rtol=1e-6, atol=1e-8)
        assert fit.intercepts[member].item() == pytest.approx(expected.intercept_, rel=1e-6)


@pytest.mark.parametrize("noise", [0.1, 30.0])
@pytest.mark.parametrize("width", [3, 25])
def test_ridge_chooses_alpha_by_leaving_each_region_out_in_turn(width, noise):
    x, y, weights = regression(n=24, width=width, noise=noise)
    fit = ridge(*map(torch.from_numpy, (x, y, weights)), 0)
    for member in range(M):
        regions = np.flatnonzero(weights[member])
        errors = []
        for alpha in ALPHAS:
            left_out = []
            for region in regions:
                rest = regions[regions != region]
                model = Ridge(alpha=alpha).fit(x[rest], y[member, rest])
                left_out.append((model.predict(x[region][None])[0] - y[member, region]) ** 2)
            errors.append(sum(left_out))
        best = ALPHAS[int(np.argmin(errors))]
        assert fit.alphas[member].item() == pytest.approx(best)
        expected = Ridge(alpha=best).fit(x[regions], y[member, regions])
        np.testing.assert_allclose(fit.coefficients[member], expected.coef_, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("alpha", [0, 1.0])
def test_ridge_does_not_see_the_regions_it_is_not_fitted_on(alpha):
    x, y, weights = regression()
    poisoned = np.where(weights == 1, y, 1e9)
    clean, changed = (ridge(*map(torch.from_numpy, (x, labels, weights)), alpha) for labels in (y, poisoned))
    assert torch.equal(clean.coefficients, changed.coefficients)
    assert torch.equal(clean.intercepts, changed.intercepts)
    assert torch.equal(clean.alphas, changed.alphas)
