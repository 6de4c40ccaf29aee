"""Qwen2.5-VL's reading of a prompt: images as patches in windows, and rotary positions in three axes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topt_deploy.errors import BadConfig, BadData
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.images import normalised
from topt_deploy.prompts.prompt import Array, Prompt, TokenSequence
from topt_deploy.prompts.tokens import Chat, Tokens, task_ids

LONGEST = 200
"""The limit of an image's aspect ratio, as the authors set it."""
BICUBIC = 3
"""Pillow's number of the filter."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Qwen25VLSettings:
    """The image settings in the published files. A square of ``merge`` × ``merge`` patches becomes one token.

    Attributes:
        image_token: Id of the token that an image's embeddings replace.
        patch: Edge of a patch in pixels.
        frames: How often a still image is repeated, as the model was made for videos.
        merge: Edge of a token's square in patches.
        window: Edge of an attention window in pixels.
        min_pixels, max_pixels: Size of the resized image; ``max_pixels`` may be lowered to save time.
        resample: Pillow's number of the filter that resizes.
        scale: Of the bytes before ``mean`` is taken off and ``std`` divides, per channel.
    """

    image_token: int
    patch: int
    frames: int
    merge: int
    window: int
    min_pixels: int
    max_pixels: int
    resample: int
    scale: float
    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise BadConfig(
                "an image's limits of size exclude each other",
                expected="0 < min_pixels <= max_pixels",
                found=f"min_pixels {self.min_pixels}, max_pixels {self.max_pixels}",
            )

    @property
    def factor(self) -> int:
        """Edge of a token's square in pixels."""
        return self.patch * self.merge

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> "Qwen25VLSettings":
        """Read config.json and preprocessor_config.json; of the latter's two forms of limits the older goes before."""
        vision = config["vision_config"]
        size = preprocessor.get("size") or {}
        return cls(
            image_token=config["image_token_id"],
            patch=vision["patch_size"],
            frames=vision["temporal_patch_size"],
            merge=vision["spatial_merge_size"],
            window=vision["window_size"],
            min_pixels=preprocessor.get("min_pixels") or size.get("shortest_edge", 56 * 56),
            max_pixels=preprocessor.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280),
            resample=preprocessor.get("resample", BICUBIC),
            scale=preprocessor.get("rescale_factor", 1 / 255),
            mean=tuple(preprocessor.get("image_mean", CLIP_MEAN)),
            std=tuple(preprocessor.get("image_std", CLIP_STD)),
        )


