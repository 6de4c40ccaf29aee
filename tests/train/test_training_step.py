"""Steps as they are, compiled, captured and in lower precision; what needs a GPU, as far as it can be seen without.

Fake tensors (fake_cuda.py) are on a CUDA device without one: they have shapes, types and devices, and no numbers. So
they show that no operation mixes devices, and that a step has nothing that a CUDA graph could not hold; not what it
gives.
"""

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from shutil import which
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch._inductor.config
from builders import ENSEMBLE, PROMPT4RE, SREL, quiet, task_config, tiny_city, tiny_city_tables, tiny_config
from fake_cuda import CUDA, fake_cuda
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from topt_deploy.data.city import infer_schema
from topt_deploy.data.features import features
from topt_deploy.model.prompt4re import PromptBasis, RidgeFit
from topt_deploy.model.topt import all_features
from topt_deploy.train import ensemble, prompt4re
from topt_deploy.train import srel as stage1
from topt_deploy.train.ensemble import train_ensemble, train_ensembles
from topt_deploy.train.loop import TrainingDevice, Workplace, fit
from topt_deploy.train.prompt4re import fold_of, train_head, training_sets
from topt_deploy.train.srel import embed, train_embedding
from topt_deploy.train.training_step import WARM_UP, Step

N = 14
PROMPTS = ("prompt_crime",)
CITY = tiny_city(N, prompts=PROMPTS)
SCHEMA = infer_schema(
    tiny_city_tables(N, prompts=PROMPTS)[0], views=("poi", "land_use"), mobility=True, prompts=PROMPTS
)
CPU = TrainingDevice(device=torch.device("cpu"))
DROPOUT = 0.1


def rows(folds=3):
    labels = CITY.labels["crime"]
    return training_sets(labels, fold_of(labels, folds=folds, seed=0, drop_zeros=False))


def inputs_on(device="cpu"):
    return {name: torch.tensor(array, device=device) for name, array in features(CITY).items()}


def config(epochs=12, **ensemble_):
    task = task_config(
        srel={"epochs": epochs, "dropout": DROPOUT},
        prompt4re={"epochs": epochs, "dropout": DROPOUT, "skip": True, "ridge_penalty": True},
        ensemble={"epochs": epochs, **ensemble_},
    )
    return tiny_config({"crime": task})


def both_stages(engine, epochs=12):
    """Predictions of both stages' paper form, and of the ensemble, trained by an engine."""
    place, inputs, settings = Workplace(engine=engine, reporter=quiet()), inputs_on(), config(epochs)
    name = settings.embedding_of("crime")
    embedding = embed(train_embedding(CITY, inputs, SCHEMA, settings, name, place), inputs)
    prompts = inputs["prompt_crime"]
    head = train_head(embedding, all_features(inputs, SCHEMA), prompts, rows(), settings, "crime", place)
    whole = train_ensemble(inputs, SCHEMA, prompts, rows(), settings, "crime", place)
    return {"embedding": embedding.numpy(), "head": head.predicted, "ensemble": whole.predicted}


@pytest.fixture(scope="module")
def eager():
    return both_stages(CPU)


@pytest.mark.skipif(which("g++") is None, reason="TorchInductor needs a C++ compiler")
@torch._inductor.config.patch(fallback_random=True)  # the numbers that eager steps draw
def test_compiled_steps_give_what_eager_ones_do():
    """The networks alone: a compiler is given minutes by an attention's gradient."""
    settings, prompts = config(kernel=False), inputs_on()["prompt_crime"]
    found = {}
    for engine in (CPU, replace(CPU, compile=True)):
        place = Workplace(engine=engine, reporter=quiet())
        found[engine.compile] = train_ensemble(inputs_on(), SCHEMA, prompts, rows(), settings, "crime", place).predicted
    np.testing.assert_allclose(found[True], found[False], rtol=1e-3, atol=1e-3)


