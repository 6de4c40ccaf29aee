"""The ensemble head: training sets side by side that know nothing of each other, and what is deployed of them."""

import copy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from builders import LAND_USE, POI, quiet, task_config, tiny_city, tiny_config
from interruption import Interrupted, interrupt_at
from sklearn.decomposition import PCA
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from topt_deploy.data.city import Schema
from topt_deploy.data.features import POSITION, all_widths, features
from topt_deploy.errors import BadConfig
from topt_deploy.model.gaussian_process import maximise_evidence
from topt_deploy.model.leverage import Leverage
from topt_deploy.model.residual_mlp import ResidualMlp
from topt_deploy.model.target import BEYOND
from topt_deploy.model.topt import all_features
from topt_deploy.train import loop as fit_module
from topt_deploy.train import stacking
from topt_deploy.train.ensemble import train_ensemble
from topt_deploy.train.loop import TrainingDevice, Workplace, fit
from topt_deploy.train.prompt4re import fold_of, training_sets

CPU = TrainingDevice(device=torch.device("cpu"))
SCHEMA = Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=True, prompts={"prompt_crime": 10})
N = 24


def problem(n=N, seed=0):
    """A city's inputs, and its labels (N,)."""
    city = tiny_city(n, seed, prompts=("prompt_crime",))
    return {name: torch.tensor(array) for name, array in features(city).items()}, city.labels["crime"]


def rows(labels, folds=3):
    """A run's training sets (S, N)."""
    return training_sets(labels, fold_of(labels, folds=folds, seed=2024, drop_zeros=False))


def settings_of(target="cbrt", prompt4re=None, **more):
    return task_config(ensemble={"enabled": True, **more}, prompt4re=prompt4re, target={"transform": target})


def train(inputs, labels, settings, *, seed=0, checkpoints=None, checkpoint_every=500, rows=1):
    return train_ensemble(
        inputs,
        SCHEMA,
        inputs["prompt_crime"] if settings.prompt4re.enabled else None,
        labels,
        tiny_config({"crime": settings}, seed=seed, checkpoint_every=checkpoint_every),
        "crime",
        Workplace(engine=CPU, reporter=quiet(), identity="x", checkpoints=checkpoints),
        embedding=embedding_of(inputs) if settings.embeds else None,
        rows=rows,
    )


def embedding_of(inputs):
    """Stands for SREL's: a fixed map of each region's own counts (N, 8)."""
    return inputs["poi"] @ torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def trusted(inputs, known=None):
    """How far a city of these labels trusts these regions."""
    own, labels = problem()
    fitted = torch.tensor(~np.isnan(labels if known is None else known))
    return Leverage.fit(all_widths(SCHEMA), own, fitted).trust(inputs)


def by_head(result, inputs, settings, known=None):
    out = result.head(
        inputs,
        inputs["prompt_crime"] if settings.prompt4re.enabled else None,
        embedding_of(inputs) if settings.embeds else None,
        all_features(inputs, SCHEMA),
        trusted(inputs, known) if settings.ensemble.radial else None,
    )
    assert out.shape == (result.head.rows, len(inputs[POSITION]))
    return out[-1].detach()


