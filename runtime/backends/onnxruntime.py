"""The one place that knows ONNX Runtime: which provider runs a graph, and a session that really uses it."""

import ctypes
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from topt_deploy.errors import BadBundle, NoDevice, OutOfMemory, ToptError
from topt_deploy.storage.os_errors import writing
from topt_deploy.storage.scratch import scratch_folder

Array = np.ndarray[Any, Any]

WEIGHTS = "topt.weights"
"""The name that the graph gives its external data."""
CPU_PROVIDER, CUDA_PROVIDER, TENSORRT_PROVIDER = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
PROVIDERS = {"cpu": CPU_PROVIDER, "cuda": CUDA_PROVIDER, "tensorrt": TENSORRT_PROVIDER}
"""ONNX Runtime's execution provider, by the device."""
NO_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate memory", "out of memory", "Cannot allocate memory")
_ASKED = re.compile(r"requested buffer of size (\d+)")
SHAPE_OPERATORS = frozenset(
    {
        "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Gather", "Identity", "Max", "Min", "Mod", "Mul",
        "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Squeeze",
        "Sub", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Operators that compute sizes: ONNX Runtime leaves these few numbers to the CPU on purpose, on every device. All other
operators, and so everything that takes time, must be the device's."""
_RECORD = "session.record_ep_graph_assignment_info"


class Session:
    """A graph on a device. Thread-safe: ONNX Runtime's ``run`` is, and nothing here changes after construction.

    Args:
        graph: The serialised ONNX model, its hash already checked.
        weights: Its external data, likewise; kept alive, for the model works on this very buffer.
        initializers: Offset in bytes and shape of every float32 initialiser in ``weights``.
        source: The model's origin, for errors.
        device: ``cpu`` or ``cuda``.
        threads: Threads within an operator; 0 leaves the choice to ONNX Runtime.

    Raises:
        NoDevice: If the device's provider is not installed, or the session did not really get it.
        BadBundle: If ONNX Runtime cannot load the graph.
    """

    def __init__(
        self,
        graph: bytes,
        weights: bytes | memoryview,
        initializers: Mapping[str, tuple[int, Sequence[int]]],
        *,
        source: object = None,
        device: str = "cpu",
        threads: int = 0,
    ) -> None:
        check_device(device)
        self.provider = PROVIDERS[device]
        self._source = source
        options = session_options(device, threads)
        # The graph was optimised when it was exported; doing it again costs start-up time only.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if device == "cpu":
            # Planning which buffers may share memory takes four fifths of the session's start (0.14 of 0.18 s for
            # three tasks); values are freed after their last use all the same. Packed copies of the weights would
            # double them.
            options.enable_mem_reuse = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        values = dict(_values(weights, initializers, source))
        self._weights = [weights, values]  # the session works on this very buffer
        if device == "cpu":
            for name, value in values.items():
                options.add_initializer(name, value)
        else:
            # What add_initializer is given is used as it is, without a look at where it lies: in memory that the device
            # cannot read. These are copied to where they are needed.
            options.add_external_initializers(list(values), list(values.values()))
        try:
            # ONNX Runtime insists that the external file exists, and never reads it: an empty one in a folder of our
            # own proves that nothing but the checked buffer is used.
            with _empty_weights() as folder:
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
                self._session = ort.InferenceSession(graph, options, providers=providers(device, exact=True))
        except ToptError:
            raise
        except Exception as error:  # ONNX Runtime raises half a dozen unrelated types here
            if device != "cpu":
                raise no_device(device, str(error).splitlines()[0]) from error
            if out_of_memory(error):
                raise OutOfMemory(source) from error
            raise BadBundle(f"ONNX Runtime cannot load the graph ({error})", file=source) from error
        check_used(self._session, device)
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
        options = session_options("cpu", threads)
        # Weights behind DequantizeLinear, as the forms for GPUs have them, are multiplied in float32. By itself ONNX
        # Runtime would round what they are multiplied with to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self._source = graph
        try:
            self._session = ort.InferenceSession(graph, options, providers=[CPU_PROVIDER])
        except Exception as error:
            if out_of_memory(error):
                raise OutOfMemory(graph) from error
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
        if out_of_memory(error):
            raise OutOfMemory(source) from error
        raise BadBundle(
            f"ONNX Runtime cannot run the graph ({error})", file=source,
            fix="run topt-run selftest; where that passes, this city needs more memory than there is",
        ) from error  # fmt: skip


def out_of_memory(error: Exception) -> bool:
    """Tell if ONNX Runtime failed for lack of memory, which it says in words alone.

    A single tensor that is larger than the machine's memory is a fault of the graph: trying again would not help.
    """
    if asked := _ASKED.search(str(error)):
        return int(asked[1]) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


@contextmanager
def _empty_weights() -> Iterator[str]:
    """A private folder with an empty weights file."""
    with scratch_folder() as folder:
        file = folder / WEIGHTS
        with writing(file):
            file.touch(exist_ok=False)
        yield str(folder)
        file.unlink(missing_ok=True)


def _values(
    weights: bytes | memoryview, initializers: Mapping[str, tuple[int, Sequence[int]]], source: object
) -> Iterator[tuple[str, ort.OrtValue]]:
    """Every initialiser, as a view of the weights."""
    flat = np.frombuffer(weights, dtype=np.float32, count=len(weights) // 4)
    for name, (offset, shape) in initializers.items():
        start = offset // flat.itemsize
        try:
            array = flat[start : start + math.prod(shape)].reshape(shape)
        except (ValueError, TypeError) as error:
            raise BadBundle(f"the manifest misplaces {name} in the weights ({error})", file=source) from error
        yield name, ort.OrtValue.ortvalue_from_numpy(array)


def session_options(device: str, threads: int) -> ort.SessionOptions:
    """Options of a session that says nothing, and that can be asked where its nodes run.

    Args:
        device: One of :data:`PROVIDERS`.
        threads: Threads within an operator; 0 leaves the choice to ONNX Runtime.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if device != "cpu":
        options.add_session_config_entry(_RECORD, "1")
        # Weights are there for as long as the session is: outside of the arena, which grows and shrinks.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.enable_mem_pattern = False  # plans memory for shapes that come again, and here none does
    return options


def providers(
    device: str, *, exact: bool, tensorrt: Mapping[str, str] | None = None
) -> list[tuple[str, dict[str, str]]]:
    """ONNX Runtime's providers for a device, with their options.

    Args:
        device: One of :data:`PROVIDERS`.
        exact: True if float32 is computed as such, and not in TF32, whose significand has 10 bits.
        tensorrt: Options of the TensorRT provider, where that is the device.
    """
    if device == "cpu":
        return [(CPU_PROVIDER, {})]
    cuda = {
        "use_tf32": "0" if exact else "1",
        # Searching all algorithms of a convolution takes seconds for the one that models here have.
        "cudnn_conv_algo_search": "HEURISTIC",
        # A decoder's keys and values grow from pass to pass: powers of two would take twice what is needed.
        "arena_extend_strategy": "kSameAsRequested",
    }
    own = [(TENSORRT_PROVIDER, dict(tensorrt or {}))] if device == "tensorrt" else []
    return [*own, (CUDA_PROVIDER, cuda)]


def check_device(device: str) -> None:
    """Refuse a device that this ONNX Runtime cannot use here: its build, the libraries it needs, driver and GPU.

    Raises:
        NoDevice: Naming what is missing.
    """
    available = ort.get_available_providers()
    if PROVIDERS[device] not in available:
        raise no_device(device, f"ONNX Runtime {ort.__version__} with {', '.join(available)}")
    if device == "cpu":
        return
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        raise no_device(device, f"ONNX Runtime {ort.__version__}, which does not tell where nodes run; 1.24 does")
    from topt_deploy.tensorrt.cuda_driver import driver

    driver()
    with _quiet():
        ort.preload_dlls()  # CUDA and cuDNN of pip's packages, where they are installed
    for needed in ("cuda", "tensorrt") if device == "tensorrt" else ("cuda",):
        # ONNX Runtime says on standard error alone why a provider does not load, and goes on without it.
        library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{needed}.so"
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            raise no_device(device, f"ONNX Runtime {ort.__version__} lacks a library: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Have what is printed go nowhere: preload_dlls tells of every library that it does not find."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def check_used(session: ort.InferenceSession, device: str) -> None:
    """Refuse a session that does not compute on the device that was asked for, in whole or in part.

    ``session.disable_cpu_ep_fallback`` would refuse every graph that looks at a size.

    Raises:
        NoDevice: Naming the operators that the CPU would run.
    """
    found = session.get_providers()
    if found[0] != PROVIDERS[device]:
        raise no_device(device, f"a session on {', '.join(found)}")
    if device == "cpu":
        return
    on_cpu: set[str] = set()
    own = 0
    for part in session.get_provider_graph_assignment_info():
        operators = {node.op_type for node in part.get_nodes()}
        if part.ep_name == CPU_PROVIDER:
            on_cpu |= operators - SHAPE_OPERATORS
        own += part.ep_name == PROVIDERS[device]
    if on_cpu or not own:
        raise no_device(device, f"left to the CPU: {', '.join(sorted(on_cpu)) or 'everything'}")


_FIXES = {
    "cuda": "pip install 'topt-deploy[gpu]' on a machine with an NVIDIA driver (and 'onnxruntime-gpu[cuda,cudnn]' where"
    " CUDA 13 and cuDNN 9 are not installed), or use --device cpu",
    "tensorrt": "pip install 'topt-deploy[trt]' or 'topt-deploy[rtx]' on a machine with an NVIDIA driver, or use"
    " --device cuda or cpu",
}


def no_device(device: str, found: str) -> NoDevice:
    """The error of a device that cannot be used."""
    return NoDevice(
        f"device {device!r} was requested and cannot be used",
        expected=PROVIDERS[device],
        found=found,
        fix=_FIXES.get(device, "reinstall onnxruntime"),
    )
