"""Devices that are asked for, and ``auto``: what is taken, what is said, and that nothing falls to the CPU unsaid."""

import json
import logging
import os
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from fake_gpu import fake_libcuda

from topt_deploy.data.city import read_city
from topt_deploy.data.features import features
from topt_deploy.data.parquet import read_parquet
from topt_deploy.errors import BadBundle, NoDevice, UsageError
from topt_deploy.runtime import load
from topt_deploy.runtime.backends import onnxruntime
from topt_deploy.runtime.backends.onnxruntime import PROVIDERS, Session, check_device, check_used
from topt_deploy.runtime.device_choice import AUTO, BEST_FIRST, CPU, CUDA, TENSORRT, choose
from topt_deploy.runtime.prompt_encoder import open_encoder
from topt_deploy.tensorrt import cuda_driver

NO_DEVICE, USAGE = 69, 2
HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()
without_cuda = pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")


def absent(name):
    def way():
        raise NoDevice(f"no {name}", found="nothing")

    return way


class TestChoice:
    @pytest.fixture(autouse=True)
    def _logged(self, caplog):
        caplog.set_level(logging.INFO)

    @pytest.mark.parametrize("best", BEST_FIRST)
    def test_auto_takes_the_best_that_works_and_says_why(self, best, caplog):
        worse = BEST_FIRST[BEST_FIRST.index(best) :]
        ways = {device: (lambda d=device: d) if device in worse else absent(device) for device in BEST_FIRST}
        opened, chosen = choose(AUTO, ways, what="it")
        assert opened == chosen.used == best
        assert chosen.asked == AUTO
        better = [device for device in BEST_FIRST if device not in worse]
        assert list(chosen.instead_of) == better
        (said,) = caplog.messages
        assert said.startswith(f"it: device {best}, asked for auto")
        assert all(f"not {device}: no {device} (nothing)" in said for device in better)
        assert json.loads(json.dumps(chosen.as_dict()))["used"] == best

    @pytest.mark.parametrize("device", BEST_FIRST)
    def test_what_is_asked_for_is_taken_or_an_error(self, device, caplog):
        ways = {name: lambda name=name: SimpleNamespace(how=f"some {name}") for name in BEST_FIRST}
        _, chosen = choose(device, ways, what="it")
        assert (chosen.used, chosen.how) == (device, f"some {device}")
        said = f"it: device {device}, asked for {device} (some {device})"
        assert caplog.messages == ([] if device == CPU else [said])
        with pytest.raises(NoDevice, match=f"no {device}"):
            choose(device, {**ways, device: absent(device)}, what="it")

    def test_another_error_is_no_reason_to_go_on(self):
        def broken():
            raise BadBundle("changed")

        with pytest.raises(BadBundle):
            choose(AUTO, {TENSORRT: broken, CUDA: broken, CPU: lambda: CPU}, what="it")


def part(provider, *operators):
    nodes = [SimpleNamespace(op_type=operator) for operator in operators]
    return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)


def made(providers, *parts):
    return SimpleNamespace(get_providers=lambda: providers, get_provider_graph_assignment_info=lambda: parts)


