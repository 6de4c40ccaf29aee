"""The one place that knows ONNX Runtime: which provider runs a graph, and a session that really uses it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from topt_deploy.errors import BadBundle, NoDevice, ToptError
from topt_deploy.fileio import scratch_folder, writing

Array = np.ndarray[Any, Any]

WEIGHTS = "topt.weights"
"""The name that the graph gives its external data."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Session:
    """A graph on a device. Thread-safe: ONNX Runtime's ``run`` is, and nothing here changes after construction.

    Args:
        graph: The serialised ONNX model, its hash already checked.
        weights: Its external data, likewise; kept alive, for the model works on this very buffer.
        initializers: Offset in bytes and shape of every float32 initialiser in ``weights``.
        source: What errors say the model is from.
        device: ``cpu`` or ``cuda``.
        threads: Threads within an operator; 0 leaves the choice to ONNX Runtime.

    Raises:
        NoDevice: If the device's provider is not installed, or the session did not really get it.
        BadBundle: If ONNX Runtime cannot load the graph.
    """

    def __init__(
        self,
        graph: bytes,
        weights: bytes,
        initializers: Mapping[str, tuple[int, Sequence[int]]],
        *,
        source: object = None,
        device: str = "cpu",
        threads: int = 0,
    ) -> None:
        check_device(device)
        self.provider = PROVIDERS[device]
        self._source = source
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        # The graph was optimised when it was exported; doing it again costs start-up time only.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Planning which buffers may share memory takes four fifths of the session's start (0.14 of 0.18 s for three
        # tasks); values are freed after their last use all the same. Packed copies of the weights would double them.
        options.enable_mem_reuse = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        flat = np.frombuffer(weights, dtype=np.float32, count=len(weights) // 4)
        self._weights = []
        for name, (offset, shape) in initializers.items():
            start = offset // flat.itemsize
            try:
                array = flat[start : start + math.prod(shape)].reshape(shape)
            except (ValueError, TypeError) as error:
                raise BadBundle(f"the manifest misplaces {name} in the weights ({error})", file=source) from error
            value = ort.OrtValue.ortvalue_from_numpy(array)
            options.add_initializer(name, value)
            self._weights.append((flat, value))
        try:
            # ONNX Runtime insists that the external file exists, and never reads it: an empty one in a folder of our
            # own proves that nothing but the checked buffer is used.
            with _empty_weights() as folder:
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
                self._session = ort.InferenceSession(graph, options, providers=[self.provider])
        except ToptError:
            raise
        except Exception as error:  # ONNX Runtime raises half a dozen unrelated types here
            if device != "cpu":
                raise _no_device(device, str(error).splitlines()[0]) from error
            raise BadBundle(f"ONNX Runtime cannot load the graph ({error})", file=source) from error
        if self._session.get_providers()[0] != self.provider:
            raise _no_device(device, f"a session on {self._session.get_providers()}")
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Compute the named outputs.

        Raises:
            BadBundle: If ONNX Runtime cannot.
        """
        return _run(self._session, inputs, outputs, self._source)


class MappedSession:
    """A large graph on the CPU, its weights mapped from their file: worth optimising and packing for this processor.

    Args:
        graph: The file, beside its external data; both checked.
        threads: Threads within an operator; 0 leaves the choice to ONNX Runtime.

    Raises:
        BadBundle: If ONNX Runtime cannot load the graph.
    """

    def __init__(self, graph: Path, *, threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        self._source = graph
        try:
            self._session = ort.InferenceSession(graph, options, providers=[PROVIDERS["cpu"]])
        except Exception as error:
            raise BadBundle(f"ONNX Runtime cannot load the graph ({error})", file=graph) from error
        self.inputs = tuple(value.name for value in self._session.get_inputs())

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Compute the named outputs.

        Raises:
            BadBundle: If ONNX Runtime cannot.
        """
        return _run(self._session, inputs, outputs, self._source)


def _run(
    session: ort.InferenceSession, inputs: Mapping[str, Array], outputs: Sequence[str], source: object
) -> dict[str, Array]:
    try:
        return dict(zip(outputs, session.run(list(outputs), dict(inputs)), strict=True))
    except Exception as error:  # as above; memory that cannot be had is one of them
        raise BadBundle(
            f"ONNX Runtime cannot run the graph ({error})", file=source,
            fix="run topt-run selftest; where that passes, this city needs more memory than there is",
        ) from error  # fmt: skip


@contextmanager
def _empty_weights() -> Iterator[str]:
    """A private folder with an empty weights file."""
    with scratch_folder() as folder:
        file = folder / WEIGHTS
        with writing(file):
            file.touch(exist_ok=False)
        yield str(folder)


def check_device(device: str) -> None:
    """Refuse a device whose provider this ONNX Runtime does not have.

    Raises:
        NoDevice: Naming what it has.
    """
    if PROVIDERS[device] not in ort.get_available_providers():
        raise _no_device(device, f"ONNX Runtime {ort.__version__} with {', '.join(ort.get_available_providers())}")


def _no_device(device: str, found: str) -> NoDevice:
    return NoDevice(
        f"device {device!r} was requested and cannot be used",
        expected=PROVIDERS[device],
        found=found,
        fix="pip install 'topt-deploy[gpu]' on a machine with an NVIDIA driver, or use --device cpu",
    )