class Qwen25VL:
    """The family (:class:`topt_deploy.prompts.prompt.Family`).

    Args:
        settings: Of the images.
        chat: The model's chat frame.
        tokens: The model's tokenizer.
    """

    def __init__(self, settings: Qwen25VLSettings, chat: Chat, tokens: Tokens) -> None:
        self.settings, self.chat, self.tokens = settings, chat, tokens

    def prompt(self, text: str, images: Sequence[Array], questions: Sequence[str]) -> Prompt:
        """Build one region's prompt (:class:`topt_deploy.prompts.prompt.Family`)."""
        sizes = [resized(image.shape[0], image.shape[1], self.settings) for image in images]
        grids = [(h // self.settings.factor, w // self.settings.factor) for h, w in sizes]
        return Prompt(
            sequences=tuple(
                sequence(ids, grids, self.settings.image_token)
                for ids in task_ids(self.chat, self.tokens, text, len(images), questions)
            ),
            images=tuple(vision_inputs(image, size, self.settings) for image, size in zip(images, sizes, strict=True)),
            image_token=self.settings.image_token,
        )


def resized(height: int, width: int, settings: Qwen25VLSettings) -> tuple[int, int]:
    """Height and width after resizing: whole tokens, within the limits, nearly the same shape.

    Raises:
        BadData: If the image is too long for its width.
    """
    long, short = max(height, width), min(height, width)
    if long > LONGEST * short:
        raise BadData(
            "the image is too long for its width",
            expected=f"at most {LONGEST} times as long as wide",
            found=f"{width} × {height} pixels",
            fix="crop it, or leave it out",
        )
    factor, pixels = settings.factor, height * width
    sides = round(height / factor) * factor, round(width / factor) * factor
    if sides[0] * sides[1] > settings.max_pixels:
        shrink = math.sqrt(pixels / settings.max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if sides[0] * sides[1] < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / pixels)
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return sides


def vision_inputs(image: Array, size: tuple[int, int], settings: Qwen25VLSettings) -> dict[str, Array]:
    """The inputs of the vision network for one image, of M tokens with U patches each, in W windows of K tokens.

    Args:
        image: uint8 (h, w, 3).
        size: Height and width to resize it to.
        settings: The published ones.

    Returns:
        pixel_values float32 (M, U, 1176); positions int64 (M, U, 2), each patch's row and column; and the windows
        that most layers attend within: windows int64 (W, K), which tokens, window_valid bool (W, K), and unwindow
        int64 (M), where among the W · K places each token is found.
    """
    from PIL import Image

    height, width = size
    pixels = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling(settings.resample)))
    values = normalised(pixels, settings.scale, settings.mean, settings.std)
    p, m = settings.patch, settings.merge
    rows, columns = height // p // m, width // p // m
    squares = values.reshape(rows, m, p, columns, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)  # R, C, m, m, 3, p, p
    frames = np.repeat(squares, settings.frames, axis=4)
    places = np.indices((rows * m, columns * m)).reshape(2, rows, m, columns, m).transpose(1, 3, 2, 4, 0)
    return {
        "pixel_values": frames.reshape(rows * columns, m * m, -1),
        "positions": places.reshape(rows * columns, m * m, 2).astype(np.int64),
        **_windows(rows, columns, settings.window // p // m),
    }


def _windows(rows: int, columns: int, edge: int) -> dict[str, Array]:
    """The tokens of each window, row by row; windows at the right and lower border are cut off."""
    token = np.pad(
        np.arange(rows * columns).reshape(rows, columns),
        ((0, -rows % edge), (0, -columns % edge)),
        constant_values=-1,
    )
    tiled = token.reshape(token.shape[0] // edge, edge, token.shape[1] // edge, edge)
    windows = tiled.transpose(0, 2, 1, 3).reshape(-1, edge * edge)
    valid = windows >= 0
    unwindow = np.empty(rows * columns, np.int64)
    unwindow[windows[valid]] = np.flatnonzero(valid)
    return {"windows": np.maximum(windows, 0).astype(np.int64), "window_valid": valid, "unwindow": unwindow}


def sequence(ids: Array, grids: Sequence[tuple[int, int]], image_token: int) -> TokenSequence:
    """A token for every square of every image, and positions: text counts on, an image's rows and columns count apart.

    Args:
        ids: int64 (n,), with one image token per image.
        grids: Rows and columns of each image's tokens.
        image_token: Its id.

    Returns:
        Ids and positions (time, row, column); after an image, text goes on behind its longer edge.
    """
    places = np.flatnonzero(ids == image_token)
    counts = np.ones(len(ids), np.int64)
    counts[places] = [rows * columns for rows, columns in grids]
    positions, at, done = [], 0, 0
    for place, (rows, columns) in zip(places.tolist(), grids, strict=True):
        positions.append(np.tile(np.arange(at, at + place - done), (3, 1)))
        at, done = at + place - done, place + 1
        positions.append(at + np.indices((1, rows, columns)).reshape(3, -1))
        at += max(rows, columns)
    positions.append(np.tile(np.arange(at, at + len(ids) - done), (3, 1)))
    return TokenSequence(ids=np.repeat(ids, counts), positions=np.concatenate(positions, axis=1).astype(np.int64))


SETTINGS, CHAT = Qwen25VLSettings, None


def make_host(spec: EncoderSpec, chat: Chat, tokens: Tokens) -> Qwen25VL:
    """The host side of a model (:class:`topt_deploy.prompts.families.registry.HostModule`)."""
    return Qwen25VL(spec.read_settings(), chat, tokens)