class TestWhereNodesRun:
    CUDA_FIRST = (PROVIDERS["cuda"], PROVIDERS["cpu"])

    def test_sizes_may_be_reckoned_with_on_the_cpu(self):
        shapes = part(PROVIDERS["cpu"], "Shape", "Gather", "Concat")
        check_used(made(self.CUDA_FIRST, part(PROVIDERS["cuda"], "MatMul"), shapes), "cuda")

    @pytest.mark.parametrize("operator", ["MatMul", "DynamicQuantizeLinear", "Softmax", "LayerNormalization", "Scan"])
    def test_work_may_not(self, operator):
        parts = part(PROVIDERS["cuda"], "MatMul"), part(PROVIDERS["cpu"], "Shape", operator)
        with pytest.raises(NoDevice) as caught:
            check_used(made(self.CUDA_FIRST, *parts), "cuda")
        assert caught.value.found == f"left to the CPU: {operator}"

    def test_a_session_that_uses_the_device_for_nothing(self):
        with pytest.raises(NoDevice, match="everything"):
            check_used(made(self.CUDA_FIRST, part(PROVIDERS["cpu"], "Shape")), "cuda")

    def test_a_session_on_another_device(self):
        with pytest.raises(NoDevice) as caught:
            check_used(made([PROVIDERS["cpu"]]), "cuda")
        assert caught.value.found == "a session on CPUExecutionProvider"

    def test_tensorrt_may_leave_parts_to_cuda(self):
        parts = part(PROVIDERS["tensorrt"], "MatMul"), part(PROVIDERS["cuda"], "Softmax")
        check_used(made([PROVIDERS["tensorrt"], *self.CUDA_FIRST], *parts), "tensorrt")

    @pytest.mark.parametrize("file", ["models/topt.onnx"])
    def test_onnx_runtime_tells_of_every_node(self, file, demo_bundle):
        """The real thing: all of a graph's operators, with the CPU as the only device there is."""
        options = onnxruntime.session_options("cuda", 1)
        made = ort.InferenceSession(demo_bundle / file, options, providers=[PROVIDERS["cpu"]])
        told = made.get_provider_graph_assignment_info()
        assert {one.ep_name for one in told} == {PROVIDERS["cpu"]}
        assert {"MatMul", "Reshape"} <= {node.op_type for one in told for node in one.get_nodes()}


def test_weights_given_to_another_device_are_the_same_model(demo_bundle, demo_city, monkeypatch):
    """What CUDA sessions are made with, all but the provider itself, which is the CPU's here."""
    predictor = load(demo_bundle)
    expected = predictor.session
    monkeypatch.setattr(onnxruntime, "check_device", lambda device: None)
    monkeypatch.setattr(onnxruntime, "check_used", lambda made, device: None)
    monkeypatch.setattr(onnxruntime, "providers", lambda device, exact: [(PROVIDERS["cpu"], {})])
    found = Session(*predictor.parts, predictor.variant["initializers"], device="cuda", threads=1)
    schema = predictor.bundle.manifest.schema
    city = read_city(read_parquet(demo_city / "regions.parquet"), read_parquet(demo_city / "mobility.parquet"), schema)
    inputs = features(city, predictor.bundle.manifest.inputs)
    a, b = (one.run(inputs, predictor.tasks) for one in (expected, found))
    for task in predictor.tasks:
        np.testing.assert_allclose(b[task], a[task], rtol=1e-5)


