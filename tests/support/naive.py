"""Prompt vectors the published way: every task's whole input in a pass of its own. Imports no torch."""

from typing import Any

import numpy as np

from topt_deploy.prompts.pooling import Backend
from topt_deploy.prompts.prompt import Prompt


def naive(backend: Backend, prompt: Prompt) -> np.ndarray[Any, Any]:
    """float32 (T, H), sharing nothing."""
    vectors = []
    for sequence in prompt.sequences:
        features = [backend.vision(image) for image in prompt.images]
        joined = places = None
        if prompt.image_token is not None and features:
            image = sequence.ids == prompt.image_token
            joined, places = backend.join(features), np.where(image, np.cumsum(image) - 1, -1)[None]
        state = backend.start(features, 1)
        visible = None if sequence.visible is None else sequence.visible[None]
        embeds = backend.embed(sequence.ids[None], joined, places)
        hidden, _ = backend.decode(state, embeds, sequence.positions[:, None], visible)
        vectors.append(backend.sums(hidden, np.array([[[0, len(sequence.ids)]]]))[0, 0] / len(sequence.ids))
    return np.stack(vectors).astype(np.float32)
