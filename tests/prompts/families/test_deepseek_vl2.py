import json

import numpy as np
import pytest
import torch
from encoders_deepseek import TILE, deepseek_config, random_tensors, tiny_deepseek
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizer import tiny_tokenizer
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import (
    DeepseekV2Config,
    DeepseekV2Model,
    DeepseekV3Config,
    LlamaConfig,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from topt_deploy.errors import BadData, NoInput
from topt_deploy.export.prompts.families.deepseek_vl2 import canonical, networks
from topt_deploy.export.prompts.pieces import execute
from topt_deploy.export.prompts.trace import trace
from topt_deploy.prompts.families.deepseek_vl2 import host
from topt_deploy.prompts.families.deepseek_vl2.pytorch.config import DeepseekVL2Config
from topt_deploy.prompts.families.deepseek_vl2.pytorch.model import DeepseekBackend, DeepseekVL2Model
from topt_deploy.prompts.families.deepseek_vl2.pytorch.vision import arrange
from topt_deploy.prompts.pooling import pooled
from topt_deploy.prompts.tokens import Tokens

PUBLISHED = tuple(
    (384 * a, 384 * b)
    for a, b in (
        (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1), (2, 3), (3, 2),
        (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3),
    )
)  # fmt: skip
SETTINGS = host.DeepseekVL2Settings(resolutions=PUBLISHED, side=14, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
QUESTIONS = ("How much crime is there?", "Check-ins: how many in a month, do you think?", "")
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.7, "mscale_all_dim": 0.5,
}  # fmt: skip


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(height, width, seed=0):
    return noise(height, width, 3, seed=seed)


@pytest.fixture(scope="module", params=["tiny", "small", "base"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_deepseek(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return DeepseekVL2Model.load(folder)


@pytest.fixture(scope="module")
def family(folder):
    return family_of(folder)


def family_of(folder):
    files = [json.loads((folder / name).read_text()) for name in ("config.json", "processor_config.json")]
    tokens = Tokens((folder / "tokenizer.json").read_bytes())
    return host.DeepseekVL2(host.DeepseekVL2Settings.from_config(*files), host.CHAT, tokens)


# The published processor, restated step by step.


def literal_resolution(width, height, candidates):
    best, most, least = None, 0, float("inf")
    for w, h in candidates:
        scale = min(w / width, h / height)
        down_w, down_h = int(width * scale), int(height * scale)
        effective = min(down_w * down_h, width * height)
        wasted = w * h - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = (w, h), effective, wasted
    return best


def literal_pad(image, size, colour):
    (w, h), (width, height) = image.size, size
    new = size
    if w / h > width / height:
        new = (width, round(h / w * width))
    elif w / h < width / height:
        new = (round(w / h * height), height)
    resized = image.resize(new, Image.Resampling.BICUBIC)
    out = Image.new("RGB", size, colour)
    out.paste(resized, (round((width - new[0]) * 0.5), round((height - new[1]) * 0.5)))
    return out


def literal_tiles(image, settings, cropping):
    tile, colour = settings.tile, tuple(int(m * 255) for m in settings.mean)
    image = Image.fromarray(image)
    size = literal_resolution(*image.size, settings.resolutions) if cropping else (tile, tile)
    local = literal_pad(image, size, colour)
    views = [literal_pad(image, (tile, tile), colour)]
    views += [local.crop((x, y, x + tile, y + tile)) for y in range(0, size[1], tile) for x in range(0, size[0], tile)]
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (settings.mean, settings.std))
    tensors = [torch.tensor(np.array(v)).permute(2, 0, 1).float().div(255).sub(mean).div(std) for v in views]
    return torch.stack(tensors), size[0] // tile, size[1] // tile


def literal_tokens(features, across, down, newline, separator):
    """Features (1 + tiles, side², H) of the whole view and the tiles, row by row."""
    side = int(features.shape[1] ** 0.5)
    out = []
    for y in range(side):
        out += [features[0][y * side + x] for x in range(side)] + [newline]
    out.append(separator)
    for y in range(down * side):
        for x in range(across * side):
            tile = features[1 + (y // side) * across + x // side]
            out.append(tile[(y % side) * side + x % side])
        out.append(newline)
    return torch.stack(out)


class TestImages:
    def test_resolutions_are_those_of_the_published_code(self):
        sides = (1, 2, 37, 192, 383, 384, 385, 500, 640, 768, 1000, 1152, 1999, 3456, 5000)
        chosen = {
            (w, h): (host.best_resolution(w, h, PUBLISHED), literal_resolution(w, h, PUBLISHED))
            for w in sides
            for h in sides
        }
        assert all(ours == theirs for ours, theirs in chosen.values())
        assert len({ours for ours, _ in chosen.values()}) > 15

    @pytest.mark.parametrize("tiled", [True, False])
    @pytest.mark.parametrize(
        ("height", "width"), [(384, 384), (1, 1), (3, 400), (400, 3), (385, 770), (900, 700), (640, 1300)]
    )
    def test_pixels_and_order_are_those_of_the_published_code(self, height, width, tiled):
        image = photo(height, width)
        inputs = host.vision_inputs(image, SETTINGS, tiled=tiled)
        tiles, across, down = literal_tiles(image, SETTINGS, tiled)
        pixels = torch.tensor(inputs["pixel_values"])
        assert pixels.dtype == torch.float32
        assert inputs["layout"].dtype == np.int64
        if across * down == 1:  # the whole view is the tile, and is not computed twice
            assert len(pixels) == 1
            torch.testing.assert_close(pixels.expand_as(tiles), tiles, atol=1e-6, rtol=0)
            features = torch.rand(1, 196, 5).expand(2, -1, -1)
        else:
            torch.testing.assert_close(pixels, tiles, atol=1e-6, rtol=0)
            features = torch.rand(len(tiles), 196, 5)
        newline, separator = torch.rand(2, 5)
        found = arrange(features[: len(pixels)], torch.tensor(inputs["layout"]), newline, separator)
        assert torch.equal(found, literal_tokens(features, across, down, newline, separator))
        assert len(found) == 14 * 15 + 1 + (down * 14) * (across * 14 + 1)

    def test_mean_and_deviation_per_channel(self):
        settings = host.DeepseekVL2Settings(resolutions=[(8, 8), (16, 8)], side=1, mean=(0.2, 0.5, 0.9), std=(1, 2, 3))
        inputs = host.vision_inputs(photo(5, 12), settings, tiled=True)
        tiles, *_ = literal_tiles(photo(5, 12), settings, True)
        torch.testing.assert_close(torch.tensor(inputs["pixel_values"]), tiles, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("tiled", [True, False])
    def test_an_image_that_would_vanish_is_refused(self, tiled):
        with pytest.raises(BadData, match="too thin") as error:
            host.vision_inputs(photo(1, 768), SETTINGS, tiled=tiled)
        assert error.value.found == "768 × 1 pixels"
        seen = host.vision_inputs(photo(1, 767), SETTINGS, tiled=tiled)["pixel_values"][0]
        assert (seen != seen[0, 0, 0]).any(axis=(0, 2)).sum() == 1


class TestPrompt:
    @pytest.mark.parametrize("sizes", [[], [(50, 20)], [(46, 46), (20, 130)], [(46, 46), (20, 130), (99, 99)]])
    def test_ids_are_those_of_the_published_code(self, family, folder, sizes):
        images = [photo(h, w) for h, w in sizes]
        text = "At 41.85, -87.65: 12 cafés.\n\n 3 schools"
        prompt = family.prompt(text, images, QUESTIONS)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        for sequence, question in zip(prompt.sequences, QUESTIONS, strict=True):
            content = "<image>\n" * len(images) + "\n".join(filter(None, (text, question)))
            conversation = f"<|User|>: {content.strip()}\n\n<|Assistant|>:"
            expected = [tokenizer.token_to_id("<｜begin▁of▁sentence｜>")]
            for i, part in enumerate(conversation.split("<image>")):
                if i:
                    _, across, down = literal_tiles(images[i - 1], family.settings, len(images) <= 2)
                    tokens = 2 * 3 + 1 + (down * 2) * (across * 2 + 1)
                    expected += [tokenizer.token_to_id("<image>")] * tokens
                expected += tokenizer.encode(part, add_special_tokens=False).ids
            assert sequence.ids.tolist() == expected
            assert sequence.positions.tolist() == [list(range(len(expected)))]
            assert sequence.visible is None
        layouts = [len(image["layout"]) for image in prompt.images]
        assert (prompt.sequences[0].ids == prompt.image_token).sum() == sum(layouts)

    def test_control_tokens_in_text_are_refused(self, family):
        with pytest.raises(BadData, match="geo-text"):
            family.prompt("12 cafés <image>", [], QUESTIONS)

    def test_a_tokenizer_without_the_frame_is_refused(self, family):
        with pytest.raises(BadData, match="User"):
            host.DeepseekVL2(family.settings, host.CHAT, Tokens(tiny_tokenizer(("<image>", host.CONTROL[0]))))

    @pytest.mark.parametrize(
        ("config", "processor"),
        [({"tile_tag": "1D"}, {}), ({"global_view_pos": "tail"}, {}), ({}, {"normalize": False})],
    )
    def test_other_arrangements_are_refused(self, config, processor):
        processor = {"candidate_resolutions": PUBLISHED, "patch_size": 14, "downsample_ratio": 2} | processor
        with pytest.raises(BadData, match="reads images like this") as error:
            host.DeepseekVL2Settings.from_config(deepseek_config() | config, processor)
        assert next(iter(config or {"normalize": 0})) in error.value.found

    def test_an_incomplete_processor_is_refused(self):
        with pytest.raises(BadData, match="downsample_ratio, patch_size is absent"):
            host.DeepseekVL2Settings.from_config(deepseek_config(), {"candidate_resolutions": PUBLISHED})

    def test_published_settings(self):
        processor = {"candidate_resolutions": PUBLISHED, "patch_size": 14, "downsample_ratio": 2}
        assert host.DeepseekVL2Settings.from_config(deepseek_config(), processor) == SETTINGS


# The parts against transformers' own.


def siglip(config, tensors):
    """transformers' tower with the published weights."""
    vision = config["vision_config"]
    ours = SiglipVisionConfig(
        hidden_size=vision["width"],
        intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_use_head=False,
    )
    model = SiglipVisionModel(ours).eval()
    found = {}
    for name in model.state_dict():
        published = name.removeprefix("vision_model.").replace("encoder.layers.", "blocks.")
        for theirs, ours in (
            ("layer_norm", "norm"), ("embeddings.patch_embedding", "patch_embed.proj"), ("post_layernorm", "norm"),
            ("embeddings.position_embedding.weight", "pos_embed"), ("self_attn.out_proj", "attn.proj"),
        ):  # fmt: skip
            published = published.replace(theirs, ours)
        for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
            if part in published:
                whole = tensors[f"vision.{published}".replace(f"self_attn.{part}", "attn.qkv")]
                found[name] = whole.chunk(3)[i]
        if name not in found:
            found[name] = tensors[f"vision.{published}"].reshape(model.state_dict()[name].shape)
    model.load_state_dict(found)
    return model


def published_decoder(tensors):
    prefix = "language.model."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class TestParts:
    def test_tower_is_siglip(self):
        config = deepseek_config()
        tensors = random_tensors(config)
        model = loaded(config, tensors)
        pixels = torch.randn(3, 3, TILE, TILE)
        with torch.no_grad():
            expected = siglip(config, tensors)(pixels).last_hidden_state
            torch.testing.assert_close(model.vision(pixels), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(("side", "ratio", "depth"), [(3, 2, 2), (4, 2, 3), (7, 3, 2)])
    def test_projector(self, side, ratio, depth):
        config = deepseek_config()
        config["vision_config"]["image_size"] = side * 14
        config["projector_config"] |= {"downsample_ratio": ratio, "depth": depth, "mlp_ratio": 2}
        model = loaded(config, random_tensors(config))
        hidden = torch.randn(2, side**2, config["vision_config"]["width"])
        square = hidden.reshape(2, side, side, -1).permute(0, 3, 1, 2)
        square = F.pad(square, (0, -side % ratio, 0, -side % ratio))
        merged = F.unfold(square, kernel_size=ratio, stride=ratio).permute(0, 2, 1)
        layers = [layer for layer in model.projector.layers if isinstance(layer, torch.nn.Linear)]
        assert len(layers) == depth
        with torch.no_grad():
            expected = layers[0](merged)
            for layer in layers[1:]:
                expected = layer(F.gelu(expected))
            torch.testing.assert_close(model.projector(hidden), expected, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize(
        "changes", [{}, {"q_lora_rank": 14}, {"rope_theta": 500.0}, {"rope_scaling": YARN}], ids=str
    )
    @pytest.mark.parametrize("tokens", [1, 40])
    def test_language_model_is_deepseek_v2(self, changes, tokens):
        config = deepseek_config("small", **changes)
        tensors = random_tensors(config)
        whole = published_decoder(tensors)
        fused = {name: tensor for name, tensor in whole.items() if ".experts." not in name}
        for layer in (1, 2):
            part = f"layers.{layer}.mlp.experts"
            gate, up, down = (
                torch.stack([whole[f"{part}.{i}.{which}_proj.weight"] for i in range(6)])
                for which in ("gate", "up", "down")
            )
            fused |= {f"{part}.gate_up_proj": torch.cat((gate, up), dim=1), f"{part}.down_proj": down}
        reference = DeepseekV2Model(DeepseekV2Config(**config["language_config"])).eval()
        reference.load_state_dict(fused)
        self.assert_same(loaded(config, tensors), reference, tokens)

    @pytest.mark.parametrize("heads", [4, 2])
    def test_without_latent_attention_it_is_llama(self, heads):
        config = deepseek_config("tiny", first_k_dense_replace=3, num_key_value_heads=heads)
        tensors = random_tensors(config)
        names = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
        names |= {"max_position_embeddings", "num_key_value_heads"}
        llama = LlamaConfig(**{n: v for n, v in config["language_config"].items() if n in names})
        reference = LlamaModel(llama).eval()
        reference.load_state_dict(published_decoder(tensors))
        self.assert_same(loaded(config, tensors), reference, 40)

    def assert_same(self, model, reference, tokens):
        batch = 1 if tokens == 1 else 2  # of one token alone half the experts see nothing
        embeds = torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = reference(inputs_embeds=embeds).last_hidden_state
            found = model.language["model"](inputs_embeds=embeds).last_hidden_state
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("normalised", [True, False])
    def test_gate_of_the_largest_is_that_of_deepseek_v3(self, normalised):
        config = deepseek_config("base", norm_topk_prob=normalised)
        gate = loaded(config, random_tensors(config)).language["model"].layers[1].mlp.gate
        reference = DeepseekV3TopkRouter(
            DeepseekV3Config(
                hidden_size=32, n_routed_experts=6, num_experts_per_tok=3, n_group=1, topk_group=1,
                routed_scaling_factor=2.0, norm_topk_prob=normalised,
            )
        )  # fmt: skip
        reference.load_state_dict(gate.state_dict(), strict=False)
        reference.e_score_correction_bias.copy_(gate.e_score_correction_bias)
        hidden = torch.randn(50, 32)
        with torch.no_grad():
            _, weights, chosen = reference(hidden)
            ours, places = gate(hidden)
            uncorrected = (hidden @ gate.weight.T).topk(3).indices
        dense = torch.zeros(2, 50, 6)
        dense[0].scatter_(1, chosen, weights)
        dense[1].scatter_(1, places, ours)
        torch.testing.assert_close(dense[1], dense[0])
        assert (uncorrected.sort().values != places.sort().values).any()  # the correction does something


def loaded(config, tensors):
    """The port with weights of these names, without files."""
    model = DeepseekVL2Model(DeepseekVL2Config.read(config))
    ours = {name: t for name, t in tensors.items() if name in model.state_dict()}
    ours["vision.patch_embed.proj.weight"] = tensors["vision.patch_embed.proj.weight"].flatten(1)
    model.load_state_dict(ours)
    return model.requires_grad_(False).eval()


class TestLoading:
    def test_every_tensor_is_the_files(self, folder, model):
        files = {}
        for path in folder.glob("*.safetensors"):
            files |= load_file(path)
        state = model.state_dict()
        assert set(files) - set(state) == {"language.lm_head.weight", "vision.attn_pool.latent"}
        assert all(torch.equal(tensor.reshape(files[name].shape), files[name]) for name, tensor in state.items())

    def test_half_precision(self, folder, model):
        half = DeepseekBackend(DeepseekVL2Model.load(folder, torch.bfloat16))
        prompt = family_of(folder).prompt("12 cafés", [photo(60, 90)], QUESTIONS)
        found, exact = pooled(half, [prompt]), pooled(DeepseekBackend(model), [prompt])
        assert found.dtype == np.float32
        assert np.abs(found - exact).max() > 0
        cosine = (found * exact).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(exact, axis=-1)
        assert cosine.min() > 0.99

    @pytest.fixture
    def own(self, tmp_path):
        tiny_deepseek(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "expected", "found"),
        [
            (lambda t: t.pop("vision.norm.bias"), "vision.norm.bias 24", "nothing of these"),
            (lambda t: t.update({"vision.extra": torch.zeros(2)}), "nothing else", "vision.extra 2"),
            (lambda t: t.update({"image_newline": torch.zeros(5)}), "image_newline 32", "image_newline 5"),
        ],
    )
    def test_other_tensors_are_refused(self, own, change, expected, found):
        tensors = {}
        for path in own.glob("*.safetensors"):
            tensors |= load_file(path)
            path.unlink()
        change(tensors)
        save_file(tensors, own / "model.safetensors")
        with pytest.raises(BadData, match="not those of the model") as error:
            DeepseekVL2Model.load(own)
        assert (error.value.expected, error.value.found) == (expected, found)

    def test_missing_files(self, own):
        for path in own.glob("*.safetensors"):
            path.unlink()
        with pytest.raises(NoInput, match="no weights"):
            DeepseekVL2Model.load(own)
        (own / "model.safetensors").write_bytes(b"\xff" * 100)
        with pytest.raises(BadData, match="not a safetensors file"):
            DeepseekVL2Model.load(own)
        (own / "config.json").unlink()
        with pytest.raises(NoInput, match="no such file"):
            DeepseekVL2Model.load(own)

    @pytest.mark.parametrize(
        "changes",
        [{"topk_method": "group_limited_greedy"}, {"scoring_func": "sigmoid"}, {"n_group": 2}, {"moe_layer_freq": 2}],
    )
    def test_variants_that_were_never_published_are_refused(self, changes):
        with pytest.raises(BadData, match=next(iter(changes))):
            DeepseekVL2Config.read(deepseek_config("small", **changes))

    @pytest.mark.parametrize("changes", [{"projector_type": "linear"}, {"token_pooling": True}])
    def test_other_projectors_are_refused(self, changes):
        config = deepseek_config()
        config["projector_config"] |= changes
        with pytest.raises(BadData, match=next(iter(changes))):
            DeepseekVL2Config.read(config)

    def test_another_models_config_is_refused(self):
        with pytest.raises(BadData, match="vision_config"):
            DeepseekVL2Config.read({"model_type": "llama", "hidden_size": 8})


class TestBackend:
    @pytest.mark.parametrize("sizes", [[], [(90, 40)], [(46, 46), (20, 130)], [(46, 46), (20, 130), (99, 99)]])
    @pytest.mark.parametrize("chunk", [16, 512])
    def test_shared_prefix_equals_a_full_pass_per_task(self, model, family, sizes, chunk):
        images = [photo(h, w, seed=h) for h, w in sizes]
        prompt = family.prompt("At 41.85: 12 cafés, 3 schools.", images, QUESTIONS)
        found = pooled(DeepseekBackend(model), [prompt], chunk=chunk)
        decoder = model.language["model"]
        with torch.no_grad():
            for i, sequence in enumerate(prompt.sequences):
                embeds = decoder.embed_tokens(torch.tensor(sequence.ids))
                tokens = []
                for image in images:
                    tiles, across, down = literal_tiles(image, family.settings, len(images) <= 2)
                    features = model.projector(model.vision(tiles))
                    tokens.append(literal_tokens(features, across, down, model.image_newline, model.view_seperator))
                if tokens:
                    embeds[sequence.ids == prompt.image_token] = torch.cat(tokens)
                hidden = decoder(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
                np.testing.assert_allclose(found[0, i], hidden[0].mean(dim=0).numpy(), atol=1e-5)

    def test_regions_of_unlike_length_in_one_batch(self, model, family):
        prompts = [family.prompt(text, [photo(60, 30)], QUESTIONS) for text in ("12 cafés", "At 41.85: 3 schools")]
        alone = [pooled(DeepseekBackend(model), [prompt])[0] for prompt in prompts]
        np.testing.assert_allclose(pooled(DeepseekBackend(model), prompts), alone, atol=1e-5)


@pytest.mark.slow
class TestExport:
    @pytest.fixture
    def weight(self, folder):
        """The checkpoint's tensors by canonical name, convolutions flattened, as the exporter gives them."""
        tensors = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                tensors |= {canonical(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return lambda name: tensors[name].flatten(1) if tensors[name].ndim == 4 else tensors[name]

    @pytest.fixture
    def nets(self, folder):
        config = DeepseekVL2Config.read(json.loads((folder / "config.json").read_text()))
        return {network.name: network for network in networks(config)}

    @pytest.mark.parametrize(("height", "width"), [(20, 20), (60, 150)])
    def test_vision(self, model, family, nets, weight, height, width):
        inputs = host.vision_inputs(photo(height, width), family.settings, tiled=True)
        tensors = {name: torch.tensor(array) for name, array in inputs.items()}
        found = execute(nets["vision"], weight, tensors)["features"]
        expected = DeepseekBackend(model).vision(inputs)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)

    @pytest.mark.parametrize("split", [(1, 1, 9), (6, 1, 4), (11,)])
    def test_decoder(self, model, nets, weight, split):
        network = nets["decoder"]
        embeds = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(2))
        state = {
            name: torch.zeros([{"batch": 2, "past": 0}.get(d, d) for d in spec.dims])
            for name, spec in network.inputs.items()
            if name.startswith("past")
        }
        hidden, done = [], 0
        for tokens in split:
            positions = torch.arange(done, done + tokens).expand(1, 2, tokens)
            inputs = {"hidden": embeds[:, done : done + tokens], "positions": positions}
            out = execute(network, weight, {**inputs, "begins": torch.zeros(2, tokens, dtype=torch.int64), **state})
            hidden.append(out.pop("last_hidden"))
            state = {name.replace("present", "past"): tensor for name, tensor in out.items()}
            done += tokens
        with torch.no_grad():
            expected = model.language["model"](inputs_embeds=embeds).last_hidden_state
        torch.testing.assert_close(torch.cat(hidden, dim=1), expected, atol=1e-5, rtol=1e-5)

    def test_names_are_those_of_the_files(self, folder, nets):
        used = set()
        for network in nets.values():
            for use in network.uses:
                with torch.device("meta"):
                    used |= {use.weight(name) for name, _ in use.piece.build().named_parameters()}
        with torch.device("meta"):
            state = DeepseekVL2Model(
                DeepseekVL2Config.read(json.loads((folder / "config.json").read_text()))
            ).state_dict()
        assert used == set(state) - {"language.model.embed_tokens.weight"}

    @pytest.mark.parametrize(
        ("size", "names"),
        [("tiny", {"dense"}), ("base", {"routed", "patches", "projector", "arrange"})],
    )
    def test_pieces_can_be_traced_with_every_free_dimension(self, size, names):
        config = DeepseekVL2Config.read(deepseek_config(size, n_routed_experts=3, num_experts_per_tok=2))
        pieces = {use.piece.name: use.piece for network in networks(config) for use in network.uses}
        assert len(pieces) == 10
        for piece in (pieces[name] for name in names):
            graph = trace(piece).proto.graph
            inputs = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
            for name, spec in piece.inputs.items():
                named = [isinstance(dim, str) for dim in spec.dims]
                assert [dim.HasField("dim_param") for dim in inputs[name]] == named, (piece.name, name)
            if piece.name == "routed":  # of attention, and of three experts and the shared one
                assert sum(node.op_type == "Linear" for node in graph.node) == 4 + 4 * 3
