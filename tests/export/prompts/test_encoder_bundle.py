"""Exported encoders: what their graphs are made of, what the manifest records, and when one is left as it is."""

import json
import re
import shutil
from collections import Counter

import numpy as np
import onnx
import pytest
from encoders_exported import FAMILIES
from graphs import scales_of_other_channels, stale_question, stale_wording

from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
from topt_deploy.bundle.manifest import open_bundle
from topt_deploy.bundle.tolerances import PROMPTS as TOLERANCE
from topt_deploy.errors import BadBundle, UsageError
from topt_deploy.export.prompts import encoder_bundle as module
from topt_deploy.export.prompts.assemble import Assembled
from topt_deploy.export.prompts.encoder_bundle import make_encoder
from topt_deploy.export.prompts.lower import STANDARD
from topt_deploy.export.prompts.parity_gate import Way, gate, ways
from topt_deploy.prompts.golden_regions import read_golden
from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
from topt_deploy.prompts.templates import Templates, load_templates
from topt_deploy.runtime.processor import deciding_sets
from topt_deploy.runtime.prompt_encoder import CHUNKS
from topt_deploy.storage.hashed_file import sha256_file

pytestmark = pytest.mark.slow

WAYS = ways(whole=False, engines=False)
"""The ways in which an encoder serves on a processor."""


def operators(bundle, network, form):
    graph = onnx.load(bundle / f"{network}.{form}.onnx", load_external_data=False)
    return Counter((node.domain, node.op_type) for node in graph.graph.node)


def types(bundle, network, form):
    graph = onnx.load(bundle / f"{network}.{form}.onnx", load_external_data=False)
    return {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.graph.initializer}


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_graphs_hold_standard_operators_alone(encoders, family):
    bundle = encoders(family)
    networks = open_encoder_bundle(bundle).manifest.networks
    assert set(networks) == {"text": {"decoder"}, "mllama": {"vision", "cross", "decoder"}}.get(
        family, {"vision", "decoder"}
    )
    for network in networks:
        onnx.checker.check_model(str(bundle / f"{network}.standard.onnx"))
        graph = onnx.load(bundle / f"{network}.standard.onnx", load_external_data=False)
        assert [opset.domain for opset in graph.opset_import] == [""]
        assert {domain for domain, _ in operators(bundle, network, "standard")} == {""}
        assert {domain for domain, _ in operators(bundle, network, "onnxruntime")} <= {"", "com.microsoft"}


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_4_bits_are_qdq_in_the_standard_form_and_the_vision_network_has_8(encoders, family):
    bundle = encoders(family, "int4")
    standard, ours = (operators(bundle, "decoder", form) for form in ("standard", "onnxruntime"))
    # o of 32 inputs, q k v gate up too; down has 48, which are no whole blocks, and kept ones are int8.
    kept = len(open_encoder_bundle(bundle).manifest.kept)
    assert ours["com.microsoft", "MatMulNBits"] == 6 * 2 - kept
    assert standard["", "DequantizeLinear"] == 7 * 2
    kinds = types(bundle, "decoder", "standard")
    assert Counter(kinds[name] for name in kinds if name.endswith((".uint4", ".codes"))) == {
        "UINT4": 12 - kept, "INT8": 2 + kept,
    }  # fmt: skip
    if family == "qwen2_5_vl":
        kinds = set(types(bundle, "vision", "standard").values())
        assert "INT8" in kinds
        assert "UINT4" not in kinds


def test_half_precision_is_half_the_file(encoders):
    sizes = {p: (encoders("text", p) / "decoder.weights").stat().st_size for p in ("fp32", "fp16")}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert {"FLOAT16"} == {
        kind for name, kind in types(encoders("text", "fp16"), "decoder", "standard").items() if name.endswith(".half")
    }


