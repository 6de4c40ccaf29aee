"""Pooled prompt vectors by whatever runs the networks: PyTorch or ONNX sessions (paper: mean of last hidden states).

The decoder is causal and every task begins with the same images and geo-text, so this prefix runs once, and all the
tasks' ends run as one row of tokens on its keys and values, each seeing the prefix and itself. Equal to T full passes,
for what is causal cannot look ahead: neither at what differs between tasks nor at the padding behind a shorter row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .prompt import Array, Prompt, TokenSequence

State = Any
"""Keys and values of what was read so far, in the backend's own form."""
Held = Any
"""Numbers in the backend's own form, where its networks have them: arrays, tensors, memory of a GPU. ``len`` tells the
size of the first axis, and nothing else is asked of it here."""


class Backend(Protocol):
    """Runs a model's networks. B sequences, S new tokens, H hidden width, A position axes.

    What goes from one network to the next stays in the backend's own form; sums alone come back as arrays.

    Attributes:
        chunk: Most prefix tokens that it reads at once: attention's scores take that times the context in memory.
    """

    chunk: int

    def vision(self, image: Mapping[str, Array]) -> Held:
        """One image's features (m, H): token embeddings, or what cross-attention attends to."""

    def join(self, features: Sequence[Held]) -> Held:
        """Features of one image or more, one behind the other: (m, H)."""

    def embed(self, ids: Array, features: Held = None, places: Array | None = None) -> Held:
        """Token embeddings (…, H), images among them.

        Args:
            ids: int64 (…).
            features: Of images, joined.
            places: int64 (…), which row of ``features`` stands for a token, or -1 where its own embedding does; None
                where there are no images.
        """

    def start(self, features: Sequence[Held], batch: int) -> State:
        """The state before the first token; ``features`` of the images where cross-attention reads them."""

    def decode(
        self, state: State, embeds: Held, positions: Array, visible: Array | None, begins: Array | None = None
    ) -> tuple[Held, State]:
        """Read S more tokens.

        Args:
            state: The state after the tokens read before.
            embeds: Of :meth:`embed`, (B, S, H).
            positions: int64 (A, B, S).
            visible: bool (B, S, tiles), or None.
            begins: int64 (B, S), the first of the S tokens that each may look at, besides all that were read before;
                None lets it look at all before it.

        Returns:
            Last hidden states (B, S, H), and the state after them.
        """

    def sums(self, hidden: Held, ranges: Array) -> Array:
        """Sums over ranges of tokens, float64 (B, R, H).

        Args:
            hidden: Of :meth:`decode`, (B, S, H).
            ranges: int64 (B, R, 2), the first token of each range and the one behind its last.
        """


@runtime_checkable
class WholeReader(Protocol):
    """Runs a model that reads a task's whole input in one pass: it has no keys and values to share, or looks ahead."""

    def last_hidden(self, sequence: TokenSequence) -> Array:
        """Last hidden states (n, H) of one task's n tokens."""


def allowed(begins: Array, past: int) -> Array:
    """The attention mask of S new tokens: bool (B, 1, S, past + S), computed from ``begins`` (B, S)."""
    new = np.arange(begins.shape[1])
    among = (new >= begins[:, :, None]) & (new <= new[:, None])  # (B, S, S)
    return np.concatenate([np.ones((*begins.shape, past), bool), among], axis=2)[:, None]