VARIANTS = {
    "both": settings_of(),
    "kernel only": settings_of(network=False),
    "network only": settings_of(kernel=False),
    "without prompts": settings_of(prompt4re={"enabled": False}),
    "few components, √": settings_of("sqrt", prompt4re={"components": 3}),
    "one length, no layers": settings_of("none", lengths=(1.0,), layers=0, members=3),
    "every part, stacked": settings_of(
        prompt4re={"skip": True, "members": 2}, topt=True, radial=True, clip=3.0, inner_folds=2, trees=5
    ),
    "scale and local kernels left open": settings_of(
        "auto", prompt4re={"skip": True}, topt=True, radial=True, local_lengths=(0.2,), inner_folds=2
    ),
    "trees alone": settings_of(kernel=False, network=False, trees=4, tree_depth=3),
    "ToPT alone": settings_of(kernel=False, network=False, topt=True),
    "without SREL": settings_of(prompt4re={"skip": True}, topt=True, embedding=False, inner_folds=2),
    "three lengths": settings_of("log1p", lengths=(2.0, 0.5, 1.0), position_lengths=(0.5,), not_linear=()),
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
class TestVariants:
    def test_the_deployed_head_is_the_last_training_sets(self, settings):
        inputs, labels = problem()
        result = train(inputs, rows(labels), settings)
        assert result.predicted.shape == (4, N)
        np.testing.assert_allclose(by_head(result, inputs, settings), result.predicted[-1], rtol=1e-4, atol=1e-3)
        assert not result.head.training
        assert (result.predicted >= 0).all()
        assert len({tuple(row) for row in result.predicted}) == 4, "folds differ"

    @pytest.mark.parametrize("row", [0, 3])
    def test_labels_that_a_training_set_does_not_hold_cannot_reach_it(self, settings, row):
        inputs, labels = problem()
        clean = rows(np.where(np.arange(N) == 7, np.nan, labels))
        other = np.isnan(clean[row])
        poisoned = np.where(other & ~np.isnan(clean), 1e6 + np.arange(N) ** 2, clean)
        poisoned[:, 7] = np.where(np.arange(4) == row, np.nan, 1e5)  # known to none before
        before, after = train(inputs, clean, settings), train(inputs, poisoned, settings)
        np.testing.assert_array_equal(after.predicted[row], before.predicted[row])
        for k in {0, 1, 2, 3} - {row}:
            assert (after.predicted[k] != before.predicted[k]).any()
        if row == 3:
            first = before.head.state_dict()
            assert all(torch.equal(t, first[name]) for name, t in after.head.state_dict().items())

    def test_shuffled_regions_get_the_same_predictions(self, settings):
        inputs, labels = problem()
        result, order = train(inputs, rows(labels), settings), torch.randperm(N)
        shuffled = by_head(result, {name: x[order] for name, x in inputs.items()}, settings)
        torch.testing.assert_close(shuffled, by_head(result, inputs, settings)[order], rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("n", [1, 2, 50])
    def test_predicts_a_city_of_another_size(self, settings, n):
        inputs, labels = problem()
        result = train(inputs, rows(labels), settings)
        other = by_head(result, problem(n, seed=3)[0], settings)
        assert torch.isfinite(other).all()
        assert (other >= 0).all()


@pytest.mark.parametrize("name", [name for name, settings in VARIANTS.items() if settings.ensemble.network])
def test_resumed_it_is_the_same_head(name, tmp_path, monkeypatch):
    (inputs, labels), settings = problem(), VARIANTS[name]
    whole = train(inputs, rows(labels), settings)
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch=5)
        with pytest.raises(Interrupted):
            train(inputs, rows(labels), settings, checkpoints=tmp_path, checkpoint_every=2)
    assert (tmp_path / "ensemble-crime.safetensors").exists()
    resumed = train(inputs, rows(labels), settings, checkpoints=tmp_path, checkpoint_every=2)
    np.testing.assert_array_equal(resumed.predicted, whole.predicted)
    expected = whole.head.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.head.state_dict().items())


def test_it_is_the_mean_of_the_regressions_and_of_the_networks_as_one_more():
    """Put together by hand, on the ∛count scale: three nested regressions, and the mean of the networks."""
    inputs, labels = problem()
    settings = settings_of(lengths=(0.5, 1.0, 2.0), members=3)
    head = train(inputs, rows(labels), settings).head
    views = head.views(inputs, inputs["prompt_crime"])
    mean, scale = np.cbrt(labels).mean(), np.cbrt(labels).std()
    parts = head.kernel.features(views).split(head.kernel.sizes, dim=1)
    outputs = []
    for kernels in head.kernel.regressions().values():
        chosen = torch.cat([parts[q] for q in kernels], dim=1)
        targets = torch.tensor((np.cbrt(labels) - mean) / scale)[None]
        sizes = [head.kernel.sizes[q] for q in kernels]
        found = maximise_evidence(chosen, sizes, targets, torch.ones(1, N, dtype=bool), steps=settings.ensemble.steps)
        outputs.append((chosen.double() @ found.coefficients[0]).numpy())
    assert len(outputs) == 3
    x = torch.cat([inputs[view] for view in all_widths(SCHEMA)], dim=1)
    networks = head.network(x).detach().double().numpy()
    assert networks.shape == (3, N)
    expected = (np.mean([*outputs, networks.mean(axis=0)], axis=0) * scale + mean).clip(min=0) ** 3
    np.testing.assert_allclose(by_head(train(inputs, rows(labels), settings), inputs, settings), expected, rtol=1e-3)
    assert np.std(outputs, axis=0).max() > 1e-3, "regressions that do not differ would prove nothing"


@pytest.fixture
def enough(monkeypatch):
    """Training sets of this small city are stacked too."""
    monkeypatch.setattr(stacking, "ENOUGH", 8)


