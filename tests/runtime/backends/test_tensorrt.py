"""Bundles on TensorRT, as far as that goes without a GPU: a made-up driver, and ONNX Runtime in place of engines."""

import json
import logging
import shutil

import numpy as np
import onnxruntime as ort
import pyarrow.parquet as pq
import pytest
from encoder_regions import REGIONS, asked
from fake_gpu import FAKE_TRT, fake_libcuda

from topt_deploy.errors import BadBundle, BadData, NoDevice, UsageError
from topt_deploy.hardening.onnx_operators import graph_inputs
from topt_deploy.runtime import load
from topt_deploy.runtime.backends import onnxruntime, tensorrt
from topt_deploy.runtime.backends.tensorrt import Provider, TensorRTNetwork, find_way, provider_shapes
from topt_deploy.runtime.prompt_encoder import open_encoder
from topt_deploy.tensorrt import cuda_driver
from topt_deploy.tensorrt.build import Built
from topt_deploy.tensorrt.library import Library
from topt_deploy.tensorrt.profile import ProfileRange

FAKE = Library(flavour="tensorrt", version="11.0", module=FAKE_TRT)
CAPABILITY = "8.9"
"""Of the made-up GPU."""


@pytest.fixture
def fake_gpu(tmp_path, monkeypatch, caplog):
    """A driver, a library, and an engine builder that counts; engines are kept in a folder of the test's own."""
    caplog.set_level(logging.INFO)
    driver = cuda_driver.Driver(str(fake_libcuda(tmp_path)))
    built = []

    def build(library, graph, profile, *, timing_cache=None):
        built.append(graph)
        return Built(engine=f"path:{graph}".encode(), timing_cache=b"measured", messages=())

    monkeypatch.setattr(tensorrt, "driver", lambda: driver)
    monkeypatch.setattr(tensorrt, "find_library", lambda flavour=None: FAKE)
    monkeypatch.setattr(tensorrt, "build_engine", build)
    monkeypatch.setenv("TOPT_CACHE", str(tmp_path / "kept"))
    return built


@pytest.fixture
def bundle(desk, reseal):
    """The demo's bundle with a variant for TensorRT, of the portable graph."""
    folder = desk.bundle / "models" / "tensorrt-fp16"
    folder.mkdir()
    for name in ("topt.onnx", "topt.weights"):
        shutil.copy(desk.bundle / "models" / name, folder)
    shipped = folder / "topt.sm80.engine"
    shipped.write_bytes(f"path:{folder / 'topt.onnx'}".encode())
    files = {
        "graph": "models/tensorrt-fp16/topt.onnx", "weights": "models/tensorrt-fp16/topt.weights",
    }  # fmt: skip
    variant = {
        **files, "initializers": {}, "providers": [], "flavour": "tensorrt", "precision": "fp16", "tolerance": 0.01,
        "parity": [], "profile": {"regions": [1, 256, 4096]}, "library": FAKE.title,
        "engines": {"8.0": "models/tensorrt-fp16/topt.sm80.engine"}, "checked": ["onnx.checker"],
    }  # fmt: skip

    def add(record):
        record["variants"]["tensorrt-fp16"] = variant
        for name in (*files.values(), *variant["engines"].values()):
            record["files"][name] = {"size": 0, "sha256": ""}

    reseal(desk.bundle, add)
    reseal(desk.bundle, lambda record: None)  # sizes and hashes of the new files too
    return desk.bundle


def tables(desk):
    return pq.read_table(desk.regions), pq.read_table(desk.mobility)


def test_predictions_are_the_cpus_and_the_engine_is_kept(desk, bundle, fake_gpu, caplog):
    expected = load(bundle).predict(*tables(desk), wide=True)
    predictor = load(bundle, device="tensorrt")
    found = predictor.predict(*tables(desk), wide=True)
    for task in predictor.tasks:
        np.testing.assert_allclose(found.column(task).to_numpy(), expected.column(task).to_numpy(), rtol=1e-4)
    assert predictor.device == "tensorrt"
    assert predictor.provider == "TensorRT 11.0 on NVIDIA Make-believe 0 (compute capability 8.9, CUDA 13.2)"
    assert predictor.precision == "fp16"
    assert "the city's model: device tensorrt, asked for tensorrt (TensorRT 11.0 by its own Python" in caplog.text
    assert "miss (nothing is kept); building" in caplog.text
    caplog.clear()
    load(bundle, device="tensorrt")
    assert "hit (" in caplog.text
    assert len(fake_gpu) == 1