def test_layers_that_read_an_outlier_are_kept_and_recorded(encoders):
    manifest = open_encoder_bundle(encoders("text", "int8")).manifest
    expected = {f"model.layers.1.self_attn.{part}_proj": "fp16" for part in "kqv"}
    assert manifest.kept.items() >= expected.items()
    assert not any("layers.0." in name for name in manifest.kept)
    for form in ("standard", "onnxruntime"):
        kinds = types(encoders("text", "int8"), "decoder", form)
        assert {name.removesuffix(".half") for name in kinds if name.endswith(".half")} == set(manifest.kept)
    coarser = open_encoder_bundle(encoders("text", "int4")).manifest.kept
    assert coarser
    assert set(coarser.values()) == {"int8"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_manifest_records_what_was_measured(encoders, family):
    manifest = open_encoder_bundle(encoders(family)).manifest
    assert manifest.tolerance == TOLERANCE["fp32"]
    assert manifest.source["reference"] == "transformers"
    engines = {(p["form"], p["engine"]) for p in manifest.parity}
    assert {("onnxruntime", "onnxruntime"), ("standard", "onnxruntime")} <= engines
    for engine in engines:
        measured = [p for p in manifest.parity if (p["form"], p["engine"]) == engine]
        assert [p["images"] for p in measured] == ([0, 0, 0] if family == "text" else [0, 1, 3])
        assert len({p["tokens"] for p in measured}) == 3
        assert all(p["cosine"] > 0.999999 and 0 < p["difference"] < 1e-4 for p in measured)


def test_golden_regions_travel_with_pytorchs_vectors(encoders):
    bundle = open_encoder_bundle(encoders("qwen2_5_vl"))
    regions, expected = read_golden(bundle)
    assert tuple(region.name for region in regions) == bundle.manifest.golden
    assert [len(region.images) for region in regions] == [0, 1, 3]
    sizes = [image.shape for region in regions for image in region.images]
    assert len(set(sizes)) == len(sizes), "no two of one size"
    assert list(expected) == list(bundle.templates.questions)
    assert {vectors.shape for vectors in expected.values()} == {(3, 32)}


class TestGate:
    """The gate and the self-test alike: both are given the same faulty bundle."""

    @pytest.fixture
    def bundle(self, encoders, tmp_path, request):
        family, precision = getattr(request, "param", ("qwen2_5_vl", "fp32"))
        return shutil.copytree(encoders(family, precision), tmp_path / "encoder.topt")

    @staticmethod
    def gate(bundle, way=WAYS[0]):
        opened = open_encoder_bundle(bundle)
        return gate(opened, np.stack(list(read_golden(opened)[1].values()), axis=1), way)

    def refused(self, topt_run, bundle, match, ways=WAYS):
        for way in ways:
            with pytest.raises(BadBundle, match=match.format("parity gate failed")):
                self.gate(bundle, way)
        for engine in {way.engine for way in ways}:
            said = topt_run("selftest", bundle, "--encoder-engine", engine)
            assert said.code == 76
            assert re.search(match.format("self-test failed"), said.err)

    @pytest.mark.parametrize("way", WAYS, ids=str)
    def test_lets_pass_what_is_right(self, bundle, way):
        measured = self.gate(bundle, way)
        assert tuple(m.region for m in measured) == open_encoder_bundle(bundle).manifest.golden
        assert {(m.form, m.engine) for m in measured} == {(way.form, way.engine)}

    @pytest.mark.parametrize(("network", "region"), [("decoder", "golden-0"), ("vision", "golden-1")])
    def test_refuses_a_weight_that_is_another(self, bundle, reseal, topt_run, network, region):
        weights = np.fromfile(bundle / f"{network}.weights", np.float32)
        weights[np.argsort(np.abs(weights))[-40:]] *= 1.2
        weights.tofile(bundle / f"{network}.weights")
        reseal(bundle, lambda record: None)
        self.refused(topt_run, bundle, f"{{}} on {region}")

    def test_refuses_a_graph_that_computes_otherwise(self, bundle, reseal):
        file = bundle / "decoder.standard.onnx"
        graph = onnx.load(file, load_external_data=False)
        (node, *_) = (node for node in graph.graph.node if node.op_type == "Sigmoid")
        node.op_type = "Tanh"
        file.write_bytes(graph.SerializeToString())
        reseal(bundle, lambda record: None)
        with pytest.raises(BadBundle, match="parity gate failed") as refused:
            self.gate(bundle, Way(form=STANDARD, engine="onnxruntime"))
        assert "higher --encoder-precision" in refused.value.fix
        assert self.gate(bundle), "the other form is as it was"

    @pytest.mark.parametrize("bundle", [("text", "int8")], indirect=True)
    def test_refuses_scales_of_other_channels(self, bundle, reseal, topt_run):
        scales_of_other_channels(bundle)
        reseal(bundle, lambda record: None)
        self.refused(topt_run, bundle, "{} on golden-0")

    @pytest.mark.parametrize("bundle", [("text", "fp32"), ("text", "int4")], indirect=True)
    @pytest.mark.parametrize("stale", [stale_question, stale_wording])
    def test_refuses_a_stale_template(self, bundle, reseal, topt_run, stale):
        """In few bits another question moves the vectors by less than the rounding does: it is told by its hash."""
        reseal(bundle, stale)
        self.refused(topt_run, bundle, "made with another template")

    @pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
    def test_refuses_expected_vectors_that_are_not_pytorchs(self, bundle, value):
        with pytest.raises(BadBundle, match="parity gate failed"):
            gate(open_encoder_bundle(bundle), np.full((3, 3, 32), value, np.float32), WAYS[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_region_is_read_in_parts_by_every_engine(encoders, family):
    bundle = open_encoder_bundle(encoders(family))
    host = bundle.spec.host(bundle.read("tokenizer.json"))
    lengths = [len(host.prompt(r.text, (), [""]).sequences[0].ids) for r in read_golden(bundle)[0]]
    assert min(lengths) < max(CHUNKS.values()) < max(lengths)


def test_the_manifest_names_the_instruction_sets_of_the_gate(encoders, reseal, tmp_path):
    bundle = shutil.copytree(encoders("text"), tmp_path / "encoder.topt")
    assert open_encoder_bundle(bundle).manifest.gated_on == deciding_sets()
    reseal(bundle, lambda record: record.pop("gated_on"))
    assert open_encoder_bundle(bundle).manifest.gated_on is None, "an older bundle still opens"


class TestMake:
    def make(self, model, place, said=None, **changed):
        settings = {"precision": "fp32", "templates": None, "max_pixels": None} | changed
        return make_encoder(str(model), place, **settings, say=(said if said is not None else []).append)

    def test_one_that_is_there_is_left_as_it_is(self, tiny_models, encoders, tmp_path, monkeypatch):
        place = shutil.copytree(encoders("text"), tmp_path / "encoder.topt")
        monkeypatch.setattr(module, "export_encoder", None)
        said = []
        assert self.make(tiny_models("text"), place, said).sha256 == open_encoder_bundle(encoders("text")).sha256
        assert "already exists" in said[-1]
        own = tmp_path / "own.toml"
        own.write_text('[tasks.noise]\nquestion = "How loud is it here?"\n')
        for changed in ({"precision": "int8"}, {"templates": own}):
            with pytest.raises(UsageError, match="another encoder is already there"):
                self.make(tiny_models("text"), place, **changed)
        with pytest.raises(UsageError, match="another encoder is already there"):
            self.make(tiny_models("qwen2_5_vl"), place)

    @pytest.fixture
    def traced(self, encoders, monkeypatch):
        """Export without the seconds of tracing: the networks are given."""

        def assemble(network, load, kept, precision, folder, forms):
            for file in encoders("text").glob(f"{network.name}.*"):
                shutil.copy(file, folder)
            graphs = {form: folder / f"{network.name}.{form}.onnx" for form in forms}
            return Assembled(graphs=graphs, weights=folder / f"{network.name}.weights")

        monkeypatch.setattr(module, "assemble", assemble)
        return assemble

    def test_the_gate_says_what_it_ran_on(self, traced, tiny_models, tmp_path):
        said = []
        self.make(tiny_models("text"), tmp_path / "encoder.topt", said)
        assert [line.partition(":")[0].strip() for line in said if "smallest cosine" in line] == [
            str(way) for way in ways(whole=True, engines=False)
        ]

    @pytest.mark.parametrize("fault", ["another weight", "another template"])
    def test_nothing_is_left_where_the_gate_fails(self, fault, traced, tiny_models, tmp_path, monkeypatch):
        if fault == "another template":
            stale = load_templates().as_dict()
            stale_question({"templates": stale})
            monkeypatch.setattr(Templates, "as_dict", lambda self: stale)
        else:

            def assemble(*arguments):
                done = traced(*arguments)
                weights = np.fromfile(done.weights, np.float32)
                weights[np.argsort(np.abs(weights))[-40:]] *= 1.2
                weights.tofile(done.weights)
                return done

            monkeypatch.setattr(module, "assemble", assemble)
        with pytest.raises(BadBundle, match=fault if fault == "another template" else "parity gate failed"):
            self.make(tiny_models("text"), tmp_path / "encoder.topt")
        assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []

    def test_an_unknown_precision(self, tiny_models, tmp_path):
        with pytest.raises(UsageError, match="no such precision"):
            self.make(tiny_models("text"), tmp_path / "encoder.topt", precision="int3")


def test_several_cities_refer_to_one_encoder_by_hash(prompted):
    facts = {name: open_bundle(prompted / name).manifest.encoder for name in ("model.topt", "beside.topt")}
    sha256 = sha256_file(prompted / "encoder.topt" / "manifest.json")
    assert {name: fact["sha256"] for name, fact in facts.items()} == dict.fromkeys(facts, sha256)
    assert {name: fact["bundle"] for name, fact in facts.items()} == {"model.topt": None, "beside.topt": "encoder.topt"}
    assert not (prompted / "beside.topt" / "encoder").exists()
    assert sha256_file(prompted / "model.topt" / "encoder" / "manifest.json") == sha256


def test_a_city_is_not_exported_with_another_encoder(prompted, encoders, topt_deploy, tmp_path):
    (run,) = (prompted / "runs").iterdir()
    out = tmp_path / "city.topt"
    said = topt_deploy("export", run, "--out", out, "--encoder-bundle", encoders("qwen2_5_vl"))
    assert said.code == 2
    assert "prompts of another encoder" in said.err
    assert not out.exists()


def test_the_command_refers_to_an_encoder_that_is_there(prompted, topt_deploy, tmp_path, tiny_models):
    (run,) = (prompted / "runs").iterdir()
    encoder = shutil.copytree(prompted / "encoder.topt", tmp_path / "encoder.topt")
    arguments = ("--prompt-encoder", tiny_models("text"), "--encoder-precision", "fp32", "--encoder-bundle", encoder)
    said = topt_deploy("export", "--encoder-only", *arguments)
    assert said.code == 0, said.err
    said = topt_deploy("export", run, "--out", tmp_path / "city.topt", "--zip", *arguments)
    assert said.code == 0, said.err
    assert open_bundle(tmp_path / "city.topt").manifest.encoder["bundle"] == "encoder.topt"
    said = topt_deploy("export", "--encoder-only", "--prompt-encoder", tiny_models("text"))
    assert said.code == 2


def test_templates_travel_with_the_encoder(encoders):
    bundle = open_encoder_bundle(encoders("mllama"))
    assert bundle.templates.whole_sha256 == load_templates().whole_sha256
    assert json.dumps(dict(bundle.manifest.templates)) == json.dumps(load_templates().as_dict())


def test_the_tokenizer_is_the_checkpoints(encoders, tiny_models):
    checkpoint = open_checkpoint(str(tiny_models("deepseek_vl2")))
    assert (encoders("deepseek_vl2") / "tokenizer.json").read_bytes() == checkpoint.tokenizer