class TestStacked:
    SETTINGS = VARIANTS["every part, stacked"]

    @pytest.mark.parametrize("poison", [np.nan, 1e6])
    def test_no_held_out_label_reaches_a_part_or_a_weight(self, enough, poison):
        inputs, labels = problem()
        clean = rows(labels)
        other = clean.copy()
        other[1:][:, np.isnan(clean[0])] = poison  # what the first training set does not know, nowhere else either
        before, after = (train(inputs, y, self.SETTINGS, rows=4) for y in (clean, other))
        np.testing.assert_array_equal(after.predicted[0], before.predicted[0])
        assert torch.equal(after.head.weights[0], before.head.weights[0])
        for name, predicted in before.without.items():
            np.testing.assert_array_equal(after.without[name][0], predicted[0])
        assert (after.predicted[3] != before.predicted[3]).any()

    def test_weights_add_up_to_one_and_keep_half_of_equal_ones(self, enough):
        inputs, labels = problem()
        result = train(inputs, rows(labels), self.SETTINGS, rows=4)
        assert list(result.weights) == [
            "kernels from 0.7", "kernels from 1.5", "randomised trees", "networks", "SREL with Prompt4RE",
        ]  # fmt: skip
        assert sum(result.weights.values()) == pytest.approx(1)
        assert min(weight for name, weight in result.weights.items() if name != "randomised trees") >= 0.125 - 1e-6
        assert result.head.weights.std(dim=1).min() > 0

    def test_the_head_holds_the_fits_of_all_folds(self, enough):
        inputs, labels = problem()
        result = train(inputs, rows(labels), self.SETTINGS, rows=4)
        more = inputs["prompt_crime"], embedding_of(inputs), all_features(inputs, SCHEMA)
        for row, own in enumerate(rows(labels)):  # each of which trusts by what it was fitted on
            out = result.head(inputs, *more, trusted(inputs, own))[row]
            np.testing.assert_allclose(out.detach(), result.predicted[row], rtol=1e-3, atol=1e-2)

    def test_nothing_is_predicted_beyond_what_the_labels_spread_supports(self):
        inputs, labels = problem()
        far = {name: x * 50 for name, x in inputs.items()}
        roots = np.cbrt(labels)
        highest = (roots.max() + BEYOND * roots.std()) ** 3
        bounded = by_head(train(inputs, rows(labels), self.SETTINGS), far, self.SETTINGS)
        assert bounded.max() <= highest * 1.001
        free = settings_of(inner_folds=0)
        free = replace(free, target=replace(free.target, extrapolate=True))
        assert by_head(train(inputs, rows(labels), free), far, free).max() > 2 * highest


def test_a_region_unlike_the_others_is_predicted_by_radial_kernels():
    inputs, labels = problem()
    settings = settings_of(radial=True, topt=True, prompt4re={"skip": True})
    head = train(inputs, rows(labels), settings).head
    far = {name: x[:2] * (300 if name != POSITION else 1) for name, x in inputs.items()}
    trust = trusted(far)
    assert trust.max() < 0.5
    outputs = head.outputs(head.views(far, far["prompt_crime"]), embedding_of(far), all_features(far, SCHEMA))
    radial = head.target.bounded(outputs[:, head.regressions().index("radial kernels")])
    alone = head.combined(outputs, torch.zeros(2))
    torch.testing.assert_close(alone, radial)
    between = head.combined(outputs, trust)
    whole = head.combined(outputs, None)
    torch.testing.assert_close(between, trust * whole + (1 - trust) * radial)


def test_features_are_fitted_without_labels():
    inputs, labels = problem()
    first, second = (train(inputs, rows(y), settings_of()).head.state_dict() for y in (labels, labels[::-1] ** 2))
    fixed = ("basis.mean", "basis.basis", ".frequencies", ".standardize.mean", ".standardize.scale")
    names = [name for name in first if name.endswith(fixed)]
    assert len(names) > 20
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert not torch.equal(first["kernel.coefficients"], second["kernel.coefficients"])


