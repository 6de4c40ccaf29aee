import json
import math
from dataclasses import replace

import pytest
import torch
from builders import ENSEMBLE, PROMPT4RE, SREL, quiet
from torch import nn

from topt_deploy.errors import BadConfig, Exit, NoDevice
from topt_deploy.train.loop import LOG_EVERY, TrainingDevice, fit, learning_rate
from topt_deploy.train.progress import Reporter

CPU = TrainingDevice(device=torch.device("cpu"))
X = torch.linspace(-2, 2, 24).reshape(8, 3)
Y = X.square().sum(dim=1, keepdim=True)


class Interrupted(Exception):
    pass


def network(dropout=0.3):
    CPU.seed(5, "test")
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))


def train(module, settings, reporter, *, stop_at=None, identity="data", **more):
    """Fit a small network; raises Interrupted in the middle of epoch ``stop_at`` + 1."""
    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        if stop_at is not None and calls > stop_at:
            raise Interrupted
        error = module(X) - Y
        return {"square": error.square().mean(), "absolute": 0.1 * error.abs().mean()}

    fit(module, loss, settings, stage="test", identity=identity, engine=CPU, reporter=reporter, **more)
    return calls


def settings(**more):
    return replace(SREL, **{"epochs": 40, "lr": 0.01, "weight_decay": 1e-2, **more})


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_matches_adam_written_out(decoupled, schedule):
    chosen = settings(decoupled=decoupled, schedule=schedule, epochs=30)
    module = network(dropout=0.0)
    values = {name: p.detach().double().clone() for name, p in module.named_parameters()}
    first = {name: torch.zeros_like(v) for name, v in values.items()}
    second = {name: torch.zeros_like(v) for name, v in values.items()}
    for step in range(1, 31):
        rate = chosen.lr
        if schedule == "cosine":
            rate *= (1 + math.cos(math.pi * (step - 1) / 30)) / 2
        leaves = {name: v.clone().requires_grad_() for name, v in values.items()}
        hidden = torch.tanh(X.double() @ leaves["0.weight"].T + leaves["0.bias"])
        error = hidden @ leaves["3.weight"].T + leaves["3.bias"] - Y.double()
        (error.square().mean() + 0.1 * error.abs().mean()).backward()
        for name, value in values.items():
            gradient = leaves[name].grad
            if decoupled:
                value -= rate * chosen.weight_decay * value
            else:
                gradient = gradient + chosen.weight_decay * value
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            corrected = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            value -= rate * first[name] / (1 - 0.9**step) / corrected
    train(module, chosen, quiet())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), values[name], rtol=1e-3, atol=1e-4)


def test_minimises_the_sum_of_the_terms():
    module = network(dropout=0.0)
    before = (module(X) - Y).square().mean().item()
    assert train(module, settings(epochs=300), quiet()) == 300
    assert (module(X) - Y).square().mean().item() < before / 5


def test_an_observer_sees_the_weights_after_every_epoch():
    module, seen = network(dropout=0.0), []
    train(module, settings(epochs=3), quiet(), observe=lambda epoch: seen.append((epoch, weights(module))))
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert same(seen[-1][1], weights(module))
    assert not same(seen[0][1], seen[1][1])


class TestLearningRate:
    def test_constant(self):
        assert {learning_rate(SREL, epoch) for epoch in range(6)} == {SREL.lr}

    @pytest.mark.parametrize("base", [SREL, PROMPT4RE, ENSEMBLE])
    def test_cosine_falls_from_the_rate_to_nearly_zero(self, base):
        chosen = replace(base, schedule="cosine", epochs=100, lr=0.5)
        rates = [learning_rate(chosen, epoch) for epoch in range(100)]
        assert rates[0] == 0.5
        assert rates[50] == pytest.approx(0.25)
        assert 0 < rates[-1] < 0.001
        assert rates == sorted(rates, reverse=True)


