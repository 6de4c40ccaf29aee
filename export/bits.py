"""Weights of linear maps as whole numbers of 8 or 4 bits and their scales."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK = 32
"""Inputs that share a scale in 4 bits."""


def in_8_bits(weight: Array, scale_type: type[np.floating]) -> tuple[Array, Array]:
    """A scale per output, its largest magnitude to 127.

    Args:
        weight: float32 (out, in).
        scale_type: Of the scales. What they are rounded to is what the numbers go by.

    Returns:
        int8 (out, in), and scales (out,).
    """
    scale = _at_least_tiny(np.abs(weight).max(axis=1) / np.float32(127), scale_type)
    codes = np.clip(np.rint(weight / scale.astype(np.float32)[:, None]), -127, 127)
    return codes.astype(np.int8), scale


def in_4_bits(weight: Array, scale_type: type[np.floating]) -> tuple[Array, Array]:
    """A scale per block of :data:`BLOCK` inputs; its largest magnitude is −8, exactly: the sign decides the scale's.

    Args:
        weight: float32 (out, in), in whole blocks.
        scale_type: Of the scales.

    Returns:
        int8 (out, in) of −8 to 7, and scales (out, in / :data:`BLOCK`).
    """
    blocks = weight.reshape(len(weight), -1, BLOCK)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    scale = np.where(extreme == 0, np.float32(1), extreme / np.float32(-8)).astype(scale_type)
    scale = np.where(scale == 0, np.finfo(scale_type).smallest_subnormal, scale)
    codes = np.clip(np.rint(blocks / scale.astype(np.float32)), -8, 7).astype(np.int8)
    return codes.reshape(weight.shape), scale[..., 0]


def _at_least_tiny(scale: Array, scale_type: type[np.floating]) -> Array:
    smallest = np.finfo(np.float32).tiny if scale_type is np.float32 else np.finfo(scale_type).smallest_subnormal
    tiny: Array = np.maximum(scale.astype(scale_type), smallest)
    return tiny
