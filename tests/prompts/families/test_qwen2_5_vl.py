import dataclasses
import json

import numpy as np
import pytest
import torch
from encoders_qwen import tiny_qwen
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, DynamicCache, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from topt_deploy.errors import BadConfig, BadData
from topt_deploy.export.prompts.families import qwen2_5_vl as export
from topt_deploy.export.prompts.pieces import execute
from topt_deploy.export.prompts.trace import trace
from topt_deploy.prompts.families.qwen2_5_vl.host import Qwen25VL, Qwen25VLSettings, resized, vision_inputs
from topt_deploy.prompts.families.qwen2_5_vl.pytorch import QwenBackend
from topt_deploy.prompts.pooling import pooled
from topt_deploy.prompts.tokens import Chat, Tokens

# What an unaligned, unequal, tiny, long or large image is; 112 pixels are a window, 28 a token.
SIZES = [
    (1, 1), (1, 200), (200, 1), (14, 14), (28, 28), (27, 29), (41, 43), (42, 42), (56, 56), (57, 113), (112, 112),
    (113, 336), (224, 224), (13, 700), (700, 13), (10, 2000), (333, 77), (300, 500), (1000, 90), (767, 1023),
    (3000, 15), (15, 3000),
]  # fmt: skip
MIXED = [(30, 200), (224, 224), (57, 113), (333, 77)]
TEXT = "At 41.85, -87.65 there are 12 cafés."
QUESTIONS = ["How much crime is there?", "How many check-ins, and where are they?", ""]


