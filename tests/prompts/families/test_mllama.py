import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from encoders_mllama import PREPROCESSOR, TILE, tiny_mllama
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoProcessor
from transformers.models.mllama import image_processing_pil_mllama as published_images
from transformers.models.mllama import processing_mllama as published

from topt_deploy.errors import BadConfig, BadData
from topt_deploy.export.prompts import traced_operators
from topt_deploy.export.prompts.families import mllama as export
from topt_deploy.export.prompts.layerwise import Layerwise
from topt_deploy.export.prompts.pieces import execute
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.families.mllama.host import Mllama, MllamaSettings, layout, visible_tiles, vision_inputs
from topt_deploy.prompts.families.mllama.pytorch import MllamaBackend
from topt_deploy.prompts.graph_backend import GraphBackend
from topt_deploy.prompts.pooling import pooled
from topt_deploy.prompts.tokens import Chat, Tokens

# Tiny, unequal, long, large, and as wide or high as a tile or one pixel off; 56 pixels are a tile.
SIZES = [
    (1, 1), (1, 500), (500, 1), (3, 4), (55, 57), (56, 56), (57, 56), (56, 112), (112, 56), (111, 113), (112, 112),
    (168, 56), (56, 168), (224, 56), (57, 225), (30, 200), (333, 77), (300, 301), (13, 700), (1000, 90), (640, 427),
]  # fmt: skip
IMAGES = {
    "none": [],
    "one": [(100, 90)],
    "one of a tile": [(30, 41)],
    "several": [(30, 41), (40, 200), (112, 112), (333, 77)],
}
TEXT = "At 41.85, -87.65 there are 12 cafés."
QUESTIONS = ["How much crime is there?", "How many check-ins, and where are they?", ""]
DATE = "26 Jul 2024"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mllama")


@pytest.fixture(scope="module")
def model(folder):
    return tiny_mllama(folder)