def test_what_it_stands_on_is_the_citys_own():
    inputs, labels = problem()
    head = train(inputs, rows(labels), settings_of(prompt4re={"components": 4})).head
    side_by_side = np.concatenate([inputs[view] for view in all_widths(SCHEMA)], axis=1)
    scaler = StandardScaler().fit(side_by_side.astype(np.float64))
    np.testing.assert_allclose(head.network.standardize.mean, scaler.mean_, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(head.network.standardize.scale, scaler.scale_, rtol=1e-4, atol=1e-4)
    prompts = StandardScaler().fit_transform(inputs["prompt_crime"].double())
    reference = PCA(4).fit_transform(prompts)
    seen = head.views(inputs, inputs["prompt_crime"])["prompt"].double().numpy()
    np.testing.assert_allclose(np.abs(seen), np.abs(reference) / np.sqrt((reference**2).mean()), rtol=1e-4, atol=1e-4)


def test_every_network_trains_as_if_it_were_alone(monkeypatch):
    """One member of one training set, taken out of the batch before training, ends up the same."""
    inputs, labels = problem()
    labels = rows(np.where(np.arange(N) % 5 == 0, np.nan, labels))
    settings = settings_of(kernel=False, input_dropout=0.0, dropout=0.0, lr=1e-3, epochs=30)
    started, trained = [], []

    def spy(network, *arguments, **more):
        started.append(copy.deepcopy(network))
        fit(network, *arguments, **more)
        trained.append(network)

    monkeypatch.setattr(fit_module, "fit", spy)
    train(inputs, labels, settings)
    (start,), (batch,) = started, trained
    assert start.members == 4 * settings.ensemble.members
    x = torch.cat([inputs[view] for view in all_widths(SCHEMA)], dim=1)
    for member in (0, 3, 7):
        known = ~np.isnan(labels[member // settings.ensemble.members])
        roots = np.cbrt(labels[member // settings.ensemble.members][known])
        aims = torch.tensor((roots - roots.mean()) / roots.std()).float()
        alone = ResidualMlp(members=1, inputs=x.shape[1], config=settings.ensemble)
        own = {name: t if "standardize" in name else t[[member]] for name, t in start.state_dict().items()}
        alone.load_state_dict(own)

        def loss(alone=alone, aims=aims, known=known):
            return {"fit": torch.nn.functional.mse_loss(alone(x[known])[0], aims)}

        fit(alone, loss, settings.ensemble, stage="alone", identity="", engine=CPU, reporter=quiet())
        torch.testing.assert_close(alone(x)[0], batch(x)[member], rtol=1e-2, atol=1e-3)
        assert (start(x)[member] - batch(x)[member]).abs().max() > 0.1


def test_a_kernel_trains_as_if_its_training_set_were_alone():
    inputs, labels = problem()
    labels = rows(labels)
    together = train(inputs, labels, settings_of(network=False))
    for row in range(4):
        alone = train(inputs, labels[[row]], settings_of(network=False))
        np.testing.assert_allclose(alone.predicted[0], together.predicted[row], rtol=1e-6)


def test_regions_without_a_label_are_predicted():
    inputs, labels = problem()
    few = np.where(np.isin(np.arange(N), [2, 9, 20]), labels, np.nan)
    result = train(inputs, np.stack([few, np.where(np.arange(N) < 8, np.nan, labels)]), settings_of())
    assert np.isfinite(result.predicted).all()
    assert torch.isfinite(by_head(result, inputs, settings_of())).all()


def test_labels_that_do_not_vary_are_predicted():
    inputs, labels = problem()
    result = train(inputs, rows(np.full_like(labels, 7.0)), settings_of())
    np.testing.assert_allclose(result.predicted, 7, rtol=1e-3)


@pytest.mark.parametrize(("kernel", "network"), [(True, False), (False, True)])
def test_it_learns(kernel, network):
    """Counts that grow with some of the categories are predicted where they were held out."""
    inputs, _ = problem(150)
    labels = np.exp(1 + inputs["poi"].double().sum(dim=1).numpy() / 2).round()
    fold = fold_of(labels, folds=5, seed=0, drop_zeros=False)
    longer = {"features": 32, "steps": 40, "epochs": 300, "width": 16, "input_dropout": 0.2}
    settings = settings_of(kernel=kernel, network=network, **longer)
    predicted = train(inputs, training_sets(labels, fold), settings).predicted
    assert r2_score(labels, predicted[fold, np.arange(150)]) > 0.5


def test_the_seed_is_all_that_chance_depends_on():
    inputs, labels = problem()
    first = train(inputs, rows(labels), settings_of())
    torch.rand(17)
    np.testing.assert_array_equal(train(inputs, rows(labels), settings_of()).predicted, first.predicted)
    other = train(inputs, rows(labels), settings_of(), seed=1)
    assert (other.predicted != first.predicted).any()
    assert not torch.equal(other.head.kernel.views["poi"].frequencies, first.head.kernel.views["poi"].frequencies)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    inputs, labels = problem()
    train(inputs, rows(labels), settings_of(), checkpoints=tmp_path)
    other = settings_of(lr=1e-2)
    assert asdict(other) != asdict(settings_of())
    with pytest.raises(BadConfig, match="other data or another configuration"):
        train(inputs, rows(labels), other, checkpoints=tmp_path)
