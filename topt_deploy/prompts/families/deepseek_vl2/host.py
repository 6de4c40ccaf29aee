"""DeepSeek-VL2's reading of a prompt: every image as a small whole view, and in tiles of the shape that suits it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topt_deploy.errors import BadData
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.prompt import Array, Prompt, TokenSequence
from topt_deploy.prompts.tokens import Chat, Tokens, task_ids

CHAT = Chat(before="<｜begin▁of▁sentence｜><|User|>: ", image="<image>\n", after="\n\n<|Assistant|>:")
"""The published chat frame; it stands in the authors' code, and in none of a checkpoint's files."""
IMAGE = "<image>"
CONTROL = ("<｜begin▁of▁sentence｜>", "<|User|>", "<|Assistant|>", IMAGE)
TILED = 2
"""With more images than this each is one tile, as published."""
NEWLINE, SEPARATOR, FIRST = 0, 1, 2
"""Rows of the table that ``layout`` points into: a line's end, the border between views, an image's first token."""
FIXED = {"tile_tag": "2D", "global_view_pos": "head", "normalize": True, "sft_format": "deepseek", "image_token": IMAGE}


@dataclass(frozen=True, kw_only=True)
class DeepseekVL2Settings:
    """The image settings in the published files.

    Attributes:
        resolutions: Widths and heights that an image may be fitted into, whole tiles each; the first is one tile.
        side: How many tokens a tile has in each direction.
        mean, std: Of the values between 0 and 1, per channel.
    """

    resolutions: Sequence[Sequence[int]]
    side: int
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def tile(self) -> int:
        """Edge of a tile in pixels."""
        return self.resolutions[0][0]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> "DeepseekVL2Settings":
        """Read config.json and processor_config.json.

        Raises:
            BadData: If they ask for another arrangement than the published models have, or leave one out.
        """
        absent = {"candidate_resolutions", "patch_size", "downsample_ratio"} - set(preprocessor)
        if absent:
            raise BadData(
                f"{', '.join(sorted(absent))} is absent",
                file="processor_config.json",
                expected="a DeepSeek-VL2 model's",
                fix="fetch the model again, all its files from one revision",
            )
        both = {**config, **preprocessor}
        other = {name: both[name] for name, value in FIXED.items() if both.get(name, value) != value}
        if other:
            raise BadData(
                "no published DeepSeek-VL2 reads images like this",
                file="config.json, processor_config.json",
                expected=", ".join(f"{name} {FIXED[name]!r}" for name in other),
                found=", ".join(f"{name} {value!r}" for name, value in other.items()),
            )
        resolutions = tuple((int(width), int(height)) for width, height in preprocessor["candidate_resolutions"])
        patches = resolutions[0][0] // preprocessor["patch_size"]
        return cls(
            resolutions=resolutions,
            side=-(-patches // preprocessor["downsample_ratio"]),
            mean=tuple(preprocessor.get("image_mean", (0.5, 0.5, 0.5))),
            std=tuple(preprocessor.get("image_std", (0.5, 0.5, 0.5))),
        )


class DeepseekVL2:
    """The family (:class:`topt_deploy.prompts.prompt.Family`).

    Args:
        settings: Of the images.
        chat: The model's chat frame: :data:`CHAT`.
        tokens: The model's tokenizer.

    Raises:
        BadData: If the tokenizer lacks a control token of the frame.
    """

    def __init__(self, settings: DeepseekVL2Settings, chat: Chat, tokens: Tokens) -> None:
        self.settings, self.chat, self.tokens = settings, chat, tokens
        self.image_token = {token: tokens.id(token) for token in CONTROL}[IMAGE]

    def prompt(self, text: str, images: Sequence[Array], questions: Sequence[str]) -> Prompt:
        """Build one region's prompt (:class:`topt_deploy.prompts.prompt.Family`)."""
        inputs = tuple(vision_inputs(image, self.settings, tiled=len(images) <= TILED) for image in images)
        sequences = []
        for ids in task_ids(self.chat, self.tokens, text, len(images), questions):
            counts = np.ones(len(ids), np.int64)
            counts[ids == self.image_token] = [len(found["layout"]) for found in inputs]
            whole = np.repeat(ids, counts)
            sequences.append(TokenSequence(ids=whole, positions=np.arange(len(whole))[None]))
        return Prompt(sequences=tuple(sequences), images=inputs, image_token=self.image_token)


