import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders_deepseek import tiny_deepseek
from encoders_mllama import tiny_mllama
from encoders_qwen import tiny_qwen
from encoders_text import CHAT_TEMPLATE, tiny_text
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from topt_deploy.errors import BadConfig, BadData, NoDevice, NoInput, UsageError
from topt_deploy.prompts.pytorch.chat_frames import chat_frames
from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
from topt_deploy.prompts.pytorch.load import torch_backend, torch_encoder
from topt_deploy.prompts.tokens import Chat, Tokens

QUESTIONS = ["How much crime is there?", "", "And check-ins?"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MAKERS = {"text": tiny_text, "qwen2_5_vl": tiny_qwen, "mllama": tiny_mllama, "deepseek_vl2": tiny_deepseek}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family."""
    base = tmp_path_factory.mktemp("models")
    for family, make in MAKERS.items():
        make(base / family)
    return {family: base / family for family in MAKERS}


@pytest.fixture
def text(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A text-only model of the test's own."""
    return Path(shutil.copytree(folders["text"], tmp_path / "text"))


def change(file: Path, **values: object) -> None:
    """Change a JSON file; None removes a key."""
    merged = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


def images(*sizes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.mark.parametrize("family", MAKERS)
def test_a_checkpoint_is_read(folders, family):
    checkpoint = open_checkpoint(str(folders[family]))
    assert checkpoint.spec.family == family
    assert checkpoint.spec.width == 32
    assert checkpoint.spec.name == family
    assert {file.suffix for file in checkpoint.weights} == {".safetensors"}
    encoder = torch_encoder(checkpoint, device="cpu", precision="fp32")
    pictures = images((70, 90), (120, 50)) if family != "text" else []
    prompts = [encoder.prompt("At 41.85 there are 12 cafés.", pictures[:count], QUESTIONS) for count in (2, 0, 1)]
    together = encoder.vectors(prompts)
    assert together.shape == (3, 3, 32)
    alone = np.concatenate([encoder.vectors([prompt]) for prompt in prompts])
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(together[0] - together[1]).max() > 1e-3 or family == "text"


@pytest.mark.parametrize(
    ("family", "renamed"),
    [
        ("qwen2_5_vl", {"model.": "model.language_model.", "visual.": "model.visual."}),
        (
            "mllama",
            {
                "language_model.model.": "model.language_model.",
                "language_model.lm_head.": "lm_head.",
                "vision_model.": "model.vision_model.",
                "multi_modal_projector.": "model.multi_modal_projector.",
            },
        ),
    ],
)
def test_both_names_that_weights_have_had_are_known(folders, tmp_path, family, renamed):
    folder = Path(shutil.copytree(folders[family], tmp_path / family))
    tensors = load_file(folder / "model.safetensors")
    for old, new in renamed.items():
        tensors = {new + key[len(old) :] if key.startswith(old) else key: value for key, value in tensors.items()}
    assert tensors.keys() != load_file(folder / "model.safetensors").keys()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vectors = []
    for place in (folders[family], folder):
        encoder = torch_encoder(open_checkpoint(str(place)), device="cpu", precision="fp32")
        vectors.append(encoder.vectors([encoder.prompt("At 41.85", images((70, 90)), QUESTIONS)]))
    assert np.array_equal(*vectors)


def test_text_vectors_are_the_mean_of_transformers_last_hidden_states(text):
    model = tiny_text(text)
    checkpoint = open_checkpoint(str(text))
    tokenizer = AutoTokenizer.from_pretrained(text)
    words = "At 41.85 there are 12 cafés."
    for precision, tolerance in {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}.items():
        encoder = torch_encoder(checkpoint, device="cpu", precision=precision)
        (found,) = encoder.vectors([encoder.prompt(words, [], QUESTIONS)])
        for question, vector in zip(QUESTIONS, found, strict=True):
            said = [{"role": "user", "content": f"{words}\n{question}".strip()}]
            inputs = tokenizer.apply_chat_template(
                said, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.inference_mode():
                expected = model.model(**inputs).last_hidden_state[0].mean(0).numpy()
            assert np.abs(vector - expected).max() < tolerance
            assert np.abs(expected).max() > 0.3


class ThatDay(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


DATED = (
    "{{ bos_token }}{{ strftime_now('%A, %d %B %Y (%d %b, %m)') }}\n{{ messages[0]['content'] | trim }}{{ eos_token }}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, DATED, None], ids=["smollm2", "dated", "none"])
def test_frames_of_text_give_transformers_token_ids(tmp_path, template, monkeypatch):
    tiny_text(tmp_path, template=template)
    chat, imageless = chat_frames(tmp_path, images=False)
    assert chat == imageless
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = Tokens((tmp_path / "tokenizer.json").read_bytes()).ids(chat.text("A café.", 0, "How many?")).tolist()
    if template is None:
        assert chat == Chat(before="<|endoftext|>", image="", after="")
        assert ids == tokenizer("A café.\nHow many?").input_ids
    else:
        said = [{"role": "user", "content": "A café.\nHow many?"}]
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", ThatDay)
        assert ids == tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
        assert len(ids) > len(tokenizer("A café.\nHow many?").input_ids)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama"])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_frames_of_images_give_transformers_token_ids(folders, family, count):
    frame = chat_frames(folders[family], images=True)[0 if count else 1]
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    parts = [{"type": "image"}] * count + [{"type": "text", "text": "A café.\nHow many?"}]
    said = [{"role": "user", "content": parts}]
    expected = tokenizer.apply_chat_template(said, add_generation_prompt=True, date_string="26 Jul 2024")["input_ids"]
    tokens = Tokens((folders[family] / "tokenizer.json").read_bytes())
    assert tokens.ids(frame.text("A café.", count, "How many?")).tolist() == expected


def test_an_older_processors_template_goes_before_the_tokenizers(folders, tmp_path):
    folder = Path(shutil.copytree(folders["qwen2_5_vl"], tmp_path / "model"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    change(folder / "tokenizer_config.json", chat_template=CHAT_TEMPLATE)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert open_checkpoint(str(folder)).spec.chat == open_checkpoint(str(folders["qwen2_5_vl"])).spec.chat


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "once"),
        ("{{ messages[0]['content'] | upper }}", "once"),
        ("{{ messages[0]['content'] | length }}{{ messages[0]['content'] }}", "same strings"),
        ("{{ raise_exception('no users here') }}", "no users here"),
    ],
)
def test_a_template_that_does_more_than_frame_is_refused(tmp_path, template, reason):
    tiny_text(tmp_path, template=template)
    with pytest.raises(BadConfig, match=reason):
        chat_frames(tmp_path, images=False)


def test_numbered_images_are_refused(folders, tmp_path):
    folder = Path(shutil.copytree(folders["qwen2_5_vl"], tmp_path / "model"))
    template = "{% for part in messages[0]['content'] %}{{ part['text'] or loop.index }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(BadConfig, match="same strings"):
        open_checkpoint(str(folder))


def test_image_settings_are_found_in_the_processors_file(folders, tmp_path):
    folder = Path(shutil.copytree(folders["qwen2_5_vl"], tmp_path / "model"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(NoInput, match="the image settings are missing"):
        open_checkpoint(str(folder))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings, "video_processor": {}}))
    published = open_checkpoint(str(folders["qwen2_5_vl"]))
    assert open_checkpoint(str(folder)).spec == replace(published.spec, name="model")


def test_weights_name_the_model_and_settings_do_not(text):
    before = open_checkpoint(str(text))
    change(text / "config.json", rope_theta=99.0)
    changed = open_checkpoint(str(text))
    assert changed.spec.identity == before.spec.identity
    assert changed.sha256 != before.sha256  # but cached vectors are not taken for each other's
    tiny = load_file(text / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in tiny.items()}, text / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(str(text)).spec.identity != before.spec.identity


def test_a_model_that_is_not_here_is_an_error_that_says_where_to_put_it(tmp_path):
    with pytest.raises(NoInput, match=r"--allow-download --revision(.|\n)*hf download nobody/such-model"):
        open_checkpoint("nobody/such-model")
    with pytest.raises(NoInput, match="no such folder"):
        open_checkpoint(str(tmp_path / "absent"))
    with pytest.raises(NoInput, match="no model in this folder"):
        open_checkpoint(str(tmp_path))


def test_a_model_in_the_hubs_cache_is_found_offline(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--tiny--qwen"
    shutil.copytree(folders["qwen2_5_vl"], repository / "snapshots" / COMMIT)
    assert open_checkpoint("tiny/qwen", revision=COMMIT).spec.name == "tiny/qwen"
    with pytest.raises(NoInput, match="not on this machine"):
        open_checkpoint("tiny/qwen")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert open_checkpoint("tiny/qwen").path.name == COMMIT


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc"])
def test_a_download_needs_a_commit(revision):
    with pytest.raises(UsageError, match="another model tomorrow"):
        open_checkpoint("nobody/such-model", allow_download=True, revision=revision)


def test_a_download_takes_safetensors_and_settings_alone(folders, monkeypatch):
    asked = {}

    def snapshot_download(model, **settings):
        asked.update(settings, model=model)
        return str(folders["text"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    open_checkpoint("tiny/text", allow_download=True, revision=COMMIT)
    assert asked["model"] == "tiny/text"
    assert asked["revision"] == COMMIT
    assert not asked["local_files_only"]
    assert set(asked["allow_patterns"]) == {"*.safetensors", "*.json", "*.jinja"}


def test_pickled_weights_are_refused(text):
    (text / "model.safetensors").rename(text / "pytorch_model.bin")
    with pytest.raises(BadData, match=r"pickles(.|\n)*save_pretrained"):
        open_checkpoint(str(text))
    (text / "pytorch_model.bin").unlink()
    with pytest.raises(NoInput, match="no weights"):
        open_checkpoint(str(text))


def test_a_missing_shard_is_named(text):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (text / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NoInput, match="model-00001-of-00002"):
        open_checkpoint(str(text))


def test_a_missing_tensor_is_no_random_one(text):
    tensors = load_file(text / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, text / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadData, match=r"1 missing, such as .*layers.1.mlp.up_proj.weight"):
        torch_backend(open_checkpoint(str(text)), device="cpu", precision="fp32")


def test_broken_weights_are_an_error(text):
    (text / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(BadData, match="cannot be loaded"):
        torch_backend(open_checkpoint(str(text)), device="cpu", precision="fp32")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window 16"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "found: +sliding_attention",
        ),
        ({"model_type": "mamba"}, "not every layer attends"),
        (
            {"model_type": "their_own", "auto_map": {"AutoModel": "theirs.Model"}},
            "code in a model.s folder is never run",
        ),
        ({"model_type": None}, "this model cannot encode prompts"),
        ({"num_attention_heads": 5}, "does not take it"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized"),
    ],
)
def test_a_model_of_another_kind_is_refused(text, values, reason):
    change(text / "config.json", **values)
    with pytest.raises(BadConfig, match=reason):
        open_checkpoint(str(text))


def test_a_window_that_is_switched_off_is_none(text):
    change(text / "config.json", model_type="qwen2", use_sliding_window=False, sliding_window=16)
    assert open_checkpoint(str(text)).spec.family == "text"


def test_a_model_whose_tokens_see_what_follows_is_refused(text):
    (text / "model.safetensors").unlink()
    BertModel(
        BertConfig(vocab_size=700, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(text)
    checkpoint = open_checkpoint(str(text))
    with pytest.raises(BadConfig, match="not a causal decoder"):
        torch_backend(checkpoint, device="cpu", precision="fp32")


def test_files_that_are_no_json_or_absent_are_named(text):
    (text / "config.json").write_text("{")
    with pytest.raises(BadData, match=r"config\.json: not JSON"):
        open_checkpoint(str(text))
    (text / "config.json").write_text("[]")
    with pytest.raises(BadData, match="not a JSON object"):
        open_checkpoint(str(text))


def test_a_missing_tokenizer_is_named(text):
    (text / "tokenizer.json").unlink()
    with pytest.raises(NoInput, match=r"no tokenizer\.json"):
        open_checkpoint(str(text))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_an_absent_device_is_no_fall_back(folders):
    with pytest.raises(NoDevice):
        torch_backend(open_checkpoint(str(folders["text"])), device="cuda", precision="fp32")


def tiny_idefics(folder: Path) -> Idefics3ForConditionalGeneration:
    """What SmolVLM is made of."""
    from tokenizer import tiny_tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    control = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    control += tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
    byte_pairs = Tokenizer.from_str(tiny_tokenizer(control).decode())
    byte_pairs.no_truncation()
    byte_pairs.no_padding()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'][0]['type'] == 'image' %}:{% else %}{{ ': ' }}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
        "{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "pad_token_id": 0,
            **sizes,
        },
        vision_config={"hidden_size": 24, "image_size": 32, "patch_size": 8, **sizes},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    model = Idefics3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {
        "do_image_splitting": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32}, "image_processor_type": "Idefics3ImageProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "processor_config.json").write_text(
        json.dumps({"image_seq_len": 4, "processor_class": "Idefics3Processor"})
    )
    return model


def test_smolvlms_kind_is_encoded_as_transformers_does(tmp_path):
    model = tiny_idefics(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.spec.family == "other"
    encoder = torch_encoder(checkpoint, device="cpu", precision="fp32")
    pictures, words = images((70, 90), (40, 120)), "At 41.85 there are 12 cafés."
    processor = AutoProcessor.from_pretrained(tmp_path)
    for count in (2, 0):
        (found,) = encoder.vectors([encoder.prompt(words, pictures[:count], QUESTIONS)])
        for question, vector in zip(QUESTIONS, found, strict=True):
            parts = [{"type": "image", "image": Image.fromarray(picture)} for picture in pictures[:count]]
            said = [{"role": "user", "content": [*parts, {"type": "text", "text": f"{words}\n{question}".strip()}]}]
            inputs = processor.apply_chat_template(
                said, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            with torch.inference_mode():
                expected = model(**inputs, output_hidden_states=True).hidden_states[-1][0].mean(0).numpy()
            assert np.abs(vector - expected).max() < 1e-5
            assert np.abs(expected).max() > 0.3
    with pytest.raises(BadData, match="control token"):
        encoder.prompt("a <image> of mine", [], QUESTIONS)


def test_qwen3_vl_is_encoded_without_torchvision(tmp_path, folders):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folders["qwen2_5_vl"] / name, tmp_path)
    tokens = Tokens((tmp_path / "tokenizer.json").read_bytes())
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 44, "num_heads": 2, "out_hidden_size": 32,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 64, "patch_size": 14,
        },
        image_token_id=tokens.id("<|image_pad|>"),
        video_token_id=tokens.id("<|video_pad|>"),
        vision_start_token_id=tokens.id("<|vision_start|>"),
        vision_end_token_id=tokens.id("<|vision_end|>"),
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    shutil.copy(folders["qwen2_5_vl"] / "preprocessor_config.json", tmp_path)
    encoder = torch_encoder(open_checkpoint(str(tmp_path)), device="cpu", precision="fp32")
    pictures = images((70, 90), (50, 120))
    prompts = [encoder.prompt("At 41.85", pictures[:count], QUESTIONS) for count in (2, 1)]
    found = encoder.vectors(prompts)
    assert found.shape == (2, 3, 32)
    assert len(prompts[0][0]["input_ids"][0]) > len(prompts[1][0]["input_ids"][0])
    with torch.inference_mode():
        expected = model(**prompts[0][0], output_hidden_states=True).hidden_states[-1][0].mean(0).numpy()
    assert np.abs(found[0, 0] - expected).max() < 1e-5


def test_a_processor_that_cannot_be_built_here_is_an_error(tmp_path):
    tiny_idefics(tmp_path)
    change(tmp_path / "preprocessor_config.json", image_processor_type="NobodysImageProcessor")
    with pytest.raises(BadConfig, match=r"processor here(.|\n)*Pillow alone"):
        torch_encoder(open_checkpoint(str(tmp_path)), device="cpu", precision="fp32")