class TestResume:
    @pytest.mark.parametrize("stop_at", [3, 10, 17, 30, 39])
    @pytest.mark.parametrize("schedule", ["constant", "cosine"])
    def test_gives_the_same_weights_bit_for_bit(self, tmp_path, stop_at, schedule):
        chosen = settings(schedule=schedule)
        whole = network()
        train(whole, chosen, quiet())
        file = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_every": 10}
        with pytest.raises(Interrupted):
            train(network(), chosen, quiet(), stop_at=stop_at, **file)
        assert file["checkpoint"].exists() == (stop_at >= 10)
        resumed = network()
        if stop_at >= 10:
            torch.rand(stop_at)  # where there is a checkpoint, random numbers go on from there
        assert train(resumed, chosen, quiet(), **file) == 40 - stop_at // 10 * 10
        assert same(weights(resumed), weights(whole))

    def test_twice_interrupted(self, tmp_path):
        whole = network()
        train(whole, settings(), quiet())
        file = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_every": 7}
        for stop_at in (9, 8, 12):
            with pytest.raises(Interrupted):
                train(network(), settings(), quiet(), stop_at=stop_at, **file)
        resumed = network()
        train(resumed, settings(), quiet(), **file)
        assert same(weights(resumed), weights(whole))

    def test_checkpoints_themselves_change_nothing(self, tmp_path):
        with_it, without = network(), network()
        CPU.seed(1, "run")
        train(with_it, settings(), quiet(), checkpoint=tmp_path / "c.safetensors", checkpoint_every=1)
        CPU.seed(1, "run")
        train(without, settings(), quiet())
        assert same(weights(with_it), weights(without))

    def test_a_finished_stage_is_not_trained_again(self, tmp_path):
        file = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_every": 500}
        module, again = network(), network()
        train(module, settings(), quiet(), **file)
        assert train(again, settings(), quiet(), **file) == 0
        assert same(weights(again), weights(module))

    def test_the_lines_for_machines_are_those_of_a_run_without_interruption(self, tmp_path):
        whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
        chosen = settings(epochs=4 * LOG_EVERY)
        train(network(), chosen, quiet(whole))
        file = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_every": LOG_EVERY}
        with pytest.raises(Interrupted):
            # Stops after a line that the checkpoint does not cover.
            train(network(), chosen, quiet(resumed), stop_at=2 * LOG_EVERY - 1, **file)
        quiet(resumed).record(stage="test", epoch=2 * LOG_EVERY, loss=0, terms={})
        train(network(), chosen, quiet(resumed), **file)
        assert resumed.read_text() == whole.read_text()
        lines = [json.loads(line) for line in whole.read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [LOG_EVERY * k for k in (1, 2, 3, 4)]
        assert all(line["loss"] == pytest.approx(sum(line["terms"].values())) for line in lines)

    def test_nor_do_lines_from_before_the_first_checkpoint_stay(self, tmp_path):
        whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
        chosen, file = settings(epochs=2 * LOG_EVERY), tmp_path / "c.safetensors"
        train(network(), chosen, quiet(whole))
        with pytest.raises(Interrupted):
            train(network(), chosen, quiet(resumed), stop_at=LOG_EVERY, checkpoint=file)
        assert resumed.read_text()
        train(network(), chosen, quiet(resumed), checkpoint=file)
        assert resumed.read_text() == whole.read_text()

    def test_a_line_that_was_cut_off_by_the_interruption_is_forgotten(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        reporter = quiet(path)
        reporter.record(stage="test", epoch=25, loss=1.0)
        with path.open("a") as file:
            file.write('{"stage": "test", "ep')
        reporter.rewind("test", 25)
        assert path.read_text() == '{"stage": "test", "epoch": 25, "loss": 1.0}\n'

    def test_other_stages_lines_stay(self, tmp_path):
        reporter = quiet(tmp_path / "metrics.jsonl")
        reporter.record(stage="other", epoch=100, loss=1.0)
        reporter.record(stage="test", epoch=100, loss=1.0)
        reporter.rewind("test", 0)
        assert [json.loads(x)["stage"] for x in reporter.metrics.read_text().splitlines()] == ["other"]

    def test_another_identity_is_refused(self, tmp_path):
        file = tmp_path / "c.safetensors"
        train(network(), settings(), quiet(), checkpoint=file)
        with pytest.raises(BadConfig, match="other data or another configuration") as caught:
            train(network(), settings(), quiet(), checkpoint=file, identity="changed")
        assert caught.value.exit_code == Exit.BAD_CONFIG
        assert str(file) in str(caught.value)

    def test_another_models_checkpoint_is_refused(self, tmp_path):
        file = tmp_path / "c.safetensors"
        train(network(), settings(), quiet(), checkpoint=file)
        other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
        with pytest.raises(BadConfig, match="other data or another configuration"):
            train(other, settings(), quiet(), checkpoint=file, identity="changed")


def test_a_loss_that_is_not_finite_stops_training():
    module = network(dropout=0.0)
    with pytest.raises(BadConfig, match=r"test: the loss is not finite at epoch 25") as caught:
        fit(
            module,
            lambda: {"bad": module(X).sum() * math.nan},
            settings(),
            stage="test",
            identity="",
            engine=CPU,
            reporter=quiet(),
        )
    assert "learning rate" in caught.value.fix


class TestEngine:
    def test_defaults_on_a_cpu(self):
        engine = TrainingDevice.choose("cpu", None, None)
        assert (engine.device.type, engine.precision, engine.compile) == ("cpu", "fp32", False)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
    def test_absent_cuda_is_named_and_never_replaced(self):
        with pytest.raises(NoDevice, match="CUDA was requested") as caught:
            TrainingDevice.choose("cuda", None, None)
        assert caught.value.exit_code == Exit.NO_DEVICE
        assert "--device cpu" in caught.value.fix

    def test_tf32_on_a_cpu_is_refused(self):
        with pytest.raises(BadConfig, match="tf32 exists on CUDA only") as caught:
            TrainingDevice.choose("cpu", "tf32", None)
        assert caught.value.exit_code == Exit.BAD_CONFIG

    def test_seeds_differ_by_seed_and_stage_and_repeat(self):
        draws = {}
        for seed, stage in ((0, "a"), (0, "b"), (1, "a")):
            CPU.seed(seed, stage)
            draws[seed, stage] = torch.rand(3)
        assert len({tuple(d.tolist()) for d in draws.values()}) == 3
        CPU.seed(0, "a")
        assert torch.equal(torch.rand(3), draws[0, "a"])

    def test_bf16_computes_in_bf16_and_keeps_float32_weights(self):
        engine = TrainingDevice.choose("cpu", "bf16", None)
        module, kinds = network(dropout=0.0), set()

        def loss():
            out = module(X)
            kinds.add(out.dtype)
            return {"square": (out - Y).square().mean()}

        fit(module, loss, settings(epochs=5), stage="s", identity="", engine=engine, reporter=quiet())
        assert kinds == {torch.bfloat16}
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_without_a_terminal_there_are_plain_lines(capsys):
    reporter = Reporter()
    train(network(), settings(), reporter)
    assert capsys.readouterr().err.startswith("test: 40 epochs done in ")