def pooled(backend: Backend | WholeReader, prompts: Sequence[Prompt], *, chunk: int | None = None) -> Array:
    """Prompt vectors: the mean of the last hidden states over every token of each task's input.

    Args:
        backend: Runs the networks.
        prompts: B regions, all with the same T tasks; one alone where tokens see images by cross-attention.
        chunk: Prefix tokens read at once, at most; the backend's own choice by default.

    Returns:
        float32 (B, T, H).
    """
    if isinstance(backend, WholeReader):
        means = [[backend.last_hidden(s).mean(axis=0, dtype=np.float64) for s in p.sequences] for p in prompts]
        return np.array(means, np.float32)
    chunk = chunk or backend.chunk
    tasks = len(prompts[0].sequences)
    features = [backend.vision(image) for prompt in prompts for image in prompt.images]
    state = backend.start(features, len(prompts))
    rows, joined = _rows(prompts, features, backend)
    del features  # joined ones are kept once
    # A longer beginning of some region than the shortest one's is read with each of its tasks' ends.
    shared = min(_shared(prompt.sequences) for prompt in prompts)

    def read(parts: Sequence[Sequence[tuple[_Row, Array]]], begins: Array | None = None) -> Held:
        nonlocal state
        ids, places, positions, visible = _stack(parts)
        embeds = backend.embed(ids, joined, None if joined is None else places)
        hidden, state = backend.decode(state, embeds, positions, visible, begins)
        return hidden

    total = np.zeros((len(prompts), 1, 1))
    # Parts of one length: a last one of a few tokens would take as long as one of many.
    for every in np.array_split(np.arange(shared), -(-shared // chunk)) if shared else ():
        whole = np.full((len(prompts), 1, 2), (0, len(every)))
        total = total + backend.sums(read([[(row, every)] for row in rows[::tasks]]), whole)
    totals = np.repeat(total, tasks, axis=1)  # (B, T, H), or (B, T, 1) zeros
    lengths = np.array([len(row) for row in rows]).reshape(-1, tasks)
    ends = [[(row, np.arange(shared, len(row))) for row in rows[b : b + tasks]] for b in range(0, len(rows), tasks)]
    if lengths.max() > shared:
        own = lengths - shared
        width = int(own.sum(axis=1).max())
        stops = np.cumsum(own, axis=1)
        hidden = read(ends, np.stack([_begins(of.tolist(), width) for of in own]))
        totals = totals + backend.sums(hidden, np.stack([stops - own, stops], axis=-1))
    return (totals / lengths[:, :, None]).astype(np.float32)


def _begins(lengths: Sequence[int], width: int) -> Array:
    """The start of the task's part that each of ``width`` tokens is in; tokens after the last part count to it."""
    starts = np.cumsum([0, *lengths[:-1]])
    return np.repeat(starts, [*lengths[:-1], width - starts[-1]])


def _shared(sequences: Sequence[TokenSequence]) -> int:
    """The number of tokens that the tasks have in common at their beginning."""
    shortest = min(len(sequence.ids) for sequence in sequences)
    ids = np.stack([sequence.ids[:shortest] for sequence in sequences])
    differing = np.flatnonzero((ids != ids[0]).any(axis=0))
    return int(differing[0]) if len(differing) else shortest


@dataclass(frozen=True, eq=False)
class _Row:
    """One task's input.

    Attributes:
        sequence: The tokens.
        places: int64 (n,), which row of the joined features stands for a token, or -1.
    """

    sequence: TokenSequence
    places: Array

    def __len__(self) -> int:
        return len(self.sequence.ids)


def _rows(prompts: Sequence[Prompt], features: Sequence[Held], backend: Backend) -> tuple[list[_Row], Held]:
    """Every task's input, and the features that stand among tokens, joined; None where there are none."""
    rows, first, used = [], 0, []
    left = iter(features)
    for prompt in prompts:
        own = [next(left) for _ in prompt.images]
        among = bool(own) and prompt.image_token is not None
        for sequence in prompt.sequences:
            image = sequence.ids == prompt.image_token if among else np.zeros(len(sequence.ids), bool)
            rows.append(_Row(sequence, np.where(image, first + np.cumsum(image) - 1, -1)))
        if among:
            used += own
            first += sum(map(len, own))
    return rows, backend.join(used) if used else None


def _stack(rows: Sequence[Sequence[tuple[_Row, Array]]]) -> tuple[Array, Array, Array, Array | None]:
    """Tokens of B rows, each of parts one after the other: ids, places, positions, visible.

    A shorter row is filled up with its last token.
    """
    width = max(sum(len(index) for _, index in parts) for parts in rows)
    filled = []
    for parts in rows:
        last, index = parts[-1]
        missing = width - sum(len(i) for _, i in parts)
        filled.append([*parts[:-1], (last, np.concatenate([index, np.full(missing, len(last) - 1)]))])
    ids = np.stack([np.concatenate([row.sequence.ids[i] for row, i in parts]) for parts in filled])
    places = np.stack([np.concatenate([row.places[i] for row, i in parts]) for parts in filled])
    positions = np.stack(
        [np.concatenate([row.sequence.positions[:, i] for row, i in parts], axis=1) for parts in filled], axis=1
    )
    if filled[0][0][0].sequence.visible is None:
        return ids, places, positions, None
    seen = [
        np.concatenate([row.sequence.visible[i] for row, i in p if row.sequence.visible is not None]) for p in filled
    ]
    return ids, places, positions, np.stack(seen)
