"""Prompt encoders for TensorRT: every family's networks in the third form, what they say, and that they build."""

import json
import shutil
from collections import Counter
from functools import cache
from itertools import product
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from encoders_exported import FAMILIES
from engines import rtx

from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
from topt_deploy.bundle.tolerances import PROMPTS as TOLERANCE
from topt_deploy.errors import BadBundle, UsageError
from topt_deploy.export.prompts import assemble as module
from topt_deploy.export.prompts.checkpoint_tensors import Tensors, recipe
from topt_deploy.export.prompts.default_profiles import default_profile, of_network
from topt_deploy.export.prompts.layerwise import Layerwise
from topt_deploy.export.prompts.lower import TENSORRT
from topt_deploy.export.prompts.outliers import LIMITS, Outliers
from topt_deploy.export.prompts.parity_gate import reference
from topt_deploy.export.tensorrt_engines import EngineTarget, make_engines
from topt_deploy.hardening.onnx_operators import check_graph
from topt_deploy.prompts.golden_regions import read_golden, reproduce
from topt_deploy.prompts.graph_backend import VISION, GraphBackend
from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
from topt_deploy.runtime.backends.onnxruntime import MappedSession
from topt_deploy.tensorrt.build import build_engine
from topt_deploy.tensorrt.library import RTX
from topt_deploy.tensorrt.profile import ProfileRange

pytestmark = pytest.mark.slow

PRECISIONS = ("fp16", "int8", "int4")


@pytest.fixture(scope="module")
def graphs(tiny_models, encoders, tmp_path_factory):
    """A family's graphs for TensorRT in a precision: the files, by network, and the networks."""
    trace = cache(module.trace)

    @cache
    def opened(family):
        checkpoint = open_checkpoint(str(tiny_models(family)))
        return checkpoint, recipe(checkpoint)

    @cache
    def make(family, precision):
        checkpoint, made = opened(family)
        tensors = Tensors(checkpoint, made.canonical)
        kept = lossy_maps(open_encoder_bundle(encoders(family)), made.networks, tensors, precision)
        folder = tmp_path_factory.mktemp(f"{family}-{precision}")
        with patch.object(module, "trace", trace):
            for network in made.networks:
                own = "int8" if network.name == VISION and precision == "int4" else precision
                module.assemble(network, tensors.load, kept, own, folder, [TENSORRT])
        return {network: folder / f"{network.name}.tensorrt.onnx" for network in made.networks}, checkpoint.spec

    return make


def lossy_maps(bundle, networks, tensors, precision):
    """The maps that the exporter keeps in more bits, by the bundle's golden regions."""
    if precision not in LIMITS:
        return {}
    outliers = Outliers(precision=precision)
    backend = backend_of(bundle, Layerwise(networks=networks, load=tensors.load, observe=outliers).runners())
    host = bundle.spec.host(bundle.read("tokenizer.json"))
    reference(host, backend, read_golden(bundle)[0], list(bundle.templates.questions.values()))
    return outliers.kept()


def backend_of(bundle, runners):
    """A bundle's encoder, run by these."""
    facts = bundle.manifest.embedding
    embedding = np.frombuffer(bundle.read("embedding.weights"), facts["dtype"]).reshape(facts["shape"])
    return GraphBackend(runners, embedding=embedding, past=bundle.manifest.past, spec=bundle.spec, chunk=64)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_network_builds_for_two_capabilities(graphs, family, precision):
    rtx()
    files, spec = graphs(family, precision)
    profile = default_profile(spec)
    assert profile["past"].min == 0
    target = EngineTarget(flavour=RTX, precision=precision, capabilities=("8.0", "8.9"))
    for network, file in files.items():
        own = of_network(network, profile)
        made = make_engines(target, file, own)
        assert set(made.engines) == {"8.0", "8.9"}
        assert all(path.stat().st_size > 100_000 for path in made.engines.values())
        assert made.as_record(own, file.parent)["profile"] == {name: sizes.as_list() for name, sizes in own.items()}


@pytest.mark.parametrize(
    ("family", "precision"), [*product(FAMILIES, PRECISIONS), ("text", "fp32"), ("deepseek_vl2", "fp32")]
)
def test_it_says_what_pytorch_says(graphs, encoders, family, precision):
    """What PyTorch said when the family's bundle was made; in float32 where experts see all tokens."""
    files, spec = graphs(family, precision)
    bundle = open_encoder_bundle(encoders(family))
    regions, expected = read_golden(bundle)
    host = spec.host(bundle.read("tokenizer.json"))
    backend = backend_of(bundle, {network.name: MappedSession(file) for network, file in files.items()})
    questions, vectors = list(bundle.templates.questions.values()), np.stack(list(expected.values()), axis=1)
    measured = [
        reproduce(
            backend, host.prompt(region.text, region.images, questions), of_region, TOLERANCE[precision],
            failed=region.name, fix="",
        )
        for region, of_region in zip(regions, vectors, strict=True)
    ]  # fmt: skip
    assert (max(difference for _, difference in measured) > 1e-4) == (precision != "fp32"), (
        "fewer bits than float32 indeed"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_maps_and_attention_are_in_half_and_softmax_is_not(graphs, family):
    for precision in PRECISIONS:
        files, _ = graphs(family, precision)
        for network, file in files.items():
            proto = onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False))
            assert [opset.domain for opset in proto.opset_import] == [""]
            check_graph(file.read_bytes(), {path.name: path.stat().st_size for path in file.parent.iterdir()})
            kinds = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
            made = {name: node.op_type for node in proto.graph.node for name in node.output}
            held = {tensor.name for tensor in proto.graph.initializer}
            for node in proto.graph.node:
                if node.op_type == "Softmax":
                    assert kinds[node.output[0]] == onnx.TensorProto.FLOAT
                elif node.op_type == "MatMul" and (
                    node.input[1] in held or made.get(node.input[1]) == "DequantizeLinear"
                ):
                    assert kinds[node.output[0]] == onnx.TensorProto.FLOAT16, (network.name, node.name)
            dequantised = Counter(node.op_type for node in proto.graph.node)["DequantizeLinear"]
            assert (dequantised > 0) == (precision != "fp16")


