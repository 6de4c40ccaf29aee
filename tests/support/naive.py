"""Prompt vectors the published way: every task's whole input in a pass of its own. Imports no torch."""

from typing import Any

import numpy as np

from topt_deploy.encoder.backend import Backend
from topt_deploy.encoder.prompt import Prompt


def naive(backend: Backend, prompt: Prompt) -> np.ndarray[Any, Any]:
    """float32 (T, H), sharing nothing."""
    vectors = []
    for sequence in prompt.sequences:
        features = [backend.vision(image) for image in prompt.images]
        embeds = backend.embed(sequence.ids)
        if prompt.image_token is not None and features:
            embeds[np.flatnonzero(sequence.ids == prompt.image_token)] = np.concatenate(features)
        state = backend.start(features, 1)
        visible = None if sequence.visible is None else sequence.visible[None]
        hidden, _ = backend.decode(state, embeds[None], sequence.positions[:, None], visible)
        vectors.append(hidden[0].astype(np.float64).mean(axis=0))
    return np.stack(vectors).astype(np.float32)
