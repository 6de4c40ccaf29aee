"""DeepSeek-VL2's networks: its own port's layers, one after the other."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.families.deepseek_vl2.pytorch.config import DeepseekVL2Config
from topt_deploy.prompts.families.deepseek_vl2.pytorch.model import DecoderLayer, language_norm, rotary, routed
from topt_deploy.prompts.families.deepseek_vl2.pytorch.vision import (
    PatchEmbedding,
    Projector,
    VisionBlock,
    arrange,
    vision_norm,
)
from topt_deploy.prompts.pytorch.checkpoint import Checkpoint
from topt_deploy.tensorrt.profile import ProfileRange

from ..causal_decoder import ATTENTION, decoder, for_export
from ..causal_decoder import Norm as OneOutput
from ..pieces import Network, Piece, Spec, Use

EMBEDDING = "language.model.embed_tokens.weight"

TILES, TOKENS = "tiles", "image_tokens"


class _Arrange(nn.Module):
    """Tokens of all tiles in their order, with lines' ends and the border between views."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image_newline, self.view_seperator = (nn.Parameter(torch.empty(width)) for _ in range(2))

    def forward(self, features: Tensor, layout: Tensor) -> tuple[Tensor]:
        return (arrange(features, layout, self.image_newline, self.view_seperator),)


def networks(config: DeepseekVL2Config) -> tuple[Network, ...]:
    """The tower with its projector, and the language model."""
    vision = replace(config.vision, attention=ATTENTION)
    config = replace(config, vision=vision, language=for_export(config.language))  # type: ignore[arg-type]
    return _vision(config), _decoder(config)


def _vision(config: DeepseekVL2Config) -> Network:
    vision, width = config.vision, config.language.hidden_size
    tokens = -(-vision.side // config.projector.ratio)

    def spec(*dims: int | str) -> Spec:
        return Spec(dtype=torch.float32, dims=dims)

    pixels = spec(TILES, 3, vision.tile, vision.tile)
    layout = Spec(dtype=torch.int64, dims=(TOKENS,))
    hidden = {"hidden": spec(TILES, vision.side**2, vision.width)}
    features = spec(TILES, tokens**2, width)
    patches = Piece(
        name="patches",
        build=lambda: OneOutput(PatchEmbedding(vision)),
        inputs={"pixel_values": pixels},
        outputs=("hidden",),
    )
    block = Piece(name="vision_block", build=lambda: OneOutput(VisionBlock(vision)), inputs=hidden, outputs=("hidden",))
    norm = Piece(name="vision_norm", build=lambda: OneOutput(vision_norm(vision)), inputs=hidden, outputs=("hidden",))
    projector = Piece(
        name="projector", build=lambda: OneOutput(Projector(config)), inputs=hidden, outputs=("features",)
    )
    order = Piece(
        name="arrange",
        build=lambda: _Arrange(width),
        inputs={"features": features, "layout": layout},
        outputs=("features",),
    )
    return Network(
        name="vision",
        inputs={"pixel_values": pixels, "layout": layout},
        outputs=("features",),
        uses=(
            Use(piece=patches, weights="vision."),
            *(Use(piece=block, weights=f"vision.blocks.{i}.") for i in range(vision.layers)),
            Use(piece=norm, weights="vision.norm."),
            Use(piece=projector, weights="projector."),
            Use(piece=order),
        ),
    )


def _decoder(config: DeepseekVL2Config) -> Network:
    language = config.language
    latent, heads, head = (
        int(n or 0) for n in (language.kv_lora_rank, language.num_key_value_heads, language.head_dim)
    )
    return decoder(
        width=language.hidden_size,
        axes=1,
        rotary=lambda: rotary(language),
        rotary_width=head,
        layers=[
            ("routed", lambda: DecoderLayer(language, 0, routed=True))
            if routed(language, i)
            else ("dense", lambda: DecoderLayer(language, 0, routed=False))
            for i in range(language.num_hidden_layers)
        ],
        cache=(1, latent, head) if language.use_mla else (heads, head, head),
        norm=lambda: language_norm(language),
        prefix="language.model.",
        for_engines={"routed": lambda: DecoderLayer(language, 0, routed=True, dense=True)},
    )


def canonical(name: str) -> str:
    """The name of a weight as :func:`networks` calls it: as published."""
    return name


def read_config(checkpoint: Checkpoint) -> DeepseekVL2Config:
    """The published configuration, which transformers does not know."""
    return DeepseekVL2Config.read(dict(checkpoint.config))


def image_profile(spec: EncoderSpec) -> dict[str, ProfileRange]:
    """Tiles and tokens of one image: the whole view, and the tiles of the shapes that it may be fitted into."""
    side, (tile, _) = spec.settings["side"], spec.settings["resolutions"][0]
    shapes = [(width // tile, height // tile) for width, height in spec.settings["resolutions"]]
    view = side * (side + 1) + 1
    tokens = [view + down * side * (across * side + 1) for across, down in shapes]
    tiles = [1 + across * down if across * down > 1 else 1 for across, down in shapes]
    return {
        TILES: ProfileRange(min=1, opt=min(3, max(tiles)), max=max(tiles)),
        TOKENS: ProfileRange(min=min(tokens), opt=sorted(tokens)[len(tokens) // 2], max=max(tokens)),
    }