class Processor(Qwen2_5_VLProcessor):
    """transformers' own, but for the reader of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("qwen")


@pytest.fixture(scope="module")
def model(folder):
    return tiny_qwen(folder)


@pytest.fixture(scope="module")
def settings(model, folder):
    config, preprocessor = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("config", "preprocessor_config")
    )
    return Qwen25VLSettings.from_config(config, preprocessor)


@pytest.fixture(scope="module")
def family(settings, folder):
    chat = Chat(
        before="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        image="<|vision_start|><|image_pad|><|vision_end|>",
        after="<|im_end|>\n<|im_start|>assistant\n",
    )
    return Qwen25VL(settings, chat, Tokens((folder / "tokenizer.json").read_bytes()))


@pytest.fixture(scope="module")
def processor(model, folder):
    return Processor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=None,
        chat_template=(folder / "chat_template.jinja").read_text(),
    )


@pytest.fixture(scope="module")
def weights(model, folder):
    """The checkpoint's tensors by their canonical names, convolutions flat."""
    found = {export.canonical(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    return {name: tensor.flatten(1) if tensor.ndim > 2 else tensor for name, tensor in found.items()}


@pytest.fixture(scope="module")
def networks(model):
    return export.networks(model.config)


def picture(size, seed=0):
    """Noise over a slope: what resizing does shows in every pixel."""
    h, w = size
    rng = np.random.default_rng([seed, h, w])
    slope = np.linspace(0, 160, h)[:, None, None] * np.linspace(0.2, 1, w)[None, :, None]
    return (slope + rng.integers(0, 95, (h, w, 3))).astype(np.uint8)


def asked(processor, images, *texts):
    """What transformers makes of a conversation."""
    content = [{"type": "image", "image": Image.fromarray(image)} for image in images]
    content.append({"type": "text", "text": "\n".join(filter(None, texts))})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )


def tensors(arrays):
    return {name: torch.tensor(array) for name, array in arrays.items()}


class TestSettings:
    def test_both_forms_of_the_file_say_the_same(self, settings, processor, folder, tmp_path):
        processor.image_processor.save_pretrained(tmp_path)
        newer = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert "max_pixels" not in newer
        assert Qwen25VLSettings.from_config(json.loads((folder / "config.json").read_text()), newer) == settings

    def test_they_survive_json(self, settings):
        image = picture((57, 113))
        again = Qwen25VLSettings(**json.loads(json.dumps(dataclasses.asdict(settings))))
        size = resized(57, 113, again)
        for name, array in vision_inputs(image, size, settings).items():
            np.testing.assert_array_equal(vision_inputs(image, size, again)[name], array)

    def test_a_lower_limit_makes_smaller_images(self, settings):
        lower = dataclasses.replace(settings, max_pixels=28 * 28 * 8)
        assert np.prod(resized(300, 500, lower)) <= lower.max_pixels < np.prod(resized(300, 500, settings))

    @pytest.mark.parametrize("limits", [{"max_pixels": 56 * 56 - 1}, {"min_pixels": 0}])
    def test_limits_that_exclude_each_other(self, settings, limits):
        with pytest.raises(BadConfig, match="exclude each other"):
            dataclasses.replace(settings, **limits)


class TestImages:
    @pytest.mark.parametrize("limits", [(56 * 56, 28 * 28 * 64), (28 * 28 * 9, 28 * 28 * 400)], ids=["small", "large"])
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_patches_are_transformers(self, settings, processor, size, limits):
        settings = dataclasses.replace(settings, min_pixels=limits[0], max_pixels=limits[1])
        image = picture(size)
        found = vision_inputs(image, resized(*size, settings), settings)
        expected = processor.image_processor(
            Image.fromarray(image), size={"shortest_edge": limits[0], "longest_edge": limits[1]}, return_tensors="pt"
        )
        assert found["pixel_values"].dtype == np.float32
        np.testing.assert_allclose(found["pixel_values"].reshape(-1, 1176), expected["pixel_values"], atol=1e-5, rtol=0)
        positions = get_vision_position_ids(expected["image_grid_thw"], settings.merge)
        np.testing.assert_array_equal(found["positions"].reshape(-1, 2), positions)

    @pytest.mark.parametrize("size", [(1, 201), (402, 2)])
    def test_too_long_for_its_width(self, family, processor, size):
        images = [picture((30, 30)), picture(size)]
        with pytest.raises(BadData, match="too long for its width"):
            family.prompt(TEXT, images, QUESTIONS)
        with pytest.raises(ValueError, match="aspect ratio"):
            processor.image_processor(Image.fromarray(images[1]))

    @pytest.mark.parametrize("grid", [(1, 1), (3, 2), (4, 4), (1, 5), (5, 9), (8, 12), (13, 7)], ids=str)
    def test_windows_are_transformers(self, settings, grid):
        rows, columns = grid
        found = vision_inputs(picture((28 * rows, 28 * columns)), (28 * rows, 28 * columns), settings)
        index, ends = get_vision_window_index(
            torch.tensor([[1, 2 * rows, 2 * columns]]), spatial_merge_size=2, window_size=112, patch_size=14
        )
        expected = [sorted(part.tolist()) for part in torch.tensor_split(index, ends[1:-1].long() // 4)]
        windows, valid = found["windows"], found["window_valid"]
        assert [sorted(row[v].tolist()) for row, v in zip(windows, valid, strict=True)] == expected
        assert valid.any(axis=1).all()
        np.testing.assert_array_equal(windows.ravel()[found["unwindow"]], np.arange(rows * columns))
        assert valid.ravel()[found["unwindow"]].all()


@pytest.mark.parametrize("sizes", [[], [(30, 200)], [(1000, 90)], MIXED, [(56, 56)] * 3 + SIZES], ids=len)
class TestPrompt:
    def test_tokens_and_positions_are_transformers(self, family, processor, model, sizes):
        images = [picture(size, i) for i, size in enumerate(sizes)]
        prompt = family.prompt(TEXT, images, QUESTIONS)
        assert len(prompt.images) == len(images)
        assert prompt.image_token == model.config.image_token_id
        for sequence, question in zip(prompt.sequences, QUESTIONS, strict=True):
            expected = asked(processor, images, TEXT, question)
            np.testing.assert_array_equal(sequence.ids, expected["input_ids"][0])
            positions, _ = model.model.get_rope_index(
                expected["input_ids"], expected["mm_token_type_ids"], expected.get("image_grid_thw")
            )
            assert sequence.positions.dtype == np.int64
            np.testing.assert_array_equal(sequence.positions, positions[:, 0])

    @torch.no_grad()
    def test_prompt_vectors_are_those_of_full_passes(self, family, processor, model, sizes):
        images = [picture(size, i) for i, size in enumerate(sizes)]
        regions = [(TEXT, images), ("A place with none.", []), (f"{TEXT} And 40 shops.", images[::-1])]
        prompts = [family.prompt(text, pictures, QUESTIONS) for text, pictures in regions]
        found = pooled(QwenBackend(model.model), prompts, chunk=37)
        for region, (text, pictures) in enumerate(regions):
            for task, question in enumerate(QUESTIONS):
                expected = model.model(**asked(processor, pictures, text, question)).last_hidden_state[0].mean(0)
                np.testing.assert_allclose(found[region, task], expected, atol=1e-5, rtol=0)


def test_an_image_token_in_the_text_is_refused(family):
    with pytest.raises(BadData, match="control token"):
        family.prompt("12 <|image_pad|>", [picture((30, 30))], QUESTIONS)


@pytest.mark.slow
class TestExport:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_vision_is_transformers(self, networks, weights, model, settings, size):
        """transformers' own exporter is wrong for exactly these: unequal and unaligned sizes."""
        inputs = vision_inputs(picture(size), resized(*size, settings), settings)
        features = execute(networks[0], weights.__getitem__, tensors(inputs))["features"]
        rows, columns = inputs["positions"].max(axis=(0, 1)) + 1
        with torch.no_grad():
            expected = model.model.visual(
                torch.tensor(inputs["pixel_values"]).flatten(0, 1), grid_thw=torch.tensor([[1, rows, columns]])
            ).pooler_output
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)

    def test_windows_matter(self, networks, weights, settings):
        """One window too many or too few is not lost in the tolerance."""
        inputs = tensors(vision_inputs(picture((200, 150)), (196, 140), settings))
        whole = {
            "windows": torch.arange(35)[None],
            "window_valid": torch.ones(1, 35, dtype=torch.bool),
            "unwindow": torch.arange(35),
        }
        found, other = (
            execute(networks[0], weights.__getitem__, values)["features"] for values in (inputs, inputs | whole)
        )
        assert (found - other).abs().max() > 1e-2

    @pytest.mark.parametrize(("batch", "past", "new"), [(1, 0, 1), (1, 0, 9), (2, 5, 3), (3, 11, 1), (2, 1, 14)])
    def test_decoder_is_transformers(self, networks, weights, model, batch, past, new):
        decoder = networks[1]
        generator = torch.Generator().manual_seed(past)
        embeds = torch.randn(batch, past + new, 32, generator=generator)
        positions = torch.randint(0, 50, (3, batch, past + new), generator=generator)
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            if past:
                model.model.language_model(
                    inputs_embeds=embeds[:, :past], position_ids=positions[:, :, :past], past_key_values=cache
                )
            pasts = [(torch.zeros(batch, 2, 0, 8),) * 2] * 2
            if past:
                pasts = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
            expected = model.model.language_model(
                inputs_embeds=embeds[:, past:], position_ids=positions[:, :, past:], past_key_values=cache
            ).last_hidden_state
        begins = torch.zeros(batch, new, dtype=torch.int64)
        inputs = {"hidden": embeds[:, past:], "positions": positions[:, :, past:], "begins": begins}
        for i, (key, value) in enumerate(pasts):
            inputs |= {f"past_key_{i}": key, f"past_value_{i}": value}
        assert set(inputs) == set(decoder.inputs)
        found = execute(decoder, weights.__getitem__, inputs)
        assert tuple(found) == decoder.outputs
        torch.testing.assert_close(found["last_hidden"], expected, atol=1e-5, rtol=0)
        for i, layer in enumerate(cache.layers):
            torch.testing.assert_close(found[f"present_key_{i}"], layer.keys, atol=1e-5, rtol=0)
            torch.testing.assert_close(found[f"present_value_{i}"], layer.values, atol=1e-5, rtol=0)

    def test_every_weight_is_used_under_any_of_its_names(self, networks, weights, model, folder, tmp_path):
        used = set()
        for network in networks:
            for use in network.uses:
                with torch.device("meta"):
                    used |= {use.weight(name) for name, _ in use.piece.build().named_parameters()}
        assert used == set(weights) - {"lm_head.weight", "model.embed_tokens.weight"}
        model.model.save_pretrained(tmp_path)
        base = load_file(tmp_path / "model.safetensors")
        assert {export.canonical(name) for name in base} == set(weights) - {"lm_head.weight"}
        assert {export.canonical(name) for name in model.state_dict()} == set(weights)

    def test_pieces_can_be_traced_with_every_free_dimension(self, networks):
        pieces = {use.piece.name: use.piece for network in networks for use in network.uses}
        assert set(pieces) == {"patches", "window", "full", "merger", "rotary", "allowed", "layer", "norm"}
        for piece in pieces.values():
            graph = trace(piece).proto.graph
            inputs = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
            for name, spec in piece.inputs.items():
                named = [isinstance(dim, str) for dim in spec.dims]
                assert [dim.HasField("dim_param") for dim in inputs[name]] == named, (piece.name, name)
