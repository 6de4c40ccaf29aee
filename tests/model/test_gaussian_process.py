"""Random features against the kernels they stand for; evidence maximisation against scikit-learn and SciPy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from scipy.stats import chi2, kstest, multivariate_normal, norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import StandardScaler
from torch.utils._python_dispatch import TorchDispatchMode

from topt_deploy.config.settings import EnsembleConfig
from topt_deploy.data.features import POSITION
from topt_deploy.model import gaussian_process
from topt_deploy.model.gaussian_process import (
    LOCAL,
    NOISE,
    PRIOR_DEVIATION,
    PROMPT,
    KernelHead,
    ViewKernels,
    log_evidence,
    maximise_evidence,
    orthogonal_frequencies,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def view(n=14, width=3, seed=0):
    """Values of a view (N, F), neither centred nor of unit variance."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(4, rng.uniform(0.5, 30, width), (n, width))).float()


def fitted(x, lengths=(0.7,), linear=False, features=64, seed=0, **more):
    kernels = ViewKernels(x.shape[1], lengths=lengths, linear=linear, features=features, **more)
    kernels.fit(x, generator(seed))
    return kernels


def gram(phi):
    phi = phi.double().numpy()
    return phi @ phi.T


class TestFrequencies:
    @pytest.mark.parametrize(("width", "count"), [(5, 5), (5, 12), (7, 3), (1, 4)])
    def test_are_orthogonal_within_groups_as_wide_as_the_view(self, width, count):
        drawn = orthogonal_frequencies(width, count, generator())
        assert drawn.shape == (width, count)
        for start in range(0, count, width):
            group = drawn[:, start : start + width]
            direction = (group / group.norm(dim=0)).double()
            np.testing.assert_allclose(direction.T @ direction, np.eye(group.shape[1]), atol=1e-6)
        if count > width:
            assert abs(drawn[:, 0] @ drawn[:, width]) > 1e-3, "groups are independent"

    def test_each_is_normal_in_every_direction_up_to_its_sign(self):
        """QR leaves no choice of the sign, and no kernel depends on it."""
        drawn = orthogonal_frequencies(4, 8000, generator()).double().numpy()
        drawn = drawn * np.random.default_rng(0).choice([-1, 1], 8000)
        assert kstest((drawn**2).sum(axis=0)[::4], chi2(4).cdf).pvalue > 0.01
        for direction in ([1, 0, 0, 0], [0.5, -0.5, 0.5, 0.5]):
            assert kstest((direction @ drawn)[::4], norm.cdf).pvalue > 0.01


class TestViewKernels:
    @pytest.mark.parametrize("length", [0.5, 1.5])
    def test_radial_features_approach_the_kernel_as_they_grow_in_number(self, length):
        x = view()
        z = StandardScaler().fit_transform(x.double())
        exact = rbf_kernel(z, gamma=1 / (2 * x.shape[1] * length**2))
        errors = []
        for features in (16, 256, 4096):
            found = gram(fitted(x, (length,), features=features)(x))
            errors.append(np.sqrt(((found - exact) ** 2).mean()))
            np.testing.assert_allclose(np.diag(found), 1, rtol=1e-5)
        assert errors[0] > 2 * errors[1] > 4 * errors[2]
        assert np.abs(found - exact).max() < 0.04
        assert exact.min() < 0.5, "a constant would prove nothing"

    def test_the_linear_kernel_is_exact_and_comes_first(self):
        x = view(width=5)
        z = StandardScaler().fit_transform(x.double())
        kernels = fitted(x, (0.7, 1.5), linear=True, features=16)
        assert kernels.sizes == [5, 32, 32]
        phi = kernels(x)
        assert phi.shape == (14, sum(kernels.sizes))
        np.testing.assert_allclose(gram(phi[:, :5]), z @ z.T / 5, atol=1e-5)
        for part in phi[:, 5:].split(32, dim=1):
            np.testing.assert_allclose(np.diag(gram(part)), 1, rtol=1e-5)

    def test_every_length_is_a_kernel_of_its_own(self):
        x = view()
        phi = fitted(x, (0.5, 3.0), features=4096)(x).split(2 * 4096, dim=1)
        z = StandardScaler().fit_transform(x.double())
        for part, length in zip(phi, (0.5, 3.0), strict=True):
            np.testing.assert_allclose(gram(part), rbf_kernel(z, gamma=1 / (6 * length**2)), atol=0.04)

    def test_the_scale_of_a_view_does_not_matter_and_that_of_prompts_does(self):
        x = view(width=2) / 50
        scaled, shifted = x * torch.tensor([3.0, 100.0]), x + torch.tensor([7.0, -5.0])
        for other in (scaled, shifted):
            np.testing.assert_allclose(gram(fitted(x)(x)), gram(fitted(other)(other)), atol=1e-3)
        plain = {"linear": True, "standardize": False}
        np.testing.assert_allclose(gram(fitted(x, **plain)(x)[:, :2]), gram(x) / 2, atol=1e-6)
        assert not np.allclose(gram(fitted(x, **plain)(x)), gram(fitted(scaled, **plain)(scaled)), atol=0.01)

    def test_another_city_is_seen_in_the_training_citys_statistics(self):
        x, other = view(), view(30, seed=1)
        kernels = fitted(x, linear=True)
        scaler = StandardScaler().fit(x.double())
        np.testing.assert_allclose(
            kernels(other)[:, :3], scaler.transform(other.double()) / math.sqrt(3), rtol=1e-4, atol=1e-5
        )


