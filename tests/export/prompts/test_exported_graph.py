"""A text encoder that comes as a graph, as optimum exports one for feature extraction: packed, gated and served."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from encoders_text import tiny_text
from onnx import helper, numpy_helper

from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
from topt_deploy.errors import BadBundle, BadConfig, BadData, NoDevice, UsageError
from topt_deploy.export.prompts.encoder_bundle import make_encoder
from topt_deploy.export.prompts.exported_graph import is_graph
from topt_deploy.prompts.golden_regions import read_golden
from topt_deploy.runtime.prompt_encoder import load_encoder, open_encoder

INPUTS = ("input_ids", "attention_mask", "position_ids")


class FeatureExtraction(torch.nn.Module):
    """What optimum exports: the model without its head, of ids, mask and positions."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder that optimum would write, and the model that it was made of."""
    folder = tmp_path_factory.mktemp("optimum") / "tiny"
    model = tiny_text(folder)
    (folder / "model.safetensors").unlink()
    example = tuple(torch.arange(6).reshape(1, 6) * k + (k == 0) for k in (1, 0, 1))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program = torch.onnx.export(
        FeatureExtraction(model.model), example, input_names=INPUTS, output_names=["last_hidden_state"],
        dynamic_shapes=dict.fromkeys(INPUTS, axes), dynamo=True, verbose=False,
    )  # fmt: skip
    program.save(folder / "model.onnx")
    return folder, model


@pytest.fixture
def graph(exported, tmp_path):
    """A copy of the folder, to be spoilt."""
    return shutil.copytree(exported[0], tmp_path / "tiny")


@pytest.fixture(scope="module")
def bundle(exported, tmp_path_factory):
    return make(exported[0], tmp_path_factory.mktemp("bundle") / "tiny.topt")


def make(folder, out, **changed):
    settings = {"precision": "fp32", "templates": None, "max_pixels": None} | changed
    return make_encoder(str(folder), out, **settings, say=lambda text: None)


def test_the_bundle_serves_what_pytorch_computes(exported, bundle):
    """The gate compares with the graph as it came; here is the model itself."""
    _, model = exported
    regions, stored = read_golden(bundle)
    for engine in ("onnxruntime", "openvino"):
        if engine == "openvino":
            pytest.importorskip("openvino")
        encoder = open_encoder(bundle.path, engine=engine, threads=1).encoder
        for i, region in enumerate(regions):
            questions = [bundle.templates.question(task) for task in stored]
            prompt = encoder.prompt(region.text, (), questions)
            with torch.inference_mode():
                whole = [model.model(torch.tensor(s.ids)[None]).last_hidden_state[0].mean(0) for s in prompt.sequences]
            found = encoder.vectors([prompt])[0]
            assert np.allclose(found, np.stack(whole), atol=2e-5), engine
            assert np.allclose(found, [vectors[i] for vectors in stored.values()], atol=2e-5), engine


def test_the_text_is_framed_as_the_model_itself_has_it(exported, tmp_path):
    spec = make(exported[0], tmp_path / "a.topt").spec
    tiny_text(tmp_path / "weights")
    plain = make(tmp_path / "weights", tmp_path / "b.topt").spec
    assert (spec.family, plain.family) == ("exported_text", "text")
    assert (spec.chat, spec.width, spec.context) == (plain.chat, plain.width, plain.context)


def test_without_a_chat_template_the_tokenizers_own_tokens_are_put_around(graph, tmp_path):
    (graph / "chat_template.jinja").unlink()
    tokenizer = json.loads((graph / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    first, last = "<|endoftext|>", "<|im_end|>"
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [
            {"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": last, "type_id": 0}},
        ],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (first, last)},
    }  # fmt: skip
    tokenizer["post_processor"]["pair"] = tokenizer["post_processor"]["single"]
    (graph / "tokenizer.json").write_text(json.dumps(tokenizer))
    made = make(graph, tmp_path / "made.topt")
    assert made.spec.chat == {"before": first, "image": "", "after": last}


