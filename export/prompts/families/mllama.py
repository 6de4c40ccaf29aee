"""Llama-3.2-Vision (mllama) in pieces: the vision network, the images' keys and values, and the decoder."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.models.mllama import modeling_mllama as mllama

from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.families.mllama.pytorch import see
from topt_deploy.prompts.pytorch.checkpoint import Checkpoint
from topt_deploy.tensorrt.profile import ProfileRange

from ..causal_decoder import BATCH, TOKENS, auto_config, decoder, for_export
from ..pieces import Network, Piece, Spec, Use

EMBEDDING = "model.language_model.embed_tokens.weight"

VALID, TILES, STATES = "tiles", "visible_tiles", "image_states"
VISION, TEXT = "model.vision_model.", "model.language_model."


class Embed(nn.Module):
    """An image's tiles to patch embeddings at their places, filled up to the number of tiles the model always takes.

    Every state of a tile in use attends to those that fill up, as the published weights are used to; only among
    themselves these don't look. So they cannot be left out.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.patch, self.tiles, width = config.patch_size, config.max_num_tiles, config.hidden_size
        self.patch_embedding = nn.Linear(config.num_channels * self.patch**2, width, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.pre_tile_positional_embedding = mllama.MllamaPrecomputedAspectRatioEmbedding(config)
        self.gated_positional_embedding = mllama.MllamaPrecomputedPositionEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor, aspect_ratio_id: Tensor) -> tuple[Tensor, Tensor]:
        valid, channels, edge, _ = pixel_values.shape
        grid, width = edge // self.patch, len(self.class_embedding)
        patches = pixel_values.reshape(valid, channels, grid, self.patch, grid, self.patch).permute(0, 2, 4, 1, 3, 5)
        x = self.patch_embedding(patches.reshape(valid, grid**2, -1))  # (t, patches, D)
        x = torch.cat((x, x.new_zeros(self.tiles, grid**2, width)))[: self.tiles]  # a tile of zeros embeds as zeros
        x = self.pre_tile_positional_embedding(x[None], aspect_ratio_id)
        x = torch.cat((self.class_embedding.expand(1, self.tiles, 1, width), x), dim=2)
        x = self.layernorm_pre(self.gated_positional_embedding(x, aspect_ratio_id))
        states = x.shape[2]
        x = F.pad(x, (0, 0, 0, -states % 8))
        used = (torch.arange(self.tiles) < valid)[:, None] & (torch.arange(x.shape[2]) < states)
        mask = used.reshape(-1, 1) | used.reshape(1, -1)
        return x.flatten(1, 2), mask[None, None]


class VisionLayer(nn.Module):
    """A layer of transformers' vision encoders."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (self.inner(hidden, attention_mask=mask),)


class Between(nn.Module):
    """The step between the local layers and the global ones: a norm, and the positions of the tiles once more."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layernorm_post = nn.LayerNorm(config.hidden_size)
        self.post_tile_positional_embedding = mllama.MllamaPrecomputedAspectRatioEmbedding(config)

    def forward(self, hidden: Tensor, aspect_ratio_id: Tensor) -> tuple[Tensor]:
        tiled = self.layernorm_post(hidden).unflatten(1, (self.post_tile_positional_embedding.max_num_tiles, -1))
        return (self.post_tile_positional_embedding(tiled, aspect_ratio_id).flatten(1, 2),)


class Project(nn.Module):
    """The last layer's output beside those of some local layers, without their padding, to the decoder's width."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.tiles, self.states = config.max_num_tiles, _states(config)
        self.multi_modal_projector = nn.Linear(config.vision_output_dim, width)

    def forward(self, last: Tensor, *taken: Tensor) -> tuple[Tensor]:
        both = torch.cat((last, torch.stack(taken, dim=-1).flatten(2)), dim=-1)
        kept = both.unflatten(1, (self.tiles, -1))[0, :, : self.states]
        return (self.multi_modal_projector(kept).flatten(0, 1),)


class CrossKeys(nn.Module):
    """The images' states (L, H) to one cross-attention layer's keys and values (1, K, L, D)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        attention = mllama.MllamaTextCrossAttention(config, 0)
        self.k_proj, self.v_proj, self.k_norm = attention.k_proj, attention.v_proj, attention.k_norm
        self.heads = (attention.num_key_value_heads, attention.head_dim)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (part(states[None]).unflatten(-1, self.heads) for part in (self.k_proj, self.v_proj))
        return self.k_norm(keys).transpose(1, 2), values.transpose(1, 2)