def test_a_wrong_profile_names_the_dimension(graphs):
    library = rtx()
    files, spec = graphs("text", "fp16")
    ((network, file),) = files.items()
    profile = of_network(network, default_profile(spec))
    without = {name: sizes for name, sizes in profile.items() if name != "past"}
    with pytest.raises(UsageError, match="no sizes for dimension 'past' of input 'past_key_0'"):
        build_engine(library, file, without, capability="8.9")
    with pytest.raises(UsageError, match="has sizes for 'tiles'"):
        build_engine(library, file, {**profile, "tiles": ProfileRange(min=1, opt=1, max=4)}, capability="8.9")


@pytest.mark.parametrize(("precision", "operator"), [("int4", "MatMulNBits"), ("int8", "QuantizeLinear")])
def test_what_onnx_runtime_alone_can_do_is_named(encoders, precision, operator):
    """The other form of the same model: an operator of its own, and zero points that are not zero."""
    file = encoders("text", precision) / "decoder.onnxruntime.onnx"
    with pytest.raises(BadBundle) as refused:
        build_engine(rtx(), file, {}, capability="8.9")
    assert f"{operator} (node " in refused.value.found
    assert refused.value.file == str(file)


def test_the_command_makes_an_encoder_with_engines(tiny_models, topt_deploy, topt_run, tmp_path):
    rtx()
    out = tmp_path / "encoder.topt"
    said = topt_deploy(
        "export", "--encoder-only", "--prompt-encoder", tiny_models("text"), "--encoder-bundle", out,
        "--encoder-precision", "fp16", "--format", "trt", "--flavour", "rtx", "--capability", "8.9",
        "--profile", "1,32,128", "--profile", "past=0,64,256",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "decoder: checked by onnx.checker and TensorRT-RTX" in said.err
    manifest = open_encoder_bundle(out).manifest
    decoder = manifest.networks["decoder"]
    assert set(decoder["graphs"]) == {"onnxruntime", "standard", "tensorrt"}
    facts = decoder["tensorrt"]
    assert facts["flavour"] == "rtx"
    assert facts["profile"] == {"batch": [1, 1, 8], "tokens": [1, 32, 128], "past": [0, 64, 256]}
    assert facts["engines"] == {"8.9": "decoder.tensorrt.sm89.engine"}
    assert set(facts["engines"].values()) <= set(manifest.files), "hashed and sealed"
    assert [p["form"] for p in manifest.parity].count("tensorrt") == 3
    assert topt_run("info", out).code == 0
    made = ("--encoder-only", "--prompt-encoder", tiny_models("text"), "--encoder-bundle", out)
    made = ("export", *made, "--encoder-precision", "fp16")
    assert "already exists" in topt_deploy(*made).err
    asked = ("--format", "trt", "--flavour", "rtx", "--profile", "1,32,128")
    for more in (("--capability", "8.0", "--profile", "past=0,64,256"), ("--capability", "8.9")):
        said = topt_deploy(*made, *asked, *more)
        assert said.code == 2
        assert "another encoder is already there" in said.err
    assert "already exists" in topt_deploy(*made, *asked, "--capability", "8.9", "--profile", "past=0,64,256").err
    (out / "decoder.tensorrt.sm89.engine").write_bytes(b"another")
    assert topt_run("info", out).code == 76


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("profile"),
        lambda facts: facts["profile"].update(past=[2, 1, 0]),
        lambda facts: facts.update(engines={"8.9": "nowhere.engine"}),
        lambda facts: facts.update(engines={"8.9": "decoder.weights"}),
        lambda facts: facts.update(flavour="other"),
        lambda facts: facts.update(checked="all"),
    ],
    ids=["no profile", "wrong profile", "no engine", "no engine's name", "flavour", "checked"],
)
def test_a_manifest_that_is_not_of_that_form(encoders, reseal, tmp_path, change):
    bundle = shutil.copytree(encoders("text"), tmp_path / "encoder.topt")
    facts = {"flavour": "rtx", "profile": {"past": [0, 1, 2]}, "library": "x", "engines": {}, "checked": []}

    def add(record):
        record["networks"]["decoder"]["graphs"]["tensorrt"] = "decoder.standard.onnx"
        record["networks"]["decoder"]["tensorrt"] = facts

    reseal(bundle, add)
    open_encoder_bundle(bundle)
    change(facts)
    reseal(bundle, add)
    with pytest.raises(BadBundle, match=r"networks is not of the right form|no profile of past"):
        open_encoder_bundle(bundle)
    assert json.loads((bundle / "manifest.json").read_text())["networks"]["decoder"]["tensorrt"] == facts
