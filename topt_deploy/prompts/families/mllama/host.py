"""Llama-3.2-Vision's (mllama's) reading of a prompt: images as tiles, which text sees through cross-attention."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from topt_deploy.errors import BadConfig
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.images import normalised
from topt_deploy.prompts.prompt import Array, Prompt, TokenSequence
from topt_deploy.prompts.tokens import Chat, Tokens, task_ids


@dataclass(frozen=True, kw_only=True)
class MllamaSettings:
    """The image settings in the published files.

    Attributes:
        image_token: Id of the token from which on an image is seen.
        tile: Edge of a tile in pixels.
        tiles: The most that an image is cut into, and the number that the vision network fills every image up to.
        patches: States per tile: one for each patch, and one for the whole tile.
        resample: Pillow's number of the filter that resizes.
        scale: Of the bytes before ``mean`` is taken off and ``std`` divides, per channel.
    """

    image_token: int
    tile: int
    tiles: int
    patches: int
    resample: int
    scale: float
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> "MllamaSettings":
        """Read config.json and preprocessor_config.json.

        Raises:
            BadConfig: If the two files mean different tiles.
        """
        vision = config["vision_config"]
        tiles = {"edge": vision["image_size"], "number": vision["max_num_tiles"]}
        cut = {"edge": preprocessor["size"]["height"], "number": preprocessor["max_image_tiles"]}
        if cut != tiles:
            raise BadConfig(
                "the images' tiles are not those that the model takes",
                file="preprocessor_config.json",
                expected=f"{tiles}, as config.json says",
                found=cut,
                fix="take both files from the same model",
            )
        return cls(
            image_token=config["image_token_index"],
            tile=tiles["edge"],
            tiles=tiles["number"],
            patches=(tiles["edge"] // vision["patch_size"]) ** 2 + 1,
            resample=preprocessor["resample"],
            scale=preprocessor["rescale_factor"],
            mean=tuple(preprocessor["image_mean"]),
            std=tuple(preprocessor["image_std"]),
        )


@dataclass(frozen=True, eq=False)
class Mllama:
    """The family (:class:`topt_deploy.prompts.prompt.Family`).

    Attributes:
        settings: Of the images.
        chat: The model's chat frame around images and text.
        tokens: The model's tokenizer.
        imageless: The frame around text alone, where the published template puts a system message first.
    """

    settings: MllamaSettings
    chat: Chat
    tokens: Tokens
    imageless: Chat

    def prompt(self, text: str, images: Sequence[Array], questions: Sequence[str]) -> Prompt:
        """Build one region's prompt (:class:`topt_deploy.prompts.prompt.Family`)."""
        inputs = tuple(vision_inputs(image, self.settings) for image in images)
        tiles = [len(image["pixel_values"]) for image in inputs]
        chat = self.chat if images else self.imageless
        return Prompt(
            sequences=tuple(
                TokenSequence(
                    ids=ids, positions=np.arange(len(ids))[None], visible=visible_tiles(ids, tiles, self.settings)
                )
                for ids in task_ids(chat, self.tokens, text, len(images), questions)
            ),
            images=inputs,
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The arrangement of an image on tiles.

    Attributes:
        id: Of the arrangement, as the model's tables of positions count them from 1.
        rows, columns: Of tiles.
        height, width: Of the resized image, in pixels; it lies at the upper left.
    """

    id: int
    rows: int
    columns: int
    height: int
    width: int


def layout(height: int, width: int, settings: MllamaSettings) -> Layout:
    """The tiles that let an image be enlarged least, or reduced least where it does not fit; the fewest of several."""
    tile, most = settings.tile, settings.tiles
    arrangements = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most]
    scales = [min(r * tile / height, c * tile / width) for r, c in arrangements]
    best = min((scale for scale in scales if scale >= 1), default=max(scales))
    chosen = min((i for i in range(len(scales)) if scales[i] == best), key=lambda i: math.prod(arrangements[i]))
    rows, columns = arrangements[chosen]
    down = min(max(height, tile), rows * tile)
    across = min(max(width, tile), columns * tile)
    if across / width < down / height:
        down = min(max(math.floor(height * (across / width)), 1), down)
    else:
        across = min(max(math.floor(width * (down / height)), 1), across)
    return Layout(id=chosen + 1, rows=rows, columns=columns, height=down, width=across)


def vision_inputs(image: Array, settings: MllamaSettings) -> dict[str, Array]:
    """The inputs of the vision network for one image of t tiles.

    Args:
        image: uint8 (h, w, 3).
        settings: The published ones.

    Returns:
        pixel_values float32 (t, 3, tile, tile), row by row; aspect_ratio_id int64 (1,), the tiles' arrangement.
    """
    from PIL import Image

    on, tile = layout(image.shape[0], image.shape[1], settings), settings.tile
    pixels = np.zeros((on.rows * tile, on.columns * tile, 3), np.uint8)
    pixels[: on.height, : on.width] = np.asarray(
        Image.fromarray(image).resize((on.width, on.height), Image.Resampling(settings.resample))
    )
    values = normalised(pixels, settings.scale, settings.mean, settings.std)
    tiles = values.reshape(on.rows, tile, on.columns, tile, 3).transpose(0, 2, 4, 1, 3)
    return {
        "pixel_values": np.ascontiguousarray(tiles.reshape(-1, 3, tile, tile)),
        "aspect_ratio_id": np.array([on.id], np.int64),
    }


def visible_tiles(ids: Array, tiles: Sequence[int], settings: MllamaSettings) -> Array:
    """The tiles that each token sees: an image's from its token to the next image's. Adjacent images are seen together.

    Tiles that fill an image up count, though no token sees them by this table: one that sees nothing at all, as
    those before the first image, attends to every state, these too, and passes the layer's feed-forward part by.
    That is how transformers computes it.

    Args:
        ids: int64 (n,), with one image token per image.
        tiles: How many each image was cut into.
        settings: The published ones.

    Returns:
        bool (n, images · settings.tiles); without images (n, 1), for a tile of zeros, which adds nothing.
    """
    places = np.flatnonzero(ids == settings.image_token).tolist()
    visible = np.zeros((len(ids), max(len(tiles) * settings.tiles, 1)), bool)
    end = len(ids)
    for image, (here, following) in reversed(list(enumerate(pairwise([*places, len(ids)])))):
        end = end if following == here + 1 else following
        first = image * settings.tiles
        visible[here:end, first : first + tiles[image]] = True
    return visible


SETTINGS, CHAT = MllamaSettings, None


def make_host(spec: EncoderSpec, chat: Chat, tokens: Tokens) -> Mllama:
    """The host side of a model (:class:`topt_deploy.prompts.families.registry.HostModule`)."""
    return Mllama(spec.read_settings(), chat, tokens, Chat(**(spec.imageless or spec.chat)))
