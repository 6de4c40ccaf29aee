"""Pooled prompt vectors by whatever runs the networks: PyTorch or ONNX sessions (paper: mean of last hidden states).

The decoder is causal and every task begins with the same images and geo-text, so this prefix runs once, and all the
tasks' ends run as one row of tokens on its keys and values, each seeing the prefix and itself. Equal to T full passes,
for what is causal cannot look ahead: neither at what differs between tasks nor at the padding behind a shorter row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .prompt import Array, Prompt, TokenSequence

State = Any
"""Keys and values of what was read so far, in the backend's own form."""


class Backend(Protocol):
    """Runs a model's networks. B sequences, S new tokens, H hidden width, A position axes.

    Attributes:
        chunk: How many prefix tokens it reads best at once: attention's scores take that times the context in memory.
    """

    chunk: int

    def embed(self, ids: Array) -> Array:
        """Token embeddings, float32 (n, H), of int64 (n,)."""

    def vision(self, image: Mapping[str, Array]) -> Array:
        """One image's features, float32 (m, H): token embeddings, or what cross-attention attends to."""

    def start(self, features: Sequence[Array], batch: int) -> State:
        """The state before the first token; ``features`` of the images where cross-attention reads them."""

    def decode(
        self, state: State, embeds: Array, positions: Array, visible: Array | None, begins: Array | None = None
    ) -> tuple[Array, State]:
        """Read S more tokens.

        Args:
            state: What was read before.
            embeds: float32 (B, S, H).
            positions: int64 (A, B, S).
            visible: bool (B, S, tiles), or None.
            begins: int64 (B, S), the first of the S tokens that each may look at, besides all that were read before;
                None lets it look at all before it.

        Returns:
            Last hidden states float32 (B, S, H), and the state after them.
        """


def allowed(begins: Array, past: int) -> Array:
    """Where each of S new tokens may look: bool (B, 1, S, past + S), of ``begins`` (B, S)."""
    new = np.arange(begins.shape[1])
    among = (new >= begins[:, :, None]) & (new <= new[:, None])  # (B, S, S)
    return np.concatenate([np.ones((*begins.shape, past), bool), among], axis=2)[:, None]


def pooled(backend: Backend, prompts: Sequence[Prompt], *, chunk: int | None = None) -> Array:
    """Prompt vectors: the mean of the last hidden states over every token of each task's input.

    Args:
        backend: Runs the networks.
        prompts: B regions, all with the same T tasks; one alone where tokens see images by cross-attention.
        chunk: Prefix tokens read at once; the backend's own choice by default.

    Returns:
        float32 (B, T, H).
    """
    chunk = chunk or backend.chunk
    tasks = len(prompts[0].sequences)
    features = [[backend.vision(image) for image in prompt.images] for prompt in prompts]
    rows = [
        _Row(backend, sequence, prompt.image_token, found)
        for prompt, found in zip(prompts, features, strict=True)
        for sequence in prompt.sequences
    ]
    # A longer beginning of some region than the shortest one's is read with each of its tasks' ends.
    shared = min(_shared(prompt.sequences) for prompt in prompts)
    state = backend.start([f for found in features for f in found], len(prompts))
    total = np.zeros((len(prompts), backend.embed(rows[0].sequence.ids[:1]).shape[1]))
    for start in range(0, shared, chunk):
        every = np.arange(start, min(start + chunk, shared))
        hidden, state = backend.decode(state, *_stack([[(row, every)] for row in rows[::tasks]]))
        total = total + hidden.sum(axis=1, dtype=np.float64)
    totals = np.repeat(total[:, None], tasks, axis=1)  # (B, T, H)
    lengths = np.array([len(row) for row in rows]).reshape(-1, tasks)
    ends = [[(row, np.arange(shared, len(row))) for row in rows[b : b + tasks]] for b in range(0, len(rows), tasks)]
    if lengths.max() > shared:
        embeds, positions, visible = _stack(ends)
        begins = np.stack([_begins([len(index) for _, index in end], embeds.shape[1]) for end in ends])
        hidden, _ = backend.decode(state, embeds, positions, visible, begins)
        stops = np.cumsum(lengths - shared, axis=1)
        for b, t in np.ndindex(stops.shape):
            own = hidden[b, stops[b, t] - (lengths[b, t] - shared) : stops[b, t]]
            totals[b, t] = totals[b, t] + own.sum(axis=0, dtype=np.float64)
    return (totals / lengths[:, :, None]).astype(np.float32)


def _begins(lengths: Sequence[int], width: int) -> Array:
    """Where the end that each of ``width`` tokens belongs to begins; what stands behind the last belongs to it."""
    starts = np.cumsum([0, *lengths[:-1]])
    return np.repeat(starts, [*lengths[:-1], width - starts[-1]])


def _shared(sequences: Sequence[TokenSequence]) -> int:
    """How many tokens the tasks have in common at their beginning."""
    shortest = min(len(sequence.ids) for sequence in sequences)
    ids = np.stack([sequence.ids[:shortest] for sequence in sequences])
    differing = np.flatnonzero((ids != ids[0]).any(axis=0))
    return int(differing[0]) if len(differing) else shortest


class _Row:
    """One task's input, embedded as far as it is asked for.

    Args:
        backend: Has the token embeddings.
        sequence: The tokens.
        image_token: Where images stand among them.
        features: Of the images, in order.
    """

    def __init__(
        self, backend: Backend, sequence: TokenSequence, image_token: int | None, features: Sequence[Array]
    ) -> None:
        self.backend, self.sequence = backend, sequence
        self.features = np.concatenate(features) if features and image_token is not None else None
        self.places = sequence.ids == image_token
        self.before = np.cumsum(self.places) - 1

    def __len__(self) -> int:
        return len(self.sequence.ids)

    def embeds(self, index: Array) -> Array:
        """Of the tokens at ``index``, images in their places."""
        embeds = self.backend.embed(self.sequence.ids[index])
        if self.features is not None:
            image = self.places[index]
            embeds[image] = self.features[self.before[index][image]]
        return embeds


def _stack(rows: Sequence[Sequence[tuple[_Row, Array]]]) -> tuple[Array, Array, Array | None]:
    """Tokens of B rows, each of parts one after the other: embeds, positions, visible.

    A shorter row is filled up with its last token.
    """
    width = max(sum(len(index) for _, index in parts) for parts in rows)
    filled = []
    for parts in rows:
        last, index = parts[-1]
        missing = width - sum(len(i) for _, i in parts)
        filled.append([*parts[:-1], (last, np.concatenate([index, np.full(missing, len(last) - 1)]))])
    embeds = np.stack([np.concatenate([row.embeds(i) for row, i in parts]) for parts in filled])
    positions = np.stack(
        [np.concatenate([row.sequence.positions[:, i] for row, i in parts], axis=1) for parts in filled], axis=1
    )
    if filled[0][0][0].sequence.visible is None:
        return embeds, positions, None
    seen = [
        np.concatenate([row.sequence.visible[i] for row, i in p if row.sequence.visible is not None]) for p in filled
    ]
    return embeds, positions, np.stack(seen)