def best_resolution(width: int, height: int, resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The width and height that keep most of an image's pixels, and of such the one that is filled best."""

    def kept_and_empty(size: Sequence[int]) -> tuple[int, int]:
        scale = min(size[0] / width, size[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - size[0] * size[1]

    best = max(resolutions, key=kept_and_empty)
    return best[0], best[1]


def vision_inputs(image: Array, settings: DeepseekVL2Settings, *, tiled: bool) -> dict[str, Array]:
    """The inputs of the vision network for one image of m tokens.

    Args:
        image: uint8 (h, w, 3).
        settings: The published ones.
        tiled: True if it may have more than one tile.

    Returns:
        pixel_values float32 (N, 3, tile, tile), the whole view and then the tiles row by row; layout int64 (m,), for
        every token its row in a table of :data:`NEWLINE`, :data:`SEPARATOR` and from :data:`FIRST` on the tokens of
        the N tiles. An image of one tile, whose whole view is that very tile, has N = 1 and twice the same tokens.

    Raises:
        BadData: If a side would vanish.
    """
    side, tile = settings.side, settings.tile
    height, width = image.shape[:2]
    if round(min(height, width) / max(height, width) * tile) == 0:  # nothing but the padding would be left
        raise BadData(
            "the image is too thin to be shown to the model",
            expected=f"at least one pixel of each side when fitted into {tile} × {tile}",
            found=f"{width} × {height} pixels",
            fix="crop it, or leave it out",
        )
    size = best_resolution(width, height, settings.resolutions) if tiled else (tile, tile)
    across, down = size[0] // tile, size[1] // tile
    views = [_fitted(image, (tile, tile), settings)[None]]
    if across * down > 1:
        whole = _fitted(image, size, settings).reshape(3, down, tile, across, tile)
        views.append(whole.transpose(1, 3, 0, 2, 4).reshape(-1, 3, tile, tile))
    pixels = np.concatenate(views)
    token = FIRST + np.arange(len(pixels) * side**2).reshape(-1, side, side)
    local = token[-across * down :].reshape(down, across, side, side).transpose(0, 2, 1, 3)
    layout = [_lines(token[0]), np.array([SEPARATOR]), _lines(local.reshape(down * side, across * side))]
    return {"pixel_values": pixels, "layout": np.concatenate(layout).astype(np.int64)}


def _fitted(image: Array, size: tuple[int, int], settings: DeepseekVL2Settings) -> Array:
    """The image within ``size`` (width, height), on the mean colour: float32 (3, height, width)."""
    from PIL import Image, ImageOps

    colour = tuple(int(value * 255) for value in settings.mean)
    padded = ImageOps.pad(Image.fromarray(image), size, color=colour)
    values = np.asarray(padded, np.float32) / np.float32(255)
    normal = (values - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)
    return normal.transpose(2, 0, 1)


def _lines(tokens: Array) -> Array:
    """Rows of tokens with a line's end behind each."""
    return np.pad(tokens, ((0, 0), (0, 1)), constant_values=NEWLINE).ravel()


SETTINGS = DeepseekVL2Settings


def make_host(spec: EncoderSpec, chat: Chat, tokens: Tokens) -> DeepseekVL2:
    """The host side of a model (:class:`topt_deploy.prompts.families.registry.HostModule`)."""
    return DeepseekVL2(spec.read_settings(), chat, tokens)