class See(nn.Module):
    """:func:`topt_deploy.prompts.families.mllama.pytorch.see`, once for all layers."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.states = states

    def forward(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        mask, seeing = see(visible, self.states)
        return mask, seeing.float()


class CrossLayer(nn.Module):
    """A cross-attention layer of transformers; all sequences share the images' keys and values, hence lie in a row."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.inner = mllama.MllamaCrossAttentionDecoderLayer(config, 0)
        attention = self.inner.cross_attn
        del attention.k_proj, attention.v_proj, attention.k_norm  # they made what is given as cross_key, cross_value

    def forward(
        self, hidden: Tensor, mask: Tensor, seeing: Tensor, cross_key: Tensor, cross_value: Tensor
    ) -> tuple[Tensor]:
        out = self.inner(
            hidden.flatten(0, 1)[None],
            cross_attention_states=None,
            cross_attention_mask=mask.flatten(0, 2)[None, None],
            attention_mask=None,
            full_text_row_masked_out_mask=seeing.flatten(0, 1)[None, None],
            past_key_values=SimpleNamespace(layers=[SimpleNamespace(keys=cross_key, values=cross_value)]),
        )
        return (out.reshape(hidden.shape),)


def _states(vision: Any) -> int:
    """States per tile."""
    return int(vision.image_size // vision.patch_size) ** 2 + 1


def networks(config: PreTrainedConfig) -> tuple[Network, ...]:
    """The vision network of one image, the cross-attention layers' keys and values of all images, and the decoder."""
    config = for_export(config)
    return _vision(config), _cross(config), _decoder(config)


def _vision(config: Any) -> Network:
    """``pixel_values`` of t tiles and ``aspect_ratio_id`` to ``features``, (max_num_tiles · states per tile, H)."""
    vision = config.vision_config
    tokens = vision.max_num_tiles * (_states(vision) + -_states(vision) % 8)
    pixels = Spec(dtype=torch.float32, dims=(VALID, vision.num_channels, vision.image_size, vision.image_size))
    ratio = Spec(dtype=torch.int64, dims=(1,))
    hidden = Spec(dtype=torch.float32, dims=(1, tokens, vision.hidden_size))
    mask = Spec(dtype=torch.bool, dims=(1, 1, tokens, tokens))

    def layer(name: str, gated: bool) -> Piece:
        return Piece(
            name=name,
            build=lambda: VisionLayer(mllama.MllamaVisionEncoderLayer(vision, gated)),
            inputs={"hidden": hidden, "mask": mask},
            outputs=("out",),
        )

    embed = Piece(
        name="embed",
        build=lambda: Embed(vision),
        inputs={"pixel_values": pixels, "aspect_ratio_id": ratio},
        outputs=("hidden", "mask"),
    )
    between = Piece(
        name="between",
        build=lambda: Between(vision),
        inputs={"hidden": hidden, "aspect_ratio_id": ratio},
        outputs=("out",),
    )
    taken = [f"taken_{i}" for i in range(len(vision.intermediate_layers_indices))]
    project = Piece(
        name="project",
        build=lambda: Project(vision, config.text_config.hidden_size),
        inputs={"last": hidden, **dict.fromkeys(taken, hidden)},
        outputs=("features",),
    )
    local, across = layer("local", False), layer("global", True)
    rows = [
        *((local, f"{VISION}transformer.layers.{i}.") for i in range(vision.num_hidden_layers)),
        (between, VISION),
        *((across, f"{VISION}global_transformer.layers.{i}.") for i in range(vision.num_global_layers)),
    ]
    name = ["hidden", *(f"hidden_{i}" for i in range(len(rows)))]
    uses = [Use(piece=embed, weights=VISION)]
    for i, (piece, weights) in enumerate(rows):
        uses.append(Use(piece=piece, weights=weights, names={"hidden": name[i], "out": name[i + 1]}))
    outer = {t: f"hidden_{i}" for t, i in zip(taken, vision.intermediate_layers_indices, strict=True)}
    uses.append(Use(piece=project, weights="model.", names={"last": name[-1], **outer}))
    return Network(name="vision", inputs=dict(embed.inputs), outputs=project.outputs, uses=tuple(uses))


def _cross(config: Any) -> Network:
    """``states`` of all images, one after the other, to ``cross_key_i`` and ``cross_value_i`` of every such layer i."""
    text = config.text_config
    states = Spec(dtype=torch.float32, dims=(STATES, text.hidden_size))
    piece = Piece(
        name="cross_keys",
        build=lambda: CrossKeys(text),
        inputs={"states": states},
        outputs=("cross_key", "cross_value"),
    )
    uses = tuple(
        Use(
            piece=piece,
            weights=f"{TEXT}layers.{i}.cross_attn.",
            names={name: f"{name}_{i}" for name in piece.outputs},
        )
        for i in text.cross_attention_layers
    )
    outputs = tuple(use.outer(name) for use in uses for name in piece.outputs)
    return Network(name="cross", inputs=dict(piece.inputs), outputs=outputs, uses=uses)


def _decoder(config: Any) -> Network:
    """The decoder of Llama's form, in which layers that look at the images take the place of some."""
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    plain = decoder(
        width=text.hidden_size,
        axes=1,
        rotary=lambda: mllama.MllamaRotaryEmbedding(text),
        rotary_width=head,
        layers=[("layer", lambda: mllama.MllamaSelfAttentionDecoderLayer(text, 0))] * text.num_hidden_layers,
        cache=(text.num_key_value_heads, head, head),
        norm=lambda: mllama.MllamaTextRMSNorm(text.hidden_size, eps=text.rms_norm_eps),
        prefix=TEXT,
    )
    visible = Spec(dtype=torch.bool, dims=(BATCH, TOKENS, TILES))
    cached = Spec(dtype=torch.float32, dims=(1, text.num_key_value_heads, STATES, head))
    see = Piece(
        name="see",
        build=lambda: See(_states(config.vision_config)),
        inputs={"visible": visible},
        outputs=("mask", "seeing"),
    )
    cross = Piece(
        name="cross_layer",
        build=lambda: CrossLayer(text),
        inputs={
            "hidden": plain.inputs["hidden"],
            "mask": Spec(dtype=torch.bool, dims=(BATCH, 1, TOKENS, STATES)),
            "seeing": Spec(dtype=torch.float32, dims=(BATCH, TOKENS, 1)),
            "cross_key": cached,
            "cross_value": cached,
        },
        outputs=("hidden",),
    )
    uses, inputs, dropped = list(plain.uses), {**plain.inputs, "visible": visible}, set()
    for i in text.cross_attention_layers:
        (at,) = (n for n, use in enumerate(uses) if use.weights == f"{TEXT}layers.{i}.")
        names = {name: f"{name}_{i}" for name in ("cross_key", "cross_value")}
        inputs |= dict.fromkeys(names.values(), cached)
        dropped |= {uses[at].outer(name) for name in ("past_key", "past_value", "present_key", "present_value")}
        uses[at] = Use(piece=cross, weights=uses[at].weights, names=names)
    return replace(
        plain,
        inputs={name: spec for name, spec in inputs.items() if name not in dropped},
        outputs=tuple(name for name in plain.outputs if name not in dropped),
        uses=(Use(piece=see), *uses),
    )


def canonical(name: str) -> str:
    """The name of a weight as transformers' modules call it; files begin it otherwise."""
    name = re.sub(r"^(model\.)?language_model\.(model\.)?", TEXT, name)
    name = re.sub(r"^(vision_model|multi_modal_projector)\.", r"model.\1.", name)
    return name.removeprefix(TEXT) if "lm_head" in name else name


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The published configuration."""
    return auto_config(checkpoint)


IMAGES = 8
"""As many images as a region may have where the decoder attends to all of them."""


def image_profile(spec: EncoderSpec) -> dict[str, ProfileRange]:
    """Tiles of one image; tiles and states of all, of which there are some even where there is no image."""
    tiles, states = spec.settings["tiles"], spec.settings["patches"]
    return {
        VALID: ProfileRange(min=1, opt=tiles, max=tiles),
        TILES: ProfileRange(min=1, opt=tiles, max=tiles * IMAGES),
        STATES: ProfileRange(min=states, opt=states * tiles, max=states * tiles * IMAGES),
    }