def test_weights_beside_it_are_exported_instead(graph, tmp_path):
    assert is_graph(str(graph))
    tiny_text(graph)
    assert not is_graph(str(graph))
    assert make(graph, tmp_path / "made.topt").spec.family == "text"


def test_the_same_again_is_left_as_it_is_and_another_is_refused(exported, graph, tmp_path):
    out = tmp_path / "made.topt"
    first = make(exported[0], out)
    assert make(exported[0], out).sha256 == first.sha256
    model = onnx.load(graph / "model.onnx")
    change_a_weight(model)
    onnx.save(model, graph / "model.onnx")
    with pytest.raises(UsageError, match="another encoder is already there"):
        make(graph, out)


def test_a_bundle_with_another_weight_fails_its_self_test(bundle, tmp_path, topt_run, reseal):
    assert topt_run("selftest", bundle.path).code == 0
    spoilt = shutil.copytree(bundle.path, tmp_path / "spoilt.topt")
    weights = np.fromfile(spoilt / "whole.weights", np.float32)
    (spoilt / "whole.weights").write_bytes((weights * np.float32(1.01)).tobytes())
    reseal(spoilt, lambda record: None)
    said = topt_run("selftest", spoilt)
    assert said.code == BadBundle.exit_code, said.err


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_it_is_taken_in_float32_alone(exported, tmp_path, precision):
    with pytest.raises(UsageError, match="taken as it is"):
        make(exported[0], tmp_path / "made.topt", precision=precision)
    assert not (tmp_path / "made.topt").exists()


def test_a_graph_that_is_quantized_is_refused(graph, tmp_path):
    model = onnx.load(graph / "model.onnx")
    model.graph.node.append(helper.make_node("DynamicQuantizeLinear", ["last_hidden_state"], ["q", "s", "z"]))
    onnx.save(model, graph / "model.onnx")
    with pytest.raises(BadConfig, match="quantized") as refused:
        make(graph, tmp_path / "made.topt")
    assert "DynamicQuantizeLinear" in str(refused.value)


def test_a_graph_of_another_kind_is_refused(graph, tmp_path):
    model = onnx.load(graph / "model.onnx")
    model.graph.output[0].name = "logits"
    onnx.save(model, graph / "model.onnx")
    with pytest.raises(BadConfig, match="not a text encoder's"):
        make(graph, tmp_path / "made.topt")


def test_what_is_no_graph_at_all(graph, tmp_path):
    (graph / "model.onnx").write_bytes(b"\x00no graph")
    with pytest.raises(BadData, match="not a graph of ONNX"):
        make(graph, tmp_path / "made.topt")


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_a_bundle_that_gives_the_graph_for_another_family(bundle, tmp_path, reseal, family):
    other = shutil.copytree(bundle.path, tmp_path / "other.topt")
    reseal(other, lambda record: record["spec"].update(family=family))
    with pytest.raises(BadBundle, match="networks"):
        open_encoder_bundle(other)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_there_is_none_for_a_gpu(bundle, device):
    with pytest.raises(NoDevice, match="on the CPU alone"):
        load_encoder(open_encoder_bundle(bundle.path), engine="onnxruntime", threads=1, device=device)


def test_the_gate_sees_a_graph_that_serves_other_vectors(exported, tmp_path, monkeypatch):
    """What is written differs from what came: the fault that packing could have."""
    real = onnx.save_model

    def spoilt(model, *arguments, **settings):
        change_a_weight(model)
        real(model, *arguments, **settings)

    monkeypatch.setattr(onnx, "save_model", spoilt)
    with pytest.raises(BadBundle, match="parity gate failed"):
        make(exported[0], tmp_path / "made.topt")
    assert not (tmp_path / "made.topt").exists()


def change_a_weight(model):
    """Another number in the middle of the largest weight."""
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = numpy_helper.to_array(tensor) * np.float32(1.5)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