def test_auto_takes_it(desk, bundle, fake_gpu, topt_run):
    said = topt_run("predict", desk.regions, "--device", "auto")
    assert said.code == 0, said.err
    assert "the city's model: device tensorrt, asked for auto" in said.err
    receipt = json.loads(desk.receipt.read_text())
    assert receipt["device"] == {
        "asked": "auto", "used": "tensorrt", "instead_of": {}, "how": "TensorRT 11.0 by its own Python package",
    }  # fmt: skip
    assert receipt["precision"] == "fp16"
    assert receipt["provider"].startswith("TensorRT 11.0 on NVIDIA Make-believe")
    assert topt_run("selftest", bundle, "--device", "tensorrt").code == 0


@pytest.mark.parametrize("library", [FAKE.title, "TensorRT 10.9"])
def test_an_engine_of_the_bundle_is_taken_where_its_library_is(library, bundle, fake_gpu, reseal, caplog):
    def for_this_gpu(record):
        variant = record["variants"]["tensorrt-fp16"]
        variant["engines"] = {CAPABILITY: variant["engines"]["8.0"]}
        variant["library"] = library

    reseal(bundle, for_this_gpu)
    load(bundle, device="tensorrt")
    if library == FAKE.title:
        assert "the bundle's engine for compute capability 8.9" in caplog.text
        assert fake_gpu == []
    else:
        assert "the bundle's engine is for TensorRT 10.9, not TensorRT 11.0" in caplog.text
        assert len(fake_gpu) == 1


def test_a_changed_engine_of_the_bundle_is_refused(bundle, fake_gpu):
    engine = bundle / "models/tensorrt-fp16/topt.sm80.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"y")
    with pytest.raises(BadBundle, match=r"topt\.sm80\.engine is not the file"):
        load(bundle, device="tensorrt")


def test_other_weights_are_another_engine(bundle, fake_gpu, reseal):
    load(bundle, device="tensorrt")
    weights = bundle / "models/tensorrt-fp16/topt.weights"
    data = np.fromfile(weights, np.float32)
    (data * np.float32(1.01)).tofile(weights)
    reseal(bundle, lambda record: None)
    load(bundle, device="tensorrt")
    assert len(fake_gpu) == 2, "though it is the same graph"


def test_a_city_larger_than_the_profile(desk, bundle, fake_gpu, monkeypatch):
    monkeypatch.setattr(FAKE_TRT, "most", 40)
    with pytest.raises(BadData, match="not made for") as caught:
        load(bundle, device="tensorrt").predict(*tables(desk))
    assert "[77," in caught.value.found
    assert "--profile" in caught.value.fix


def test_a_zip_is_to_be_unpacked(bundle, fake_gpu):
    packed = shutil.make_archive(str(bundle.with_name("packed")), "zip", bundle)
    with pytest.raises(UsageError, match="unzip"):
        load(packed, device="tensorrt")
    assert "mapped, not unpacked" in load(packed, device="auto").chosen.instead_of["tensorrt"]