WIDTHS = {"poi": 4, "trips": 3, "land_use": 2, POSITION: 3, PROMPT: 5}
CONFIG = EnsembleConfig(
    lengths=(3.0, 0.7, 1.5), position_lengths=(0.3, 1.0), not_linear=("land_use", POSITION), features=8
)


def city(n=14, seed=0):
    return {name: view(n, width, seed + number) for number, (name, width) in enumerate(WIDTHS.items())}


def head(seed=5):
    made = KernelHead(WIDTHS, CONFIG)
    made.fit_features(city(), seed)
    return made


class TestKernelHead:
    def test_which_kernels_there_are(self):
        radial = [16, 16, 16]
        assert head().sizes == [4, *radial, 3, *radial, *radial, 16, 16, 5, *radial]
        standardised = {name: kernels.standardize is not None for name, kernels in head().views.items()}
        assert standardised == {name: name != PROMPT for name in WIDTHS}

    def test_regressions_leave_out_the_shortest_lengths_one_by_one(self):
        """Linear kernels and all of the positions' stay; lengths stand in the order that was given."""
        names = []
        for name in WIDTHS:
            names += [] if name in CONFIG.not_linear else [(name, "linear")]
            names += [(name, length) for length in (CONFIG.position_lengths if name == POSITION else CONFIG.lengths)]
        regressions = head().regressions()
        assert list(regressions) == ["kernels from 0.7", "kernels from 1.5", "kernels from 3"]
        found = [[names[q] for q in kernels] for kernels in regressions.values()]
        assert found[0] == names
        assert found[1] == [(view, q) for view, q in names if q != 0.7]
        assert found[2] == [(view, q) for view, q in names if q not in (0.7, 1.5)]
        assert len(found) == 3
        radial = KernelHead(WIDTHS, replace(CONFIG, kernel=False, radial=True)).regressions()["radial kernels"]
        assert [names[q] for q in radial] == [(v, q) for v, q in names if q != "linear" or v == PROMPT]

    def test_the_same_seed_gives_the_same_features_whatever_was_drawn_before(self):
        first, state = head(), torch.random.get_rng_state()
        torch.rand(11)
        again = head()
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in first.state_dict().items())
        torch.random.set_rng_state(state)
        assert not torch.equal(head(6).views["poi"].frequencies, first.views["poi"].frequencies)

    def test_no_two_views_share_their_frequencies(self):
        views = head().views
        assert not torch.equal(views["trips"].frequencies, views[POSITION].frequencies[:, :24])

    @pytest.mark.parametrize("n", [1, 2, 33])
    def test_is_a_linear_map_that_sees_a_regions_own_row_alone(self, n):
        made, inputs = head(), city(n, seed=9)
        with torch.no_grad():
            made.coefficients.normal_(generator=generator(1))
        out = made(inputs)
        assert out.shape == (1, 3, n)
        expected = torch.einsum("nk,rpk->rpn", made.features(inputs).double(), made.coefficients.double())
        np.testing.assert_allclose(out, expected, atol=1e-4)
        alone = made({name: x[-1:] for name, x in inputs.items()})
        torch.testing.assert_close(alone[..., 0], out[..., -1], rtol=1e-5, atol=1e-5)

    def test_cosines_and_sines_are_never_side_by_side(self):
        """Of a large city they are most of what a prediction holds in memory."""

        class Watch(TorchDispatchMode):
            widest = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and out.dim() == 2 and len(out) == 50:
                    self.widest = max(self.widest, out.shape[1])
                return out

        made = head()
        with Watch() as watch:
            made(city(50))
        assert watch.widest == sum(made.views[view].frequencies.shape[1] for view in made.views)

    def test_a_feature_counts_no_further_than_the_limit(self):
        made = KernelHead(WIDTHS, replace(CONFIG, clip=2.0))
        made.fit_features(city(), 5)
        with torch.no_grad():
            made.coefficients.normal_(generator=generator(1))
        near, far = (city(n=1, seed=9) | {"poi": torch.full((1, 4), value)} for value in (1e3, 1e6))
        torch.testing.assert_close(made(near), made(far))


