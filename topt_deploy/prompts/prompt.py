"""The input of a frozen language model for one region and all tasks, as arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSequence:
    """One task's whole input: n tokens.

    Attributes:
        ids: int64 (n,), token ids.
        positions: int64 (A, n), rotary positions; A is 1, or 3 (time, height, width) for Qwen2.5-VL.
        visible: bool (n, tiles), which image tiles a token may attend to through cross-attention; None in families
            that put images among the tokens.
    """

    ids: Array
    positions: Array
    visible: Array | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One region's input for T tasks, which begin alike: images and geo-text come before the task's question.

    Attributes:
        sequences: T of them, each as long as it is.
        images: Per image, in order, the inputs of the family's vision network by name.
        image_token: The token id in whose places the images' embeddings stand, in order; None where they do not.
    """

    sequences: tuple[TokenSequence, ...]
    images: tuple[Mapping[str, Array], ...] = ()
    image_token: int | None = None


class Family(Protocol):
    """A family of models: how text and images become the inputs of its networks."""

    def prompt(self, text: str, images: Sequence[Array], questions: Sequence[str]) -> Prompt:
        """Build one region's prompt.

        Args:
            text: The geo-text.
            images: uint8 (h, w, 3) each, of any size.
            questions: T task questions, "" for none.

        Raises:
            BadData: If a text holds a control token, or an image is of a shape that the model is not made for, or the
                model reads none.
        """
