"""Weights of linear maps as whole numbers of 8 or 4 bits and their scales."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK = 32
"""Inputs that share a scale in 4 bits."""
LARGEST_CODE = 127
LARGEST_PAIR = 128
"""The most that two neighbouring codes of one sign may add up to, so that their products with unsigned 8-bit numbers
fit 16 bits: 255 · 128 = 32,640 of 32,767. Processors without VNNI multiply in 8 bits with an instruction (VPMADDUBSW)
that adds each pair of products in 16 bits, and cuts off what is beyond."""
_ABOVE_ROUNDING = np.float32(1 + 2**-20)


def quantize_int8(
    weight: Array, scale_type: type[np.floating], *, pairs_fit_16_bits: bool = False
) -> tuple[Array, Array]:
    """Round a weight to whole multiples of one scale per output, whose largest magnitude becomes 127.

    Args:
        weight: float32 (out, in).
        scale_type: Type of the scales. The codes are computed from the scales as rounded to it.
        pairs_fit_16_bits: Raise an output's scale where two neighbouring codes of one sign would add up to more than
            :data:`LARGEST_PAIR`. Exact in 16 bits only with float32 scales.

    Returns:
        int8 (out, in), and scales (out,).
    """
    largest = np.abs(weight).max(axis=1) / np.float32(LARGEST_CODE)
    if pairs_fit_16_bits:
        pairs = _largest_pairs(weight) * (_ABOVE_ROUNDING / np.float32(LARGEST_PAIR))
        largest = np.maximum(largest, pairs)
    scale = _at_least_tiny(largest, scale_type)
    codes = np.clip(np.rint(weight / scale.astype(np.float32)[:, None]), -LARGEST_CODE, LARGEST_CODE)
    return codes.astype(np.int8), scale


def _largest_pairs(weight: Array) -> Array:
    """Return the largest magnitude (out,) of the sum of inputs 2i and 2i + 1, as the instruction pairs them.

    Where the two have opposite signs their sum is smaller than the larger one, which has a limit of its own.
    """
    even, odd = weight[:, 0::2], weight[:, 1::2]
    found: Array = np.abs(even[:, : odd.shape[1]] + odd).max(axis=1, initial=0)
    return found


def quantize_int4(weight: Array, scale_type: type[np.floating]) -> tuple[Array, Array]:
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