SIZES = [3, 16, 8]


def regression(n=20, rows=4, seed=0, sizes=SIZES):
    """Features (N, ΣK), targets (S, N) that the first kernel explains, and which of them each row knows."""
    rng = np.random.default_rng(seed)
    phi = torch.from_numpy(rng.normal(size=(n, sum(sizes))) / np.sqrt(np.repeat(sizes, sizes)))
    targets = phi[:, : sizes[0]] @ torch.from_numpy(rng.normal(size=(sizes[0], rows))) * 1.5
    targets = (targets + 0.3 * torch.from_numpy(rng.normal(size=(n, rows)))).T
    known = torch.from_numpy(rng.random((rows, n)) < np.linspace(0.4, 1, rows)[:, None])
    return phi, targets, known


def solve(problem, steps=40, sizes=SIZES):
    phi, targets, known = problem
    return maximise_evidence(phi, sizes, targets, known, steps=steps)


def objective(problem, row, weights, noise):
    """Log evidence by SciPy, and with the prior on the logarithms, for a training set."""
    phi, targets, known = (x.numpy() for x in problem)
    phi, y = phi[known[row]], targets[row][known[row]]
    parts = np.split(phi, np.cumsum(SIZES)[:-1], axis=1)
    covariance = sum(w * part @ part.T for w, part in zip(weights, parts, strict=True)) + noise * np.eye(len(y))
    evidence = multivariate_normal(cov=covariance).logpdf(y)
    logs = np.log([*weights, noise])
    start = np.log([*np.full(len(SIZES), 1 / len(SIZES)), NOISE])
    return evidence, evidence - 0.5 * (((logs - start) / PRIOR_DEVIATION) ** 2).sum()


