"""An encoder's graphs as a backend, whatever runs them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from ..errors import NoDevice
from .prompt import Array
from .spec import EncoderSpec

VISION, CROSS, DECODER = "vision", "cross", "decoder"
"""Networks of an encoder: each has a decoder."""
PAST, PRESENT = "past_", "present_"
"""How the decoder's inputs and outputs of keys and values begin."""


class Runner(Protocol):
    """A loaded graph."""

    inputs: tuple[str, ...]

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Compute the named outputs, as arrays; keys and values may be anything that is taken back as input."""


class Rows(Protocol):
    """Token embeddings (vocabulary, H): an array, or what reads as one."""

    def __getitem__(self, ids: Array, /) -> Array:
        """Rows (n, H) of int64 (n,)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """What a decoder has read.

    Attributes:
        past: Keys and values, (B, K, P, D) each, by the names of the decoder's inputs.
        cross: Keys and values of images that cross-attention reads, the same for every sequence.
    """

    past: Mapping[str, Any]
    cross: Mapping[str, Array]


class GraphBackend:
    """Runs an encoder's graphs (:class:`topt_deploy.encoder.backend.Backend`).

    Args:
        networks: What runs each network, by its name.
        embedding: Token embeddings (vocabulary, H).
        past: Key heads and width of every past tensor that the decoder reads, by name.
        spec: The encoder's.
        chunk: Prefix tokens to read at once.
    """

    def __init__(
        self,
        networks: Mapping[str, Runner],
        *,
        embedding: Rows,
        past: Mapping[str, Sequence[int]],
        spec: EncoderSpec,
        chunk: int,
    ) -> None:
        self._networks, self._embedding, self._past, self._spec = networks, embedding, past, spec
        self.chunk = chunk

    def embed(self, ids: Array) -> Array:
        """Token embeddings, float32 (n, H), of int64 (n,)."""
        found: Array = self._embedding[ids].astype(np.float32)
        return found

    def vision(self, image: Mapping[str, Array]) -> Array:
        """One image's features, float32 (m, H)."""
        contiguous = {name: np.asarray(array, order="C") for name, array in image.items()}
        return self._networks[VISION].run(contiguous, ["features"])["features"]

    def start(self, features: Sequence[Array], batch: int) -> State:
        """The state before the first token."""
        past = {name: np.zeros((batch, heads, 0, width), np.float32) for name, (heads, width) in self._past.items()}
        cross: dict[str, Array] = {}
        if CROSS in self._networks:
            # Without images: states of zeros give keys and values of zeros, which add nothing.
            states = (
                np.concatenate(features) if features else np.zeros((self._spec.settings["patches"], self._spec.width))
            )
            names = [name for name in self._networks[DECODER].inputs if name.startswith("cross_")]
            cross = self._networks[CROSS].run({"states": states.astype(np.float32)}, names)
        return State(past=past, cross=cross)

    def decode(
        self, state: State, embeds: Array, positions: Array, visible: Array | None, begins: Array | None = None
    ) -> tuple[Array, State]:
        """Read S more tokens (:class:`topt_deploy.encoder.backend.Backend`)."""
        if begins is None:
            begins = np.zeros(embeds.shape[:2], np.int64)
        tokens = {"hidden": embeds, "positions": positions, "begins": begins}
        if visible is not None:
            tokens["visible"] = visible
        inputs = {**state.past, **state.cross, **{name: np.ascontiguousarray(array) for name, array in tokens.items()}}
        presents = {name: name.replace(PAST, PRESENT, 1) for name in state.past}
        found = self._networks[DECODER].run(inputs, ["last_hidden", *presents.values()])
        return found["last_hidden"], replace(state, past={name: found[now] for name, now in presents.items()})


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
