"""Sizes that an encoder's engines are made for where none are asked for, by the names of its networks' dimensions."""

import math
from collections.abc import Callable, Mapping

from topt_deploy.prompts.encoder_spec import DEEPSEEK, MLLAMA, QWEN, EncoderSpec
from topt_deploy.prompts.families.qwen2_5_vl.host import LONGEST
from topt_deploy.tensorrt.profile import Profile, ProfileRange

from .causal_decoder import BATCH, PAST, TOKENS
from .families import deepseek_vl2, mllama, qwen2_5_vl
from .pieces import Network

DECODER: Profile = {
    BATCH: ProfileRange(min=1, opt=1, max=8),
    TOKENS: ProfileRange(min=1, opt=256, max=2048),
    PAST: ProfileRange(min=0, opt=1024, max=16384),
}
"""Regions at once, tokens read at once, and those read before."""
IMAGES = 8
"""As many images as a region may have where the decoder attends to all of them."""


def default_profile(spec: EncoderSpec) -> dict[str, ProfileRange]:
    """Every dimension of an encoder's networks, with sizes that its own settings of images allow."""
    return {**DECODER, **_IMAGES.get(spec.family, _none)(spec)}


def of_network(network: Network, profile: Profile) -> dict[str, ProfileRange]:
    """The part of a profile that a network's inputs have."""
    names = {dim for spec in network.inputs.values() for dim in spec.dims if isinstance(dim, str)}
    return {name: sizes for name, sizes in profile.items() if name in names}


def _none(spec: EncoderSpec) -> dict[str, ProfileRange]:
    return {}


def _qwen(spec: EncoderSpec) -> dict[str, ProfileRange]:
    """Of one image: tokens up to its limit of pixels, and windows for the longest shape that it may have."""
    edge = spec.settings["patch"] * spec.settings["merge"]
    most = max(spec.settings["max_pixels"] // edge**2, 1)
    side = max(spec.settings["window"] // edge, 1)
    both_edges = math.sqrt(most) * (math.sqrt(LONGEST) + 1 / math.sqrt(LONGEST))
    windows = min(most, math.ceil(most / side**2 + both_edges / side) + 1)
    usual = min(most, 1024)
    return {
        qwen2_5_vl.TOKENS: ProfileRange(min=1, opt=usual, max=most),
        qwen2_5_vl.WINDOWS: ProfileRange(min=1, opt=min(windows, max(usual // side**2, 1)), max=windows),
    }


def _mllama(spec: EncoderSpec) -> dict[str, ProfileRange]:
    """Tiles of one image; tiles and states of all, of which there are some even where there is no image."""
    tiles, states = spec.settings["tiles"], spec.settings["patches"]
    return {
        mllama.VALID: ProfileRange(min=1, opt=tiles, max=tiles),
        mllama.TILES: ProfileRange(min=1, opt=tiles, max=tiles * IMAGES),
        mllama.STATES: ProfileRange(min=states, opt=states * tiles, max=states * tiles * IMAGES),
    }


def _deepseek(spec: EncoderSpec) -> dict[str, ProfileRange]:
    """Tiles and tokens of one image: the whole view, and the tiles of the shapes that it may be fitted into."""
    side, (tile, _) = spec.settings["side"], spec.settings["resolutions"][0]
    shapes = [(width // tile, height // tile) for width, height in spec.settings["resolutions"]]
    view = side * (side + 1) + 1
    tokens = [view + down * side * (across * side + 1) for across, down in shapes]
    tiles = [1 + across * down if across * down > 1 else 1 for across, down in shapes]
    return {
        deepseek_vl2.TILES: ProfileRange(min=1, opt=min(3, max(tiles)), max=max(tiles)),
        deepseek_vl2.TOKENS: ProfileRange(min=min(tokens), opt=sorted(tokens)[len(tokens) // 2], max=max(tokens)),
    }


_IMAGES: Mapping[str, Callable[[EncoderSpec], dict[str, ProfileRange]]] = {
    QWEN: _qwen,
    MLLAMA: _mllama,
    DEEPSEEK: _deepseek,
}
