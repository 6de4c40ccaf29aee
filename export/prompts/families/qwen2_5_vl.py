"""Qwen2.5-VL's vision tower and decoder for export.

transformers' vision tower cuts its windows while it runs, and a tracer keeps the cuts of its sample: wrong for every
image of another size. Here the windows are an input, made by the host
(topt_deploy/prompts/families/qwen2_5_vl/host.py). M tokens of U patches each, D wide, in W windows of K tokens.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.families.qwen2_5_vl.host import LONGEST
from topt_deploy.prompts.pytorch.checkpoint import Checkpoint
from topt_deploy.tensorrt.profile import ProfileRange

from .. import causal_decoder
from ..causal_decoder import auto_config
from ..pieces import Network, Piece, Spec, Use
from ..traced_operators import attention

EMBEDDING = "model.embed_tokens.weight"

TOKENS, WINDOWS = "image_tokens", "windows"


class Patches(nn.Module):
    """Pixels of patches to their embeddings, and their rows and columns to cosines and sines."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(_pixels(config), config.hidden_size, bias=False)  # a convolution without overlap
        with torch.device("cpu"):
            self.rotary = qwen.Qwen2_5_VLVisionRotaryEmbedding(config)  # type: ignore[arg-type]

    def forward(self, pixel_values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(M, U, pixels) and int64 (M, U, 2) to (M, U, D) and twice (M, U, head width)."""
        angles = self.rotary(pixel_values, positions.flatten(0, 1))
        cos, sin = (tensor.reshape(-1, positions.shape[1], tensor.shape[-1]) for tensor in angles)
        return self.proj(pixel_values), cos, sin


class Block(qwen.Qwen2_5_VLVisionBlock):
    """transformers' block with attention over the whole image, or within windows where these are given."""

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        windows: Tensor | None = None,
        window_valid: Tensor | None = None,
        unwindow: Tensor | None = None,
    ) -> tuple[Tensor]:
        """(M, U, D), twice (M, U, head width), and windows (W, K), (W, K), (M) to (M, U, D)."""
        query, key, value = self.attn.qkv(self.norm1(hidden)).unflatten(-1, (3, self.attn.num_heads, -1)).unbind(2)
        query, key = qwen.apply_rotary_pos_emb_vision(query, key, cos, sin)
        query, key, value = (_cut(tensor, windows).transpose(1, 2) for tensor in (query, key, value))
        mask = None
        if window_valid is not None:
            mask = window_valid[:, :, None].expand(-1, -1, hidden.shape[1]).flatten(1)[:, None, None]
        seen = attention(query, key, value, mask, self.attn.scaling)
        seen = seen.transpose(1, 2).reshape(-1, *hidden.shape[1:])
        seen = seen if unwindow is None else seen.index_select(0, unwindow)
        hidden = hidden + self.attn.proj(seen)
        return (hidden + self.mlp(self.norm2(hidden)),)


def _cut(tensor: Tensor, windows: Tensor | None) -> Tensor:
    """(M, U, heads, head width) to windows of patches (W, K · U, …); without windows, the image is one."""
    if windows is None:
        return tensor.flatten(0, 1)[None]
    # index_select becomes ONNX's Gather; an index in brackets would become GatherND.
    return tensor.index_select(0, windows.flatten()).unflatten(0, (-1, windows.shape[1])).flatten(1, 2)