class TestWays:
    def test_without_a_driver(self, bundle, monkeypatch):
        def absent():
            raise NoDevice("no NVIDIA driver", expected="libcuda.so.1")

        monkeypatch.setattr(tensorrt, "driver", absent)
        with pytest.raises(NoDevice, match="no NVIDIA driver"):
            load(bundle, device="tensorrt")
        predictor = load(bundle, device="auto")
        assert "no NVIDIA driver" in predictor.chosen.instead_of["tensorrt"]

    def test_without_any_library_both_reasons_are_given(self, fake_gpu, monkeypatch):
        def none(flavour=None):
            raise NoDevice("tensorrt is not installed", found="No module named 'tensorrt'")

        monkeypatch.setattr(tensorrt, "find_library", none)
        monkeypatch.setattr(onnxruntime.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
        with pytest.raises(NoDevice) as caught:
            find_way(("rtx",), threads=1)
        assert "No module named 'tensorrt'" in caught.value.found
        assert "ONNX Runtime's provider: ONNX Runtime" in caught.value.found

    def test_onnx_runtimes_provider_where_there_is_no_package(self, fake_gpu, monkeypatch):
        def none(flavour=None):
            raise NoDevice("tensorrt is not installed")

        monkeypatch.setattr(tensorrt, "find_library", none)
        monkeypatch.setattr(tensorrt, "check_device", lambda device: None)
        way = find_way(threads=1)
        assert isinstance(way, Provider)
        assert "for there is no package of TensorRT's own: tensorrt is not installed" in way.how

    def test_the_flavour_of_the_bundle_comes_first(self, fake_gpu, monkeypatch):
        installed = {"tensorrt": FAKE, "rtx": Library(flavour="rtx", version="1.7", module=FAKE_TRT)}
        monkeypatch.setattr(tensorrt, "find_library", lambda flavour=None: installed[flavour or "tensorrt"])
        assert find_way(("rtx",), threads=1).runtime == "rtx"
        assert find_way((), threads=1).runtime == "tensorrt"

    def test_the_profile_in_onnx_runtimes_words(self, demo_bundle):
        graph = demo_bundle / "models" / "topt.onnx"
        target = TensorRTNetwork(
            graph=graph, graph_sha256="", weights_sha256="", precision="fp32",
            profile={"regions": ProfileRange(min=1, opt=77, max=500)},
        )  # fmt: skip
        told = provider_shapes(target)
        names = list(graph_inputs(graph.read_bytes()))
        poi = next(dims[1] for name, dims in graph_inputs(graph.read_bytes()).items() if name == "poi")
        assert told.keys() == {"trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"}
        assert f"poi:77x{poi}" in told["trt_profile_opt_shapes"].split(",")
        assert [part.split(":")[0] for part in told["trt_profile_max_shapes"].split(",")] == names


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama"])
def test_dimensions_of_a_graph_are_what_onnx_runtime_says(family, encoders):
    graphs = sorted(encoders(family).glob("*.standard.onnx"))
    assert len(graphs) >= 2
    for graph in graphs:
        made = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        assert graph_inputs(graph.read_bytes()) == {value.name: tuple(value.shape) for value in made.get_inputs()}


class TestEncoder:
    """Its networks as engines, on a bundle whose form for TensorRT is a copy of the standard one."""

    @pytest.fixture(params=["text", "qwen2_5_vl"])
    def encoder(self, request, encoders, tmp_path, reseal):
        folder = shutil.copytree(encoders(request.param), tmp_path / "encoder.topt")

        def add(record):
            for name, network in record["networks"].items():
                graph = folder / network["graphs"]["standard"]
                file = f"{name}.tensorrt.onnx"
                shutil.copy(graph, folder / file)
                sizes = {dim for dims in graph_inputs(graph.read_bytes()).values() for dim in dims}
                profile = {dim: [1, 64, 300] for dim in sizes if isinstance(dim, str)}
                network["graphs"]["tensorrt"] = file
                network["tensorrt"] = {
                    "flavour": "tensorrt", "profile": profile, "library": None, "engines": {}, "checked": [],
                }  # fmt: skip
                record["files"][file] = {"size": 0, "sha256": ""}

        reseal(folder, add)
        reseal(folder, lambda record: None)
        return folder

    def test_vectors_are_the_cpus(self, encoder, fake_gpu):
        on_cpu, on_gpu = (open_encoder(encoder, device=device, threads=1) for device in ("cpu", "tensorrt"))
        prompts = [asked(on_cpu.encoder, region, on_cpu.spec.family) for region in REGIONS]
        found, expected = (opened.encoder.vectors(prompts) for opened in (on_gpu, on_cpu))
        assert np.abs(found - expected).max() < 1e-5
        assert on_gpu.encoder.runtime == "tensorrt"
        assert on_gpu.encoder.backend.chunk == 300, "the profile's most"
        assert (on_gpu.device.used, on_gpu.device.how) == ("tensorrt", "TensorRT 11.0 by its own Python package")
        built = len(fake_gpu)
        assert built == len(json.loads((encoder / "manifest.json").read_text())["networks"])
        open_encoder(encoder, device="auto", threads=1)
        assert len(fake_gpu) == built, "kept"

    def test_a_changed_graph_is_refused(self, encoder, fake_gpu):
        graph = encoder / "decoder.tensorrt.onnx"
        graph.write_bytes(graph.read_bytes()[:-1])
        with pytest.raises(BadBundle):
            open_encoder(encoder, device="tensorrt")
        assert fake_gpu == []

    def test_the_self_test_runs_there(self, encoder, fake_gpu, topt_run):
        said = topt_run("selftest", encoder, "--device", "tensorrt")
        assert said.code == 0, said.err
        assert "self-test passed on tensorrt (fp32)" in said.out
