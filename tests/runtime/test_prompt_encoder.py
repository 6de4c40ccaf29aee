"""The exported encoder on either engine against PyTorch, on inputs unlike what it was traced and gated with."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from encoder_regions import REGIONS, asked, pictures
from encoders_exported import EXPORTED, FAMILIES
from naive import naive

from topt_deploy.bundle.sealed import MANIFEST
from topt_deploy.bundle.tolerances import PROMPTS as TOLERANCE
from topt_deploy.errors import BadBundle, NoDevice, NoInput, UsageError
from topt_deploy.prompts import graph_backend
from topt_deploy.prompts.golden_regions import compare
from topt_deploy.prompts.pooling import pooled
from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
from topt_deploy.prompts.pytorch.load import torch_encoder
from topt_deploy.prompts.templates import load_templates
from topt_deploy.runtime.backends import onnxruntime
from topt_deploy.runtime.prompt_encoder import ENGINES, open_encoder


def needs(engine):
    if engine == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed (extra openvino)")


@pytest.fixture(scope="module")
def expected(tiny_models):
    """What PyTorch makes of a region, by family and region."""
    found = {}

    def vectors(family, region):
        if family not in found:
            encoder = torch_encoder(open_checkpoint(str(tiny_models(family))), device="cpu", precision="fp32")
            found[family] = {name: encoder.vectors([asked(encoder, name, family)])[0] for name in REGIONS}
        return found[family][region]

    return vectors


@pytest.fixture(scope="module")
def opened(encoders):
    """An exported encoder, by family, precision and engine."""
    found = {}

    def encoder(family, precision, engine):
        needs(engine)
        key = family, precision, engine
        if key not in found:
            found[key] = open_encoder(encoders(family, precision), engine=engine, threads=1).encoder
        return found[key]

    return encoder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
class TestInFullPrecision:
    def test_vectors_are_pytorchs(self, opened, expected, family, engine):
        encoder = opened(family, "fp32", engine)
        for region in REGIONS:
            found = encoder.vectors([asked(encoder, region, family)])[0]
            assert np.abs(found - expected(family, region)).max() < 1e-4, region

    def test_sharing_equals_a_pass_for_each_task(self, opened, family, engine):
        encoder = opened(family, "fp32", engine)
        for region in REGIONS:
            prompt = asked(encoder, region, family)
            for chunk in (None, 50):
                found = pooled(encoder.backend, [prompt], chunk=chunk)[0]
                assert np.abs(found - naive(encoder.backend, prompt)).max() < 1e-5, (region, chunk)

    def test_regions_together_are_what_they_are_alone(self, opened, family, engine):
        encoder = opened(family, "fp32", engine)
        prompts = [asked(encoder, region, family) for region in list(REGIONS)[:3]]
        together = encoder.vectors(prompts)
        alone = np.concatenate([encoder.vectors([prompt]) for prompt in prompts])
        assert np.abs(together - alone).max() < 2e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("family", "precision"), [(f, p) for f in FAMILIES for p in EXPORTED[f] if p != "fp32"])
def test_lower_precisions_are_within_their_tolerance_and_no_better_than_they_can_be(
    opened, expected, family, precision, engine
):
    encoder = opened(family, precision, engine)
    worst = 1.0
    for region in REGIONS:
        found = encoder.vectors([asked(encoder, region, family)])[0]
        cosine, difference = compare(expected(family, region), found)
        assert cosine >= TOLERANCE[precision]["cosine"], region
        assert difference <= TOLERANCE[precision]["difference"], region
        worst = min(worst, cosine)
    at_most = {"fp16": 1 - 1e-10, "int8": 1 - 1e-7, "int4": 0.999}
    assert worst < at_most[precision], "the weights are not rounded at all"


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_read_can_be_continued_again_and_otherwise(opened, engine):
    encoder = opened("text", "fp32", engine)
    backend, sequence = encoder.backend, asked(encoder, "a long text", "text").sequences[0]

    def read(state, start, stop):
        at = slice(start, stop)
        return backend.decode(state, backend.embed(sequence.ids[at])[None], sequence.positions[:, None, at], None)

    first, begun = read(backend.start([], 1), 0, 40)
    once, read_on = read(begun, 40, 60)
    other, _ = read(begun, 60, 75)
    behind, _ = read(read_on, 60, 75)
    again, _ = read(begun, 40, 60)
    assert np.array_equal(once, again)
    assert np.abs(other - behind).max() > 1e-3, "what stands between is not read"
    whole, _ = read(backend.start([], 1), 0, 75)
    assert np.abs(whole - np.concatenate([first, once, behind], axis=1)).max() < 1e-5


def test_token_embeddings_are_the_files_rows(encoders, opened):
    shape = json.loads((encoders("text") / MANIFEST).read_text())["embedding"]["shape"]
    table = np.fromfile(encoders("text") / "embedding.weights", np.float32).reshape(shape)
    ids = np.array([7, len(table) - 1, 0, 7])
    assert np.array_equal(opened("text", "fp32", "onnxruntime").backend.embed(ids), table[ids])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is looked up where Linux tells it")
def test_openvino_lets_go_of_the_weights_that_it_has_rearranged(encoders):
    needs("openvino")
    encoder = open_encoder(encoders("text"), engine="openvino", threads=1).encoder
    weights = str(encoders("text").resolve() / "decoder.weights")

    def resident():
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        mapped = [next(line for line in lines if line.startswith("Rss:")) for line in lines if line.endswith(weights)]
        return [int(line.split()[1]) for line in mapped]

    assert sum(resident()) > 0
    before = len(resident())
    embeds = encoder.backend.embed(np.arange(9))[None]
    first, _ = encoder.backend.decode(encoder.backend.start([], 1), embeds, np.arange(9)[None, None], None)
    assert resident() == [0] * before, "mapped, and not in memory"
    again, _ = encoder.backend.decode(encoder.backend.start([], 1), embeds, np.arange(9)[None, None], None)
    assert np.array_equal(first, again)


def test_openvino_leaves_onnx_runtime_alone(encoders):
    needs("openvino")
    code = (
        "import sys; from pathlib import Path; sys.modules['onnxruntime'] = None\n"
        "from topt_deploy.runtime.prompt_encoder import open_encoder\n"
        f"print(open_encoder(Path({str(encoders('text'))!r}), engine='openvino').encoder.runtime)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "openvino", done.stderr


def test_images_change_vectors(opened):
    encoder = opened("qwen2_5_vl", "int8", "onnxruntime")
    one, other = (
        encoder.vectors([encoder.prompt("Where?", [picture], [""])]) for picture in pictures([(90, 90), (90, 90)])
    )
    assert np.abs(one - other).max() > 1e-3


def test_what_it_is_travels_with_it(encoders, tiny_models):
    checkpoint = open_checkpoint(str(tiny_models("qwen2_5_vl")))
    found = open_encoder(encoders("qwen2_5_vl", "int4"))
    assert json.dumps(asdict(found.spec)) == json.dumps(asdict(checkpoint.spec))
    assert found.encoder.precision == "int4"
    assert found.encoder.runtime == "onnxruntime"
    assert found.templates == load_templates()
    other = open_encoder(encoders("qwen2_5_vl", "int8"))
    assert other.spec.identity == found.spec.identity
    assert other.encoder.sha256 != found.encoder.sha256


class TestRefused:
    @pytest.fixture
    def bundle(self, encoders, tmp_path):
        return shutil.copytree(encoders("qwen2_5_vl"), tmp_path / "encoder.topt")

    # The other form's graphs and the golden regions are not read, and are left to `topt-run selftest`.
    @pytest.mark.parametrize(
        "name",
        [
            "manifest.json", "manifest.json.sha256", "tokenizer.json", "embedding.weights", "vision.weights",
            "decoder.weights", "vision.onnxruntime.onnx", "decoder.onnxruntime.onnx",
        ],
    )  # fmt: skip
    def test_a_changed_byte(self, bundle, name):
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)
        with pytest.raises(BadBundle, match=r"not the file|sealed"):
            open_encoder(bundle)

    def test_a_changed_byte_of_the_other_engines_form(self, bundle):
        needs("openvino")
        (bundle / "decoder.standard.onnx").write_bytes(bytes(len((bundle / "decoder.standard.onnx").read_bytes())))
        open_encoder(bundle)
        with pytest.raises(BadBundle, match=r"decoder\.standard\.onnx is not the file"):
            open_encoder(bundle, engine="openvino")

    def test_a_file_too_many_or_too_few(self, bundle):
        (bundle / "more").write_text("more")
        with pytest.raises(BadBundle, match="not listed"):
            open_encoder(bundle)
        (bundle / "more").unlink()
        (bundle / "tokenizer.json").unlink()
        with pytest.raises(BadBundle, match=r"missing: tokenizer\.json"):
            open_encoder(bundle)

    def test_a_file_that_changes_while_it_is_read(self, bundle, monkeypatch):
        load = onnxruntime.MappedSession

        def meanwhile(path, **settings):
            path.touch()
            return load(path, **settings)

        monkeypatch.setattr(onnxruntime, "MappedSession", meanwhile)
        with pytest.raises(BadBundle, match="changed while they were read"):
            open_encoder(bundle)

    def test_a_zip(self, bundle):
        packed = bundle.with_name("packed.topt")
        with zipfile.ZipFile(packed, "w") as archive:
            for file in (f for f in bundle.rglob("*") if f.is_file()):
                archive.write(file, file.relative_to(bundle))
        with pytest.raises(UsageError, match="unzip the bundle"):
            open_encoder(packed)

    def test_an_unknown_engine_an_absent_one_and_an_absent_bundle(self, bundle, monkeypatch):
        with pytest.raises(UsageError, match="no such engine"):
            open_encoder(bundle, engine="tensorrt")
        monkeypatch.setattr(graph_backend, "find_spec", lambda name: None)
        with pytest.raises(NoDevice, match="OpenVINO is not installed"):
            open_encoder(bundle, engine="openvino")
        with pytest.raises(NoInput, match="no such bundle"):
            open_encoder(bundle.with_name("absent.topt"))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("schema_version", 2), ("spec", []), ("templates", []), ("golden", "golden-0"),
            ("tolerance", {"cosine": 1}),
            ("embedding", {"dtype": "float32", "shape": [3]}), ("embedding", {"dtype": "object", "shape": [3, 4]}),
            ("embedding", {"dtype": "float32", "shape": [3, 5]}), ("past", {"past_key_0": [0, 8]}), ("networks", {}),
            ("networks", {"decoder": {"graphs": {"onnxruntime": "/etc/passwd"}, "weights": "decoder.weights"}}),
            ("networks", {"decoder": {"graphs": {}, "weights": "decoder.weights"}}),
        ],
    )  # fmt: skip
    def test_a_manifest_that_someone_made_up_and_sealed(self, bundle, reseal, key, value):
        record = json.loads((bundle / MANIFEST).read_text())
        assert key in record
        reseal(bundle, lambda record: record.update({key: value}))
        with pytest.raises(BadBundle):
            open_encoder(bundle)