class TestAskedFor:
    @without_cuda
    @pytest.mark.parametrize("command", ["selftest", "predict", "encode"])
    def test_cuda_that_is_absent(self, command, desk, encoders, topt_run):
        arguments = {
            "selftest": (encoders("text"),),
            "predict": (desk.regions,),
            "encode": (desk.regions, "--bundle", encoders("text"), "--out", desk.folder / "prompts.parquet"),
        }[command]
        before = desk.state()
        said = topt_run(command, *arguments, "--device", "cuda", "--log-format", "json")
        assert said.code == NO_DEVICE, said.err
        error = json.loads(said.err.splitlines()[-1])
        assert error["error"] == "NoDevice"
        assert "CUDAExecutionProvider" in error["expected"]
        assert desk.state() == before

    @pytest.mark.parametrize("command", ["selftest", "predict"])
    def test_tensorrt_without_a_variant_for_it(self, command, desk, topt_run):
        said = topt_run(command, {"selftest": desk.bundle, "predict": desk.regions}[command], "--device", "tensorrt")
        assert said.code == NO_DEVICE
        assert "has no form for TensorRT" in said.err
        assert "--format trt" in said.err

    @without_cuda
    def test_auto_ends_with_the_cpu_and_tells(self, desk, topt_run):
        assert topt_run("predict", desk.regions).code == 0
        usual = desk.out.read_bytes()
        said = topt_run("predict", desk.regions, "--device", "auto", "--log-format", "json")
        assert said.code == 0, said.err
        told = json.loads(said.err.splitlines()[0])
        assert told["event"] == "log"
        assert "the city's model: device cpu, asked for auto (not tensorrt:" in told["message"]
        receipt = json.loads(desk.receipt.read_text())
        assert (receipt["device"]["asked"], receipt["device"]["used"]) == ("auto", "cpu")
        assert set(receipt["device"]["instead_of"]) == {"tensorrt", "cuda"}
        assert desk.out.read_bytes() == usual

    @pytest.mark.parametrize("device", ["cuda", "tensorrt", "auto"])
    def test_openvino_is_for_the_cpu(self, device, desk, encoders, topt_run):
        for command in (
            ("encode", desk.regions, "--bundle", encoders("text")), ("selftest", encoders("text")),
            ("predict", desk.regions),
        ):  # fmt: skip
            said = topt_run(*command, "--device", device, "--encoder-engine", "openvino")
            assert said.code == USAGE, said.err
            assert "OpenVINO runs the encoder on the CPU alone" in said.err
        with pytest.raises(UsageError):
            open_encoder(encoders("text"), engine="openvino", device=device)

    def test_from_python(self, desk, encoders):
        predictor = load(desk.bundle, device="auto")
        assert predictor.chosen.asked == "auto"
        assert predictor.device == predictor.chosen.used
        assert load(desk.bundle).chosen.as_dict() == {"asked": "cpu", "used": "cpu", "instead_of": {}, "how": ""}
        opened = open_encoder(encoders("text"), device="auto", threads=1)
        assert opened.device.asked == "auto"

    @without_cuda
    def test_an_encoder_on_auto_gives_the_cpus_vectors(self, encoders):
        prompt = open_encoder(encoders("text"), threads=1).encoder.prompt("Where?", [], ["What?"])
        one, other = (open_encoder(encoders("text"), device=d, threads=1).encoder for d in ("cpu", "auto"))
        assert np.array_equal(one.vectors([prompt]), other.vectors([prompt]))
        assert one.runtime == other.runtime


def test_what_the_provider_lacks_is_said(tmp_path, monkeypatch):
    """As on a machine with GPU and driver, and onnxruntime-gpu without CUDA's libraries."""
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"no library")
    driver = cuda_driver.Driver(str(fake_libcuda(tmp_path)))
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver)
    monkeypatch.setattr(onnxruntime.ort, "get_available_providers", lambda: [PROVIDERS["cuda"], PROVIDERS["cpu"]])
    monkeypatch.setattr(onnxruntime.ort, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(onnxruntime.ort, "preload_dlls", lambda: print("a library is missing"))
    with pytest.raises(NoDevice) as caught:
        check_device("cuda")
    assert "libonnxruntime_providers_cuda.so" in caught.value.found
    assert "lacks a library" in caught.value.found


def test_many_cities_on_a_gpu_are_one_processs(desk, demo_bundle, tmp_path, topt_run, monkeypatch):
    from topt_deploy.runtime.predictor import Predictor

    monkeypatch.setattr(Predictor, "device", "cuda")  # as far as the batch can tell
    pids = []
    predict = Predictor.predictions
    monkeypatch.setattr(
        Predictor, "predictions", lambda self, *a, **k: (pids.append(os.getpid()), predict(self, *a, **k))[1]
    )
    for name in ("A", "B"):
        folder = tmp_path / "cities" / f"city={name}"
        folder.mkdir(parents=True)
        for file in (desk.regions, desk.mobility):
            (folder / file.name).write_bytes(file.read_bytes())
    many = (tmp_path / "cities", "--bundle", demo_bundle, "--out", tmp_path / "out")
    said = topt_run("predict", *many, "--workers", "2")
    assert said.code == USAGE
    assert "one process has the GPU" in said.err
    assert topt_run("predict", *many).code == 0
    assert pids == [os.getpid()] * 2
