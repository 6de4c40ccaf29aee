"""Networks of an encoder on ONNX Runtime with everything bound to a device: what one puts out, the next reads there.

The device may be the CPU: then this is the same by the same calls, and so what runs on a GPU is tested without one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from topt_deploy.errors import BadBundle

from .onnxruntime import PROVIDERS, check_used, no_device, providers, session_options

Array = np.ndarray[Any, Any]

MEMORY = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}
"""The memory of a device, in ONNX Runtime's words."""
_ARENA = {"cpu": "cpu:0", "cuda": "gpu:0"}
"""The same where it is asked to shrink one of its arenas."""
_TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
GLUE = Path(__file__).parent / "glue"
"""The small graphs between the networks, which scripts/glue_graphs.py makes: the runtime has no onnx to make them with.
They ship with the program, and so every bundle, whatever its schema, finds them."""


@dataclass(frozen=True, eq=False)
class OnDevice:
    """An array that stays where it is.

    Attributes:
        value: ONNX Runtime's handle of it.
        under: The numpy array whose memory it is, where that is the CPU's.
    """

    value: ort.OrtValue
    under: Array | None = None

    def __len__(self) -> int:
        """Size of the first axis."""
        return int(self.value.shape()[0])


class BoundSession:
    """A graph on a device (:class:`topt_deploy.prompts.graph_backend.Runner`).

    Args:
        graph: The file, beside its external data; checked.
        device: Of :data:`MEMORY`.
        threads: Threads within an operator; 0 leaves the choice to ONNX Runtime.
        exact: Of :func:`.onnxruntime.providers`.
        tensorrt: Likewise.

    Raises:
        BadBundle: If ONNX Runtime cannot load the graph.
        NoDevice: If it cannot on this device, or leaves a part to the CPU.
    """

    def __init__(
        self,
        graph: Path,
        *,
        device: str,
        threads: int = 0,
        exact: bool,
        tensorrt: Mapping[str, str] | None = None,
    ) -> None:
        self._source = graph
        self._memory = MEMORY[device]
        asked = providers(device, exact=exact, tensorrt=tensorrt)
        try:
            self._session = ort.InferenceSession(graph, session_options(device, threads), providers=asked)
        except Exception as error:  # ONNX Runtime raises half a dozen unrelated types here
            if device != "cpu":
                raise no_device(device, str(error).splitlines()[0]) from error
            raise BadBundle(f"ONNX Runtime cannot load the graph ({error})", file=self._source) from error
        check_used(self._session, device)
        self._kinds = {value.name: _TYPES[value.type] for value in self._session.get_inputs()}
        self._put_out = {value.name: _TYPES[value.type] for value in self._session.get_outputs()}
        self.inputs, self.outputs, self.provider = tuple(self._kinds), tuple(self._put_out), PROVIDERS[device]
        # Every pass has shapes of its own, and what one has left the next can seldom use: it is given back.
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("memory.enable_memory_arena_shrinkage", _ARENA[self._memory])

    def kind(self, name: str) -> str:
        """The name of the type of an input or an output, as numpy has it."""
        return (self._kinds.get(name) or self._put_out[name]).__name__

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, OnDevice]:
        """Compute the named outputs, which stay on the device.

        Args:
            inputs: Arrays, or what sessions on this device have put out.
            outputs: Names.

        Raises:
            BadBundle: If ONNX Runtime cannot; memory that cannot be had is one of the reasons.
        """
        held = {name: self._held(name, value) for name, value in inputs.items()}
        try:
            binding = self._session.io_binding()
            for name, value in held.items():
                binding.bind_ortvalue_input(name, value.value)
            for name in outputs:
                binding.bind_output(name, self._memory, 0)
            self._session.run_with_iobinding(binding, self._options)
            return {name: OnDevice(value) for name, value in zip(outputs, binding.get_outputs(), strict=True)}
        except Exception as error:
            raise BadBundle(
                f"ONNX Runtime cannot run the graph ({error})", file=self._source,
                fix="run topt-run selftest; where that passes, this input needs more memory than there is",
            ) from error  # fmt: skip

    def host(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Array]:
        """:meth:`run`, with outputs as arrays."""
        return {name: held.value.numpy() for name, held in self.run(inputs, outputs).items()}

    def _held(self, name: str, value: Any) -> OnDevice:
        if isinstance(value, OnDevice):
            return value
        array = np.ascontiguousarray(value, dtype=self._kinds[name])
        return OnDevice(ort.OrtValue.ortvalue_from_numpy(array, self._memory, 0), array)


class BoundConnector:
    """The steps between the networks, on the device (:class:`topt_deploy.prompts.graph_backend.Connector`).

    Args:
        decoder, vision: The networks.
        device, threads: Of the sessions.

    Raises:
        BadBundle: If a network reads or puts out numbers of a type that there are no steps for.
    """

    def __init__(self, decoder: BoundSession, vision: BoundSession | None, *, device: str, threads: int) -> None:
        def glue(*name: str) -> BoundSession:
            return BoundSession(GLUE / f"{'-'.join(name)}.onnx", device=device, threads=threads, exact=True)

        self._sums = glue("sums", decoder.kind("last_hidden"))
        if vision is not None:
            features = vision.kind("features")
            self._join, self._place = glue("join", features), glue("place", features, decoder.kind("hidden"))

    def join(self, features: Sequence[OnDevice]) -> OnDevice:
        """One behind the other."""
        return reduce(lambda a, b: self._join.run({"first": a, "second": b}, ["joined"])["joined"], features)

    def place(self, text: Array, features: OnDevice, places: Array) -> OnDevice:
        """Token embeddings with images among them."""
        image = places >= 0
        index = np.where(image, len(text) + places, np.cumsum(~image).reshape(places.shape) - 1)
        return self._place.run({"text": text, "features": features, "index": index}, ["embeds"])["embeds"]

    def sums(self, hidden: OnDevice, ranges: Array) -> Array:
        """Sums over ranges of tokens, which alone come back."""
        tokens = np.arange(hidden.value.shape()[1])
        select = (tokens >= ranges[..., :1]) & (tokens < ranges[..., 1:])  # (B, R, S)
        found: Array = self._sums.run({"select": select, "hidden": hidden}, ["sums"])["sums"].value.numpy()
        return found