class TestEvidence:
    def test_the_fit_is_scikit_learns_for_the_weights_that_were_found(self):
        problem = phi, targets, known = regression()
        found = solve(problem)
        for row in range(len(targets)):
            x = (phi * found.weights[row].sqrt().repeat_interleave(torch.tensor(SIZES))).numpy()
            y, m, noise = targets[row].numpy(), known[row].numpy(), float(found.noise[row])
            linear = DotProduct(sigma_0=0, sigma_0_bounds="fixed")
            process = GaussianProcessRegressor(linear, alpha=noise, optimizer=None).fit(x[m], y[m])
            ridge = KernelRidge(alpha=noise, kernel="precomputed").fit(x[m] @ x[m].T, y[m])
            predicted = phi @ found.coefficients[row]
            np.testing.assert_allclose(predicted, process.predict(x), rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(predicted, ridge.predict(x @ x[m].T), rtol=1e-7, atol=1e-9)
            evidence, _ = objective(problem, row, found.weights[row].numpy(), noise)
            assert process.log_marginal_likelihood_value_ == pytest.approx(evidence), "the two references agree"

    def test_without_a_step_it_starts_from_equal_weights(self):
        found = solve(regression(), steps=0)
        np.testing.assert_allclose(found.weights, np.full((4, 3), 1 / 3))
        np.testing.assert_allclose(found.noise, np.full(4, NOISE))

    def test_grows_with_the_steps_by_scipys_count(self):
        problem = regression()
        reached = []
        for steps in (0, 5, 20, 80):
            found = solve(problem, steps)
            weights, noise = found.weights.numpy(), found.noise.numpy()
            reached.append([objective(problem, row, weights[row], noise[row]) for row in range(4)])
        evidence, penalised = np.moveaxis(reached, 2, 0)  # each (steps, S)
        assert (np.diff(evidence, axis=0) > 0).all()
        assert (np.diff(penalised, axis=0) > 0).all()

    def test_its_gradient_is_scipys_difference_of_evidences(self):
        problem = phi, targets, known = regression()
        kernels = torch.stack([(part @ part.T).flatten() for part in phi.split(SIZES, dim=1)])
        logs = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 4)))
        evidence, gradient = log_evidence(logs, kernels, torch.where(known, targets, 0.0), known.double())
        count = known.sum(dim=1).numpy()
        for row in range(4):

            def by_scipy(at, row=row):
                return objective(problem, row, np.exp(at[:3]), np.exp(at[3]))[0]

            at = logs[row].numpy()
            constant = -0.5 * count[row] * np.log(2 * np.pi)
            assert float(evidence[row]) + constant == pytest.approx(by_scipy(at), rel=1e-10)
            np.testing.assert_allclose(gradient[row], approx_fprime(at, by_scipy, 1e-6), rtol=1e-4, atol=1e-4)

    def test_ends_where_scipys_count_is_flat(self):
        """What is maximised is the evidence with its prior, and not something near it."""
        problem = regression()
        for steps, flat in ((0, False), (1500, True)):
            found = solve(problem, steps)
            for row in range(4):
                at = np.log([*found.weights[row].numpy(), float(found.noise[row])])
                slopes = []
                for i, step in enumerate(np.eye(len(at)) * 1e-5):
                    up, down = (objective(problem, row, *_split(np.exp(at + s)))[1] for s in (step, -step))
                    slopes.append((up - down) / 2e-5)
                    assert abs(slopes[i]) < 0.02 or not flat
                assert flat or max(map(abs, slopes)) > 0.5

    def test_finds_which_kernel_explains_the_targets(self):
        weights = solve(regression(n=60), steps=200).weights
        assert (weights[:, 0] > 5 * weights[:, 1]).all()
        assert (weights[:, 0] > 5 * weights[:, 2]).all()

    def test_a_training_set_alone_gets_what_it_gets_among_others(self):
        phi, targets, known = regression()
        together = solve((phi, targets, known))
        for row in range(len(targets)):
            alone = solve((phi, targets[row : row + 1], known[row : row + 1]))
            for name in ("coefficients", "weights", "noise"):
                torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[row], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("at_once", [1, 3])
    def test_training_sets_in_turns_get_the_same(self, at_once, monkeypatch):
        problem = regression()
        together = solve(problem)
        monkeypatch.setattr(gaussian_process, "BATCH", at_once * 20 * 20)
        in_turns = solve(problem)
        assert in_turns.coefficients.shape == (4, sum(SIZES))
        torch.testing.assert_close(in_turns.coefficients, together.coefficients, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("poison", [math.nan, 1e30])
    def test_what_a_training_set_does_not_hold_cannot_reach_it(self, poison):
        phi, targets, known = regression()
        clean = solve((phi, targets, known))
        poisoned = solve((phi, torch.where(known, targets, poison), known))
        assert torch.equal(poisoned.coefficients, clean.coefficients)
        # Nor do the features of regions that are not in it.
        row = 0
        other = torch.where(known[row, :, None], phi, phi + 3)
        moved = solve((other, targets[:1], known[:1]))
        torch.testing.assert_close(moved.coefficients[0], clean.coefficients[row], rtol=1e-9, atol=1e-12)

    def test_many_regions_that_no_label_is_known_of_change_nothing(self):
        phi, targets, known = regression()
        torch.manual_seed(5)
        more = torch.randn(60, phi.shape[1], dtype=phi.dtype)
        pad = torch.nn.functional.pad
        found = solve((torch.cat([phi, more]), pad(targets, (0, 60)), pad(known, (0, 60))))
        expected = solve((phi, targets, known))
        for name in ("coefficients", "weights", "noise"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)

    def test_a_part_of_a_training_set_takes_its_kernels_weights(self):
        phi, targets, known = regression()
        part = known[:1] & (torch.arange(20) % 3 != 0)
        found = maximise_evidence(
            phi, SIZES, torch.cat([targets, targets[:1]]), torch.cat([known, part]), steps=40, like=[0, 1, 2, 3, 0]
        )
        own = solve((phi, targets, known))
        torch.testing.assert_close(found.coefficients[:4], own.coefficients)
        torch.testing.assert_close(found.weights[4], own.weights[0])
        assert (found.coefficients[4] != own.coefficients[0]).any()

    def test_targets_that_do_not_vary_are_fitted_too(self):
        phi, targets, known = regression()
        found = solve((phi, torch.zeros_like(targets), known))
        assert (found.coefficients == 0).all()
        assert torch.isfinite(found.weights).all()


class TestLocal:
    def test_a_field_that_changes_from_region_to_region_takes_them_and_noise_does_not(self):
        rng = np.random.default_rng(0)
        places = rng.uniform(-1.7, 1.7, size=(150, 2))
        smooth, field = rng.normal(size=(150, 4)), rbf_kernel(places, gamma=1 / (2 * 0.15**2))
        drawn = torch.tensor(np.linalg.cholesky(field + 1e-6 * np.eye(150)) @ rng.normal(size=150))
        noise = torch.tensor(rng.normal(size=150))
        local = fitted(torch.tensor(places).float(), lengths=(0.1,), features=512, standardize=False)
        wide = fitted(torch.tensor(smooth).float(), lengths=(1.0,), features=64, standardize=False)
        phi = torch.cat([wide(torch.tensor(smooth).float()), local(torch.tensor(places).float())], dim=1)
        sizes = [*wide.sizes, *local.sizes]
        known = torch.ones(2, 150, dtype=torch.bool)
        y = torch.stack([drawn / drawn.std(), noise / noise.std()])
        found = maximise_evidence(phi, sizes, y, known, steps=60, local=[1])
        assert found.weights[0, 1] > 0.1
        assert found.weights[1, 1] == 0
        assert (found.coefficients[1, sizes[0] :] == 0).all()
        without = maximise_evidence(phi[:, : sizes[0]], sizes[:1], y[1:], known[1:], steps=60)
        torch.testing.assert_close(found.coefficients[1:, : sizes[0]], without.coefficients)

    def test_they_are_the_kernels_of_the_positions_second_view(self):
        widths = {"poi": 3, POSITION: 3, LOCAL: 3, PROMPT: 2}
        head = KernelHead(widths, EnsembleConfig(local_lengths=(0.1, 0.2), features=8))
        local = head.local()
        assert [head.sizes[q] for q in sorted(local)] == [64, 64]
        assert all(local <= set(kernels) for kernels in head.regressions().values())


def _split(values):
    return values[:-1], values[-1]


def test_beyond_the_limit_a_drawn_part_says_what_kernels_weigh_and_all_regions_are_fitted(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    phi = torch.randn(60, 7, generator=generator)
    y = torch.randn(2, 60, generator=generator)
    known = torch.rand(2, 60, generator=generator) < 0.7
    monkeypatch.setattr(gaussian_process, "EVIDENCE_REGIONS", 25)
    found = maximise_evidence(phi, [3, 4], y, known, steps=20)
    monkeypatch.setattr(gaussian_process, "EVIDENCE_REGIONS", 60)
    for row in range(2):
        alone = known[row].nonzero()[:, 0]
        drawn = alone[torch.randperm(len(alone), generator=torch.Generator().manual_seed(0))[:25]]
        part = torch.zeros(60, dtype=torch.bool)
        part[drawn] = True
        expected = maximise_evidence(phi, [3, 4], y[row, None], part[None], steps=20)
        torch.testing.assert_close(found.weights[row], expected.weights[0])
        w = found.weights[row].repeat_interleave(torch.tensor([3, 4]))
        own = phi[alone].double()
        covariance = (own * w) @ own.T + found.noise[row] * torch.eye(len(alone), dtype=torch.float64)
        fitted = (own * w).T @ torch.linalg.inv(covariance) @ y[row, alone].double()
        torch.testing.assert_close(found.coefficients[row], fitted)