@pytest.fixture(scope="module")
def config(model, folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def settings(config):
    return MllamaSettings.from_config(config, PREPROCESSOR)


@pytest.fixture(scope="module")
def processor(model, folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def family(settings, processor, folder):
    def frame(images):
        before, after = processor.apply_chat_template(
            messages("|||", images), add_generation_prompt=True, date_string=DATE
        ).split("|||")
        return Chat(before=before.removesuffix("<|image|>"), image="<|image|>", after=after)

    return Mllama(settings, frame([0]), Tokens((folder / "tokenizer.json").read_bytes()), frame([]))


@pytest.fixture(scope="module")
def networks(model, folder):
    return {network.name: network for network in export.networks(AutoConfig.from_pretrained(folder))}


@pytest.fixture(scope="module")
def weight(model, folder):
    weights = {export.canonical(n): w for n, w in load_file(folder / "model.safetensors").items()}
    return lambda name: weights[name].flatten(1) if weights[name].ndim == 4 else weights[name]


def pictures(sizes):
    rng = np.random.default_rng([len(sizes), *sum(sizes, ())])
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def messages(text, images):
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def published_inputs(processor, question, images):
    """What transformers makes of one task, text put together by hand."""
    return processor.apply_chat_template(
        messages(f"{TEXT}\n{question}" if question else TEXT, [Image.fromarray(image) for image in images]),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        date_string=DATE,
    )


def pieces(model, networks, weight, spec):
    """The exported networks as a backend, run piece by piece in PyTorch."""
    table = model.model.language_model.embed_tokens.weight.detach().numpy()
    past = {name: (2, 8) for name in networks["decoder"].inputs if name.startswith("past_")}
    runners = Layerwise(networks=list(networks.values()), load=weight).runners()
    return GraphBackend(runners, embedding=table, past=past, spec=spec, chunk=23)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_tiles_are_those_of_transformers(settings, processor, size):
    (image,) = pictures([size])
    want = processor.image_processor(Image.fromarray(image), return_tensors="np")
    found = vision_inputs(image, settings)
    tiles = int(want["aspect_ratio_mask"].sum())
    assert found["pixel_values"].shape == (tiles, 3, TILE, TILE)
    np.testing.assert_allclose(found["pixel_values"], want["pixel_values"][0, 0, :tiles], atol=1e-6)
    np.testing.assert_array_equal(found["aspect_ratio_id"], want["aspect_ratio_ids"][0])


@pytest.mark.parametrize(("tile", "most"), [(560, 4), (448, 4), (336, 9)])
def test_layouts_are_those_of_transformers(settings, tile, most):
    changed = MllamaSettings(**vars(settings) | {"tile": tile, "tiles": most})
    arrangements = published_images.get_all_supported_aspect_ratios(most)
    rng = np.random.default_rng(tile)
    near = rng.integers(1, 5, (300, 2)) * tile + rng.integers(-2, 3, (300, 2))
    far = np.exp(rng.uniform(0, np.log(9000), (700, 2))).astype(int)
    for height, width in np.concatenate([near, far]).tolist():
        canvas = published_images.get_optimal_tiled_canvas(height, width, most, tile)
        size = published_images.get_image_size_fit_to_canvas(height, width, *canvas, tile)
        found = layout(height, width, changed)
        assert (found.rows * tile, found.columns * tile) == canvas, (height, width)
        assert (found.height, found.width) == size, (height, width)
        assert arrangements[found.id - 1] == (found.rows, found.columns)


@pytest.mark.parametrize("sizes", IMAGES.values(), ids=IMAGES)
def test_token_ids_and_what_they_see_are_those_of_transformers(family, processor, sizes):
    images = pictures(sizes)
    prompt = family.prompt(TEXT, images, QUESTIONS)
    assert len(prompt.images) == len(images)
    assert prompt.image_token is None
    for question, sequence in zip(QUESTIONS, prompt.sequences, strict=True):
        want = published_inputs(processor, question, images)
        n = want["input_ids"].shape[1]
        np.testing.assert_array_equal(sequence.ids, want["input_ids"][0])
        np.testing.assert_array_equal(sequence.positions, [np.arange(n)])
        mask = want["cross_attention_mask"][0].reshape(n, -1).bool() if images else np.zeros((n, 1), bool)
        np.testing.assert_array_equal(sequence.visible, mask)


@pytest.mark.parametrize("seed", range(20))
def test_images_among_text_are_seen_as_transformers_has_it(settings, seed):
    rng = np.random.default_rng(seed)
    token = settings.image_token
    ids = np.where(rng.random(12) < 0.4, token, rng.integers(0, token, 12))
    tiles = rng.integers(1, settings.tiles + 1, np.count_nonzero(ids == token)).tolist()
    ranges = published.get_cross_attention_token_mask(ids.tolist(), token)
    dense = published.convert_sparse_cross_attention_mask_to_dense([ranges], [tiles], settings.tiles, len(ids))
    np.testing.assert_array_equal(visible_tiles(ids, tiles, settings), dense[0].reshape(len(ids), -1))


def test_settings_of_another_model_are_refused(config):
    with pytest.raises(BadConfig, match=r"preprocessor_config\.json") as error:
        MllamaSettings.from_config(config, PREPROCESSOR | {"size": {"height": 560, "width": 560}})
    assert "56" in error.value.expected
    assert "560" in error.value.found


def test_text_that_stands_for_an_image_is_refused(family):
    with pytest.raises(BadData, match=r"<\|image\|>"):
        family.prompt("Look: <|image|>", [], [""])


@pytest.mark.parametrize("sizes", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("kind", ["transformers", "pieces"])
def test_shared_prefix_equals_full_passes_of_transformers(model, family, processor, networks, weight, kind, sizes):
    images = pictures(sizes)
    spec = EncoderSpec(
        family="mllama", name="", weights_sha256="", width=32, settings=asdict(family.settings), chat={}, imageless={}
    )
    backend = MllamaBackend(model.model) if kind == "transformers" else pieces(model, networks, weight, spec)
    found = pooled(backend, [family.prompt(TEXT, images, QUESTIONS)], chunk=23)
    with torch.no_grad():
        passes = [model.model(**published_inputs(processor, question, images)) for question in QUESTIONS]
    want = np.stack([out.last_hidden_state[0].mean(dim=0).numpy() for out in passes])
    np.testing.assert_allclose(found, want[None], atol=1e-5)


@pytest.mark.parametrize("size", [(30, 41), (40, 100), (40, 150), (112, 112)])
def test_vision_pieces_equal_transformers(model, settings, networks, weight, size):
    (image,) = pictures([size])
    inputs = vision_inputs(image, settings)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    found = execute(networks["vision"], weight, tensors)["features"]
    np.testing.assert_allclose(found, MllamaBackend(model.model).vision(inputs), atol=1e-5)


def test_names_of_weights_are_found_in_both_forms(model, folder):
    inside = model.state_dict().keys()
    assert {export.canonical(name) for name in load_file(folder / "model.safetensors")} == set(inside)
    assert {export.canonical(name) for name in inside} == set(inside)


def test_pieces_take_every_weight_once_but_the_embedding_and_the_head(model, networks):
    taken = []
    for network in networks.values():
        for use in network.uses:
            with torch.device("meta"):
                taken += [use.weight(name) for name, _ in use.piece.build().named_parameters()]
    apart = ["model.language_model.embed_tokens.weight", "lm_head.weight"]
    assert sorted([*taken, *apart]) == sorted(model.state_dict())


SMALL = {"tiles": 1, "batch": 1, "tokens": 1, "past": 0, "visible_tiles": 1, "image_states": 17, "past + tokens": 1}
LARGE = {"tiles": 4, "batch": 2, "tokens": 6, "past": 9, "visible_tiles": 8, "image_states": 136, "past + tokens": 15}
PIECES = [
    ("vision", "embed"), ("vision", "local"), ("vision", "between"), ("vision", "global"), ("vision", "project"),
    ("cross", "cross_keys"),
    ("decoder", "see"), ("decoder", "rotary"), ("decoder", "allowed"),
    ("decoder", "layer"), ("decoder", "cross_layer"), ("decoder", "norm"),
]  # fmt: skip


def test_all_pieces_are_known(networks):
    assert {(name, use.piece.name) for name, network in networks.items() for use in network.uses} == set(PIECES)


@pytest.mark.parametrize(("network", "piece"), PIECES)
def test_traced_piece_fits_any_size(networks, weight, network, piece, monkeypatch):
    monkeypatch.setattr(traced_operators, "attention", computed_attention)
    use = next(use for use in networks[network].uses if use.piece.name == piece)
    with torch.device("meta"):
        module = use.piece.build().eval()
    module.load_state_dict({n: weight(use.weight(n)) for n, _ in module.named_parameters()}, strict=False, assign=True)
    module.requires_grad_(False)
    specs = use.piece.inputs.values()
    sample = sizes_of(
        specs,
        {
            "tiles": 3,
            "batch": 5,
            "tokens": 7,
            "past": 11,
            "visible_tiles": 13,
            "image_states": 221,
            "past + tokens": 18,
        },
    )
    dynamic = [{i: torch.export.Dim.DYNAMIC for i, d in enumerate(s.dims) if isinstance(d, str)} for s in specs]
    with torch.no_grad():
        traced = torch.export.export(module, tuple(sample), dynamic_shapes=tuple(dynamic_of(module, dynamic)))
        for sizes in (SMALL, LARGE):
            inputs = sizes_of(specs, sizes)
            for found, want in zip(traced.module(check_guards=False)(*inputs), module(*inputs), strict=True):
                torch.testing.assert_close(found, want)


def computed_attention(query, key, value, mask, scale):
    """What the operator that stays whole through the tracing computes outside it."""
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


def dynamic_of(module, dynamic):
    """As the exporter wants them: what a star takes is one argument."""
    return [dynamic[0], tuple(dynamic[1:])] if isinstance(module, export.Project) else dynamic


def sizes_of(specs, sizes):
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for spec in specs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.dims]
        values = torch.randn(shape, generator=generator)
        whole = {torch.bool: values > 0, torch.int64: values.mul(3).abs().long()}
        tensors.append(whole.get(spec.dtype, values))
    return tensors
