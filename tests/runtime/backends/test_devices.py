"""Encoders on a device, by I/O binding and by engines, give what they give on the host."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from commands import PATIENCE_S
from encoder_regions import REGIONS, asked
from encoders_exported import FAMILIES
from fake_gpu import FAKE_TRT, fake_libcuda

from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
from topt_deploy.errors import BadBundle, BadData, NoDevice
from topt_deploy.prompts.encode import _batches
from topt_deploy.prompts.graph_backend import GraphBackend, HostConnector
from topt_deploy.prompts.pooling import pooled
from topt_deploy.runtime.backends import onnxruntime as session
from topt_deploy.runtime.backends import onnxruntime_bound as bound_module
from topt_deploy.runtime.backends.onnxruntime_bound import GLUE, BoundConnector, BoundSession, OnDevice
from topt_deploy.runtime.backends.tensorrt import HostSession
from topt_deploy.runtime.backends.tensorrt_engine import Engine, EngineConnector, OnGpu, download, upload
from topt_deploy.runtime.prompt_encoder import open_encoder
from topt_deploy.tensorrt.cuda_driver import Driver
from topt_deploy.tensorrt.library import Library

ROOT = Path(__file__).resolve().parents[3]
MADE = runpy.run_path(str(ROOT / "scripts" / "glue_graphs.py"))
FLOAT = onnx.TensorProto.FLOAT
LIBRARY = Library(flavour="tensorrt", version="11.0", module=FAKE_TRT)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return Driver(str(fake_libcuda(tmp_path_factory.mktemp("cuda"))))


@pytest.fixture(scope="module")
def host(encoders):
    return {family: open_encoder(encoders(family), threads=1).encoder for family in FAMILIES}


def bound(bundle, form):
    files = {name: bundle.path / facts["graphs"][form] for name, facts in bundle.manifest.networks.items()}
    networks = {name: BoundSession(file, device="cpu", threads=1, exact=True) for name, file in files.items()}
    between = BoundConnector(networks["decoder"], networks.get("vision"), device="cpu", threads=1)
    return networks, between


def engines(bundle, driver):
    files = {name: bundle.path / facts["graphs"]["standard"] for name, facts in bundle.manifest.networks.items()}
    networks = {name: Engine(LIBRARY, f"path:{file}".encode(), driver) for name, file in files.items()}
    return networks, EngineConnector(driver, networks["decoder"], networks.get("vision"))


@pytest.mark.parametrize("how", ["bound, standard", "bound, onnxruntime", "engines"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_the_hosts(family, how, encoders, host, driver):
    bundle = open_encoder_bundle(encoders(family))
    networks, between = engines(bundle, driver) if how == "engines" else bound(bundle, how.split()[1])
    on_host = host[family]
    embedding = on_host.backend._embedding
    backend = GraphBackend(
        networks, embedding=embedding, past=bundle.manifest.past, spec=bundle.spec, chunk=50, between=between
    )
    prompts = [asked(on_host, region, family) for region in REGIONS]
    for together in _batches(prompts):
        expected = pooled(on_host.backend, together, chunk=50)
        assert np.abs(pooled(backend, together) - expected).max() < 1e-6
    for prompt in prompts:
        assert np.abs(pooled(backend, [prompt]) - pooled(on_host.backend, [prompt], chunk=50)).max() < 1e-6


def test_what_a_session_puts_out_stays_where_it_is(encoders):
    networks, _ = bound(open_encoder_bundle(encoders("qwen2_5_vl")), "standard")
    backend = open_encoder(encoders("qwen2_5_vl"), threads=1).encoder
    image = asked(backend, "one image, few words", "qwen2_5_vl").images[0]
    features = networks["vision"].run(image, ["features"])["features"]
    assert isinstance(features, OnDevice)
    assert len(features) == features.value.numpy().shape[0]


class TestSmallGraphs:
    def test_those_shipped_are_those_that_the_script_makes(self):
        made = dict(MADE["shipped_graphs"]())
        assert {path.name for path in GLUE.iterdir()} == made.keys()
        for name, graph in made.items():
            assert onnx.load(GLUE / name) == graph
            onnx.checker.check_model(graph, full_check=True)

    def test_what_they_compute(self):
        rng = np.random.default_rng(0)
        first, second = (rng.normal(size=(n, 6)).astype(np.float16) for n in (3, 4))
        text = rng.normal(size=(2, 6)).astype(np.float32)
        places = np.array([[-1, 0, 1], [6, -1, 2]])
        session = ort.InferenceSession(GLUE / "join-float16.onnx")
        (joined,) = session.run(None, {"first": first, "second": second})
        assert np.array_equal(joined, np.concatenate([first, second]))
        index = np.array([[0, 2, 3], [8, 1, 4]])
        session = ort.InferenceSession(GLUE / "place-float16-float32.onnx")
        (embeds,) = session.run(None, {"text": text, "features": joined, "index": index})
        assert np.array_equal(embeds, HostConnector().place(text, joined.astype(np.float32), places))


@pytest.mark.parametrize("how", ["bound", "engines"])
def test_embeddings_stand_in_their_places(how, driver, encoders):
    rng = np.random.default_rng(1)
    bundle = open_encoder_bundle(encoders("qwen2_5_vl"))
    width = bundle.spec.width
    parts = [rng.normal(size=(n, width)).astype(np.float32) for n in (3, 1, 5)]
    _, between = bound(bundle, "standard") if how == "bound" else engines(bundle, driver)
    for places in (
        np.array([[-1, 0, 1, 2], [3, 4, 5, -1]]), np.array([[8, 8, 8]]), np.array([[-1, -1, 0, 2, 1, -1, 7, 8]]),
        np.array([[0, 1], [2, 3], [-1, 0]]),
    ):  # fmt: skip
        text = rng.normal(size=(int((places < 0).sum()), width)).astype(np.float32)
        expected = HostConnector().place(text, np.concatenate(parts), places)
        if how == "bound":
            held = [OnDevice(ort.OrtValue.ortvalue_from_numpy(part), part) for part in parts]
            found = between.place(text, between.join(held), places).value.numpy()
        else:
            joined = between.join([upload(driver, part) for part in parts])
            found = download(driver, between.place(text, joined, places))
        assert np.array_equal(found, expected)


class TestEngines:
    @pytest.fixture
    def graph(self):
        return MADE["sums_graph"](FLOAT, FLOAT).SerializeToString()

    def test_arrays_of_the_host_go_through(self, graph, driver):
        engine = HostSession(Engine(LIBRARY, graph, driver), "by hand")
        rng = np.random.default_rng(0)
        inputs = {"select": rng.normal(size=(2, 3, 5)), "hidden": rng.normal(size=(2, 5, 4)).astype(np.float32)}
        found = engine.run(inputs, ["sums"])["sums"]
        np.testing.assert_allclose(found, inputs["select"] @ inputs["hidden"], rtol=1e-5)
        assert engine.inputs == ("select", "hidden")
        assert engine.outputs == ("sums",)
        assert "TensorRT 11.0 on NVIDIA Make-believe 0" in engine.provider

    def test_a_size_it_was_not_made_for(self, graph, driver, monkeypatch):
        monkeypatch.setattr(FAKE_TRT, "most", 16)
        engine = Engine(LIBRARY, graph, driver)
        many = {"select": np.ones((1, 1, 17)), "hidden": np.ones((1, 17, 4))}
        with pytest.raises(BadData, match="not made for select of this size") as caught:
            engine.run(many, ["sums"])
        assert (caught.value.expected, caught.value.found) == ("[0, 0, 0] to [16, 16, 16]", "[1, 1, 17]")
        assert "--profile" in caught.value.fix

    def test_an_engine_of_another_gpu(self, driver):
        with pytest.raises(NoDevice, match="does not run this engine here") as caught:
            Engine(LIBRARY, b"of another GPU", driver)
        assert "built for another device" in caught.value.found

    def test_memory_that_runs_out(self, graph, tmp_path, monkeypatch):
        driver = Driver(str(fake_libcuda(tmp_path)))
        engine = Engine(LIBRARY, graph, driver)
        monkeypatch.setenv("FAKE_CUDA_BYTES", "100")
        with pytest.raises(NoDevice, match="cuMemAllocAsync"):
            engine.run({"select": np.ones((1, 1, 50)), "hidden": np.ones((1, 50, 4))}, ["sums"])

    def test_features_of_another_type_than_embeddings_are_refused(self, driver):
        decoder = Engine(LIBRARY, (GLUE / "place-float16-float32.onnx").read_bytes(), driver)
        decoder.types["hidden"] = decoder.types["text"]
        vision = Engine(LIBRARY, (GLUE / "join-float16.onnx").read_bytes(), driver)
        vision.types["features"] = vision.types["joined"]
        with pytest.raises(BadBundle, match="another type"):
            EngineConnector(driver, decoder, vision)

    def test_what_it_puts_out_can_be_put_in(self, driver):
        engine = Engine(LIBRARY, (GLUE / "join-float32.onnx").read_bytes(), driver)
        once = engine.run({"first": np.ones((2, 4)), "second": np.zeros((0, 4))}, ["joined"])["joined"]
        assert isinstance(once, OnGpu)
        twice = engine.host({"first": once, "second": once}, ["joined"])["joined"]
        assert np.array_equal(twice, np.ones((4, 4), np.float32))

    def test_the_names_are_the_real_librarys(self):
        trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)")
        for kind, names in {
            "Runtime": ["deserialize_cuda_engine"],
            "ICudaEngine": [
                "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_profile_shape",
                "create_execution_context",
            ],
            "IExecutionContext": [
                "set_input_shape", "set_tensor_address", "infer_shapes", "get_tensor_shape", "execute_async_v3",
            ],
            "ILogger": ["ERROR", "log"], "TensorIOMode": ["INPUT", "OUTPUT"],
            "DataType": ["FLOAT", "HALF", "INT32", "INT64", "INT8", "UINT8", "BOOL"],
        }.items():  # fmt: skip
            assert [name for name in names if not hasattr(getattr(trt, kind), name)] == []

    def test_the_real_library_without_a_gpu_says_why(self, driver):
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)")
        # In a process of its own: what the library does with nonsense is not ours to know.
        code = (
            "import sys, tensorrt_rtx\n"
            "from topt_deploy.tensorrt.library import find_library\n"
            "from topt_deploy.errors import NoDevice\n"
            "from topt_deploy.tensorrt.cuda_driver import Driver\n"
            "from topt_deploy.runtime.backends.tensorrt_engine import Engine\n"
            "try:\n    Engine(find_library('rtx'), b'no engine' * 100, Driver(sys.argv[1]))\n"
            "except NoDevice as error:\n    print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, driver._cuda._name], capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert "TensorRT-RTX 1" in done.stdout, done.stderr
        assert "does not run this engine here" in done.stdout


class TestOnCuda:
    """What opens an encoder on CUDA, with the CPU's provider and memory in place of CUDA's."""

    @pytest.fixture(autouse=True)
    def _cuda_is_the_cpu(self, monkeypatch):
        monkeypatch.setitem(bound_module.MEMORY, "cuda", "cpu")
        monkeypatch.setattr(bound_module, "providers", lambda device, **_: [("CPUExecutionProvider", {})])
        monkeypatch.setattr(bound_module, "check_used", lambda made, device: None)
        monkeypatch.setattr(session, "check_device", lambda device: None)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_an_encoder(self, family, encoders, host):
        opened = open_encoder(encoders(family), device="cuda", threads=1)
        assert opened.encoder.runtime == "onnxruntime-cuda"
        assert (opened.device.used, opened.device.how) == ("cuda", "ONNX Runtime's CUDA provider")
        prompts = [asked(opened.encoder, region, family) for region in REGIONS]
        assert np.abs(opened.encoder.vectors(prompts) - host[family].vectors(prompts)).max() < 1e-5

    def test_auto_takes_it_where_there_is_no_form_for_tensorrt(self, encoders):
        opened = open_encoder(encoders("text", "int8"), device="auto", threads=1)
        assert opened.device.used == "cuda"
        assert list(opened.device.instead_of) == ["tensorrt"]

    def test_the_self_test_runs_there(self, encoders, topt_run):
        said = topt_run("selftest", encoders("qwen2_5_vl"), "--device", "cuda")
        assert said.code == 0, said.err
        assert "self-test passed on onnxruntime-cuda (fp32)" in said.out

    def test_a_changed_byte_is_refused_there_too(self, encoders, tmp_path):
        bundle = shutil.copytree(encoders("text"), tmp_path / "encoder.topt")
        graph = bundle / "decoder.standard.onnx"
        graph.write_bytes(graph.read_bytes()[:-1])
        with pytest.raises(BadBundle):
            open_encoder(bundle, device="cuda")


def test_a_bound_session_that_cannot_be_made_or_run(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(BadBundle, match="cannot load the graph") as caught:
        BoundSession(tmp_path / "no.onnx", device="cpu", exact=True)
    assert caught.value.file == str(tmp_path / "no.onnx")
    joining = BoundSession(GLUE / "join-float32.onnx", device="cpu", exact=True)
    with pytest.raises(BadBundle, match="cannot run the graph"):
        joining.run({"first": np.ones((1, 4)), "second": np.ones((1, 5))}, ["joined"])
    assert np.array_equal(
        joining.host({"first": np.ones((1, 4)), "second": np.ones((0, 4))}, ["joined"])["joined"], np.ones((1, 4))
    )