def test_no_step_leaves_the_compiled_graph(monkeypatch):
    """TorchDynamo alone, without a compiler behind it: every operation of a step is in one graph."""
    compile_, graphs = torch.compile, []

    def whole(loss, **options):
        graphs.append(options)
        return compile_(loss, fullgraph=True, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", whole)
    found = both_stages(replace(CPU, compile=True))
    assert len(graphs) == 3
    assert all(np.isfinite(values).all() for values in found.values())


def test_bf16_trains_and_is_close(eager):
    found = both_stages(replace(CPU, precision="bf16"))
    for name, expected in eager.items():
        assert np.isfinite(found[name]).all()
        assert (found[name] != expected).any(), f"{name} was not computed in bf16"
        error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected - expected.mean())
        assert error < 0.1, name


class Replayed:
    """A graph that records the step by keeping it: what :class:`Step` makes of one is the same."""

    def __init__(self):
        self.run, self.calls = None, []

    def warm(self, run):
        self.calls.append("warm")
        return run()

    def capture(self, run):
        self.calls.append("capture")
        self.run, self.terms = run, {}
        return self.terms  # filled by the replays

    def replay(self):
        self.calls.append("replay")
        self.terms |= self.run()


def test_captured_steps_are_the_same_steps(monkeypatch):
    def trained(graph):
        CPU.seed(3, "test")
        module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        x = torch.linspace(-2, 2, 24).reshape(8, 3)
        monkeypatch.setattr(TrainingDevice, "graph", lambda self, generators: graph)
        # capturable itself is CUDA's alone
        monkeypatch.setattr(torch.optim, "Adam", lambda *a, capturable, **k: adam(*a, **k))
        seen = []
        fit(
            module, lambda: {"square": (module(x) - x[:, :1]).square().mean()},
            replace(SREL, epochs=30, schedule="cosine", lr=0.01), stage="s", identity="", engine=CPU, reporter=quiet(),
            observe=lambda epoch: seen.append(epoch),
        )  # fmt: skip
        assert seen == list(range(1, 31))
        return module.state_dict()

    adam, graph = torch.optim.Adam, Replayed()
    expected, found = trained(None), trained(graph)
    assert graph.calls == ["warm"] * WARM_UP + ["capture"] + ["replay"] * (30 - WARM_UP)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_captured_step_makes_gradients_of_its_own():
    """Those of the steps before would be written to by replays, and freed in between."""
    module, graph = nn.Linear(2, 1), Replayed()
    optimiser = torch.optim.Adam(module.parameters(), lr=torch.tensor(0.1), fused=True)
    step = Step(lambda: {"x": module(torch.ones(2)).sum()}, optimiser, nullcontext, graph)
    for _ in range(WARM_UP):
        step(0.1)
    assert module.weight.grad is not None
    graph.replay = lambda: None
    step(0.1)
    assert module.weight.grad is None


def test_matrix_products_are_tf32_inside_of_steps_only():
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    with replace(CPU, precision="tf32").matmuls():
        assert products.fp32_precision == "tf32"
    assert products.fp32_precision == before
    with pytest.raises(RuntimeError), replace(CPU, precision="tf32").matmuls():
        raise RuntimeError
    assert products.fp32_precision == before


class TestSeedsAsOneBatch:
    SEEDS = (4, 9, 11)

    def together(self, **settings):
        configs = [replace(config(**settings), seed=seed) for seed in self.SEEDS]
        labels = [rows(folds) for folds in (3, 4, 3)]
        arguments = (inputs_on(), SCHEMA, inputs_on()["prompt_crime"])
        place = Workplace(engine=CPU, reporter=quiet())
        joint = train_ensembles(*arguments, labels, configs, "crime", place)
        alone = [train_ensemble(*arguments, own, one, "crime", place) for own, one in zip(labels, configs, strict=True)]
        return joint, alone

    @pytest.mark.parametrize("parts", [{}, {"kernel": False}, {"network": False}], ids=["both", "networks", "kernels"])
    def test_every_seed_has_the_results_that_it_has_alone(self, parts):
        joint, alone = self.together(**parts)
        for found, expected in zip(joint, alone, strict=True):
            np.testing.assert_allclose(found.predicted, expected.predicted, rtol=1e-5, atol=1e-5)
            own = expected.head.state_dict()
            for name, tensor in found.head.state_dict().items():
                torch.testing.assert_close(tensor, own[name], rtol=1e-5, atol=1e-6)
        assert not np.allclose(joint[0].predicted[-1], joint[2].predicted[-1], rtol=1e-3), "seeds differ"


WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
}
"""Operations whose result the CPU waits for."""


class Watched(TorchDispatchMode):
    """Notes what makes a GPU wait for the CPU, and what a CUDA graph cannot hold: copies between the two."""

    def __init__(self):
        super().__init__()
        self.count, self.faults = 0, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        self.count += 1
        tensors = [a for a in (*arguments, out) if isinstance(a, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if function in WAITS or len(devices) > 1:
            self.faults.append(f"{function} of {devices}")
        return out


@pytest.fixture
def cuda(monkeypatch):
    """Training that only computes its loss, and has that watched; what reads numbers is done otherwise."""

    watched = []

    def fitted(module, loss, settings, *, engine, generators=(), capturable=True, **_):
        """The loss once, watched. Autograd and Adam need a real device."""
        assert capturable
        module.train()
        with Watched() as watch, engine.autocast(), torch.no_grad():
            terms = loss()
            torch.stack([term.float() for term in terms.values()]).sum()
        watched.append(watch)

    def basis(prompts, components=0):
        return PromptBasis(prompt_width=prompts.shape[1], rank=4)

    def ridged(x, y, weights, alpha):
        m = len(y)
        return RidgeFit(
            coefficients=x.new_zeros(m, x.shape[1]).double(), intercepts=x.new_zeros(m).double(),
            alphas=x.new_ones(m).double(),
        )  # fmt: skip

    monkeypatch.setattr("topt_deploy.train.loop.fit", fitted)
    monkeypatch.setattr(PromptBasis, "fit", staticmethod(basis))  # says how many components there are
    monkeypatch.setattr(prompt4re, "ridge", ridged)
    return watched


@pytest.mark.parametrize("stage", ["srel", "prompt4re", "ensemble"])
def test_a_step_on_cuda_mixes_no_devices_and_waits_for_nothing(cuda, stage):
    place, settings = Workplace(engine=TrainingDevice(device=CUDA), reporter=quiet()), config()
    with fake_cuda(), ExitStack() as stack:
        inputs = inputs_on(CUDA)
        if stage == "srel":
            stack.enter_context(patch.object(stage1.Srel, "fit_statistics", lambda *_: None))  # numbers, on the CPU
            name = settings.embedding_of("crime")
            srel = train_embedding(CITY, inputs, SCHEMA, settings, name, place)
            assert embed(srel, inputs).device == CUDA
        elif stage == "prompt4re":
            embedding = torch.zeros(N, SREL.width, device=CUDA)
            features_ = all_features(inputs, SCHEMA)
            with pytest.raises(RuntimeError, match="numpy"):  # the end, where predictions become an array
                train_head(embedding, features_, inputs["prompt_crime"], rows(), settings, "crime", place)
        else:
            stack.enter_context(patch.object(ensemble, "random_here", lambda device: None))
            with pytest.raises(RuntimeError, match="numpy"):
                train_ensemble(inputs, SCHEMA, inputs["prompt_crime"], rows(), config(kernel=False), "crime", place)
    (watch,) = cuda
    assert watch.count > 30
    assert watch.faults == []


def test_what_a_step_waits_for_is_seen():
    with fake_cuda(), Watched() as watch:
        x = torch.zeros(3, device=CUDA)
        x + torch.tensor([1.0, 2.0, 3.0]).to(CUDA)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.zeros(3)
    assert len(watch.faults) == 1


def test_the_settings_here_have_what_there_is_to_check():
    assert ENSEMBLE.input_dropout > 0
    assert ENSEMBLE.dropout > 0
    assert PROMPT4RE.heads > 1
