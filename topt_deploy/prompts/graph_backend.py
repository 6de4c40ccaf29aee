"""An encoder's graphs as a backend, whatever runs them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from topt_deploy.errors import NoDevice

from .encoder_spec import EncoderSpec
from .pooling import Held
from .prompt import Array, TokenSequence

VISION, CROSS, DECODER = "vision", "cross", "decoder"
"""Networks of an encoder: each has a decoder."""
WHOLE = "whole"
"""The only network of an encoder that came as a graph."""
LAST_HIDDEN = "last_hidden_state"
WHOLE_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})
"""Inputs that such a graph may have, int64 (batch, tokens) each, and its output that is read, (batch, tokens, H)."""
PAST, PRESENT = "past_", "present_"
"""The prefixes of the decoder's inputs and outputs of keys and values."""


class Runner(Protocol):
    """A loaded graph."""

    inputs: tuple[str, ...]

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Compute the named outputs: of arrays, and of what other runners of its kind have put out."""


class Connector(Protocol):
    """The steps from one network's outputs to the next one's inputs, on the device where the outputs are."""

    def join(self, features: Sequence[Held]) -> Held:
        """One behind the other: (m, H)."""

    def place(self, text: Array, features: Held, places: Array) -> Held:
        """Token embeddings with images among them, (…, H).

        Args:
            text: float32 (n, H), of the tokens that no image stands for, in order.
            features: Joined, (m, H).
            places: Of :meth:`.pooling.Backend.embed`.
        """

    def sums(self, hidden: Held, ranges: Array) -> Array:
        """Sums over ranges of tokens (:meth:`.pooling.Backend.sums`)."""


class HostConnector:
    """:class:`Connector` of runners that give numpy arrays."""

    def join(self, features: Sequence[Array]) -> Array:
        """One behind the other."""
        return np.concatenate(features)

    def place(self, text: Array, features: Array, places: Array) -> Array:
        """Token embeddings with images among them."""
        embeds = np.empty((*places.shape, text.shape[-1]), np.float32)
        image = places >= 0
        embeds[~image] = text
        embeds[image] = features[places[image]]
        return embeds

    def sums(self, hidden: Array, ranges: Array) -> Array:
        """Sums over ranges of tokens."""
        sums = [[h[a:b].sum(axis=0, dtype=np.float64) for a, b in of] for h, of in zip(hidden, ranges, strict=True)]
        return np.array(sums)


class EmbeddingRows(Protocol):
    """Token embeddings (vocabulary, H): an array, or what reads as one."""

    def __getitem__(self, ids: Array, /) -> Array:
        """Rows (n, H) of int64 (n,)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """The state of a decoder after the tokens that it has read.

    Attributes:
        past: Keys and values, (B, K, P, D) each, by the names of the decoder's inputs.
        cross: Keys and values of images that cross-attention reads, the same for every sequence.
    """

    past: Mapping[str, Held]
    cross: Mapping[str, Held]


class GraphBackend:
    """Runs an encoder's graphs (:class:`topt_deploy.prompts.pooling.Backend`).

    Args:
        networks: The runner of each network, by its name.
        embedding: Token embeddings (vocabulary, H).
        past: Key heads and width of every past tensor that the decoder reads, by name.
        spec: The encoder's.
        chunk: Prefix tokens to read at once.
        between: The steps between them.
    """

    def __init__(
        self,
        networks: Mapping[str, Runner],
        *,
        embedding: EmbeddingRows,
        past: Mapping[str, Sequence[int]],
        spec: EncoderSpec,
        chunk: int,
        between: Connector | None = None,
    ) -> None:
        self._networks, self._embedding, self._past, self._spec = networks, embedding, past, spec
        self._between = between or HostConnector()
        self.chunk = chunk

    def embed(self, ids: Array, features: Held = None, places: Array | None = None) -> Held:
        """Token embeddings (…, H), images among them."""
        if places is None or not (places >= 0).any():
            return self._rows(ids.reshape(-1)).reshape(*ids.shape, -1)
        return self._between.place(self._rows(ids[places < 0]), features, places)

    def _rows(self, ids: Array) -> Array:
        """Token embeddings, float32 (n, H), of int64 (n,)."""
        found: Array = self._embedding[ids].astype(np.float32)
        return found

    def join(self, features: Sequence[Held]) -> Held:
        """Features of images, one behind the other."""
        return self._between.join(features)

    def vision(self, image: Mapping[str, Array]) -> Held:
        """One image's features (m, H)."""
        contiguous = {name: np.asarray(array, order="C") for name, array in image.items()}
        return self._networks[VISION].run(contiguous, ["features"])["features"]

    def start(self, features: Sequence[Held], batch: int) -> State:
        """The state before the first token."""
        past = {name: np.zeros((batch, heads, 0, width), np.float32) for name, (heads, width) in self._past.items()}
        cross: dict[str, Held] = {}
        if CROSS in self._networks:
            # Without images: states of zeros give keys and values of zeros, which add nothing.
            none = np.zeros((self._spec.settings["patches"], self._spec.width), np.float32)
            states = self._between.join(features) if features else none
            names = [name for name in self._networks[DECODER].inputs if name.startswith("cross_")]
            cross = self._networks[CROSS].run({"states": states}, names)
        return State(past=past, cross=cross)

    def decode(
        self, state: State, embeds: Held, positions: Array, visible: Array | None, begins: Array | None = None
    ) -> tuple[Held, State]:
        """Read S more tokens (:class:`topt_deploy.prompts.pooling.Backend`)."""
        if begins is None:
            begins = np.zeros(positions.shape[1:], np.int64)
        tokens = {"positions": positions, "begins": begins}
        if visible is not None:
            tokens["visible"] = visible
        contiguous = {name: np.ascontiguousarray(array) for name, array in tokens.items()}
        presents = {name: name.replace(PAST, PRESENT, 1) for name in state.past}
        found = self._networks[DECODER].run(
            {**state.past, **state.cross, **contiguous, "hidden": embeds}, ["last_hidden", *presents.values()]
        )
        return found["last_hidden"], replace(state, past={name: found[now] for name, now in presents.items()})

    def sums(self, hidden: Held, ranges: Array) -> Array:
        """Sums over ranges of tokens, float64 (B, R, H)."""
        return self._between.sums(hidden, ranges)


class WholeGraph:
    """Runs a graph that reads a whole input (:class:`topt_deploy.prompts.pooling.WholeReader`).

    Args:
        graph: Its runner.
    """

    def __init__(self, graph: Runner) -> None:
        self._graph = graph

    def last_hidden(self, sequence: TokenSequence) -> Array:
        """Last hidden states (n, H) of one task's n tokens."""
        ids = sequence.ids[None]
        known = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.ascontiguousarray(sequence.positions),
            "token_type_ids": np.zeros_like(ids),
        }
        hidden: Array = self._graph.run({name: known[name] for name in self._graph.inputs}, [LAST_HIDDEN])[LAST_HIDDEN]
        return hidden[0]


def import_openvino() -> ModuleType:
    """The package openvino.

    Raises:
        NoDevice: If it is not installed.
    """
    if find_spec("openvino") is None:
        raise NoDevice("OpenVINO is not installed", expected="openvino", fix="pip install 'topt-deploy[openvino]'")
    # openvino imports its converter, and that Intel's telemetry where it is installed. Nothing here reports.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_module("openvino")