class Merger(nn.Module):
    """transformers' last layer: U patches to one token embedding."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.inner = qwen.Qwen2_5_VLPatchMerger(config.out_hidden_size, config.hidden_size, config.spatial_merge_size)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        """(M, U, D) to (M, H)."""
        return (self.inner(hidden),)


def networks(config: PreTrainedConfig) -> tuple[Network, ...]:
    """The vision network, for one image at a time, and the decoder."""
    return _vision(config.vision_config), _decoder(causal_decoder.for_export(config.text_config))


def canonical(name: str) -> str:
    """The name of a weight in the published files; transformers has called its halves by other names since."""
    name = name.removeprefix("model.") if name.startswith(("model.visual.", "model.language_model.")) else name
    return name.replace("language_model.", "model.", 1) if name.startswith("language_model.") else name


def _pixels(config: PreTrainedConfig) -> int:
    """Numbers in a patch."""
    return int(config.in_channels * config.temporal_patch_size * config.patch_size**2)


def _vision(config: PreTrainedConfig) -> Network:
    per_token = config.spatial_merge_size**2
    window = (config.window_size // config.spatial_merge_size // config.patch_size) ** 2
    head_width = config.hidden_size // config.num_heads
    inputs = {
        "pixel_values": Spec(dtype=torch.float32, dims=(TOKENS, per_token, _pixels(config))),
        "positions": Spec(dtype=torch.int64, dims=(TOKENS, per_token, 2)),
        "windows": Spec(dtype=torch.int64, dims=(WINDOWS, window)),
        "window_valid": Spec(dtype=torch.bool, dims=(WINDOWS, window)),
        "unwindow": Spec(dtype=torch.int64, dims=(TOKENS,)),
    }
    angles = Spec(dtype=torch.float32, dims=(TOKENS, per_token, head_width))
    hidden = {"hidden": Spec(dtype=torch.float32, dims=(TOKENS, per_token, config.hidden_size))}
    whole = hidden | {"cos": angles, "sin": angles}
    windowed = whole | {name: inputs[name] for name in ("windows", "window_valid", "unwindow")}
    patches = Piece(
        name="patches",
        build=lambda: Patches(config),
        inputs={name: inputs[name] for name in ("pixel_values", "positions")},
        outputs=("hidden", "cos", "sin"),
    )
    full, local = (
        Piece(name=name, build=lambda: Block(config), inputs=read, outputs=("hidden",))
        for name, read in (("full", whole), ("window", windowed))
    )
    merger = Piece(name="merger", build=lambda: Merger(config), inputs=hidden, outputs=("features",))
    return Network(
        name="vision",
        inputs=inputs,
        outputs=("features",),
        uses=(
            Use(piece=patches, weights="visual.patch_embed."),
            *(
                Use(piece=full if i in config.fullatt_block_indexes else local, weights=f"visual.blocks.{i}.")
                for i in range(config.depth)
            ),
            Use(piece=merger, weights="visual.merger."),
        ),
    )


def _decoder(config: PreTrainedConfig) -> Network:
    head_width = config.hidden_size // config.num_attention_heads
    return causal_decoder.decoder(
        width=config.hidden_size,
        axes=3,
        rotary=lambda: qwen.Qwen2_5_VLRotaryEmbedding(config),  # type: ignore[arg-type]
        rotary_width=head_width,
        layers=[("layer", lambda: qwen.Qwen2_5_VLDecoderLayer(config, 0))] * config.num_hidden_layers,  # type: ignore[arg-type]
        cache=(config.num_key_value_heads, head_width, head_width),
        norm=lambda: qwen.Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps),
        prefix="model.",
    )


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The published configuration."""
    return auto_config(checkpoint)


def image_profile(spec: EncoderSpec) -> dict[str, ProfileRange]:
    """Of one image: tokens up to its limit of pixels, and windows for the longest shape that it may have."""
    edge = spec.settings["patch"] * spec.settings["merge"]
    most = max(spec.settings["max_pixels"] // edge**2, 1)
    side = max(spec.settings["window"] // edge, 1)
    both_edges = math.sqrt(most) * (math.sqrt(LONGEST) + 1 / math.sqrt(LONGEST))
    windows = min(most, math.ceil(most / side**2 + both_edges / side) + 1)
    usual = min(most, 1024)
    return {
        TOKENS: ProfileRange(min=1, opt=usual, max=most),
        WINDOWS: ProfileRange(min=1, opt=min(windows, max(usual // side**2, 1)), max=windows),
    }
