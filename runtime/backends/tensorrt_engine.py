"""Engines of TensorRT and TensorRT-RTX, run by their own Python package on memory of the driver's.

Written after NVIDIA's documentation and tested with a stand-in (tests/support/fake_gpu.py).
docs/reference/status.md says what has run on a GPU. Memory and copies go through libcuda itself
(:mod:`topt_deploy.tensorrt.cuda_driver`), which is there wherever a GPU can be used; cuda-python and libcudart
would be one more package each, whose version has to match.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topt_deploy.errors import BadBundle, BadData, NoDevice
from topt_deploy.prompts.graph_backend import HostConnector
from topt_deploy.tensorrt.build import MESSAGES_SHOWN, keeping_logger
from topt_deploy.tensorrt.cuda_driver import Driver, Memory
from topt_deploy.tensorrt.library import Library

Array = np.ndarray[Any, Any]

_NUMPY = {
    "FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "INT8": np.int8, "UINT8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class OnGpu:
    """An array in a GPU's memory."""

    memory: Memory
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        """Size of the first axis."""
        return self.shape[0]

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def empty(driver: Driver, shape: Sequence[int], dtype: np.dtype[Any]) -> OnGpu:
    """An array on the GPU, of whatever was there."""
    shape = tuple(int(size) for size in shape)
    return OnGpu(driver.allocate(int(np.prod(shape)) * dtype.itemsize), shape, dtype)


def upload(driver: Driver, array: Array) -> OnGpu:
    """A copy on the GPU; the array must be kept as it is until the driver's work is over."""
    found = empty(driver, array.shape, array.dtype)
    driver.upload(found.memory.address, array.ctypes.data, found.size)
    return found


def download(driver: Driver, array: OnGpu) -> Array:
    """A copy on the host."""
    found = np.empty(array.shape, array.dtype)
    driver.download(found.ctypes.data, array.memory.address, array.size)
    driver.wait()
    return found


class Engine:
    """An engine on the GPU (:class:`topt_deploy.prompts.graph_backend.Runner`). Threads take turns.

    Args:
        library: The library that runs it.
        engine: The serialised engine, checked: what deserialises it trusts every byte.
        driver: The GPU's.
        source: Its origin, for errors.

    Raises:
        NoDevice: If the library does not take it for this GPU, with the library's reason.
        BadBundle: If it puts out what numpy has no type for.
    """

    def __init__(self, library: Library, engine: Any, driver: Driver, *, source: object = None) -> None:
        trt = library.module
        self._driver, self._source, self._lock = driver, source, threading.Lock()
        self.provider = f"{library.title} on {driver.gpu}"
        messages: list[tuple[int, str]] = []
        _ = driver.stream  # makes the context that the library is to use
        self._logger = keeping_logger(trt, messages)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        self._context: Any = None if self._engine is None else self._engine.create_execution_context()
        if self._context is None:
            raise NoDevice(
                f"{library.title} does not run this engine here",
                file=source,
                expected=f"an engine for {driver.gpu}, and memory for it",
                found="; ".join(text for _, text in messages[-MESSAGES_SHOWN:]) or "no reason given",
                fix="delete it, so that it is built again (topt-run cache --clear), or export for this GPU",
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        self.types = {name: self._type(name) for name in names}

    def _type(self, name: str) -> np.dtype[Any]:
        found = str(self._engine.get_tensor_dtype(name).name)
        if found not in _NUMPY:
            raise BadBundle(f"the engine's {name} is of a type that is not supported", file=self._source, found=found)
        return np.dtype(_NUMPY[found])

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, OnGpu]:
        """Compute; the named outputs stay on the GPU.

        Args:
            inputs: Arrays, or what engines have put out.
            outputs: Names.

        Raises:
            BadData: If an input is of a size that the engine was not made for.
            NoDevice: If the GPU has no memory left, or fails.
        """
        with self._lock:
            kept: list[Any] = []  # what is copied from must stay until the work is over
            for name in self.inputs:
                value = inputs[name]
                self._check(name, tuple(value.shape))
                if not isinstance(value, OnGpu):
                    kept.append(np.ascontiguousarray(value, self.types[name]))
                    value = upload(self._driver, kept[-1])
                kept.append(value)
                self._took(self._context.set_input_shape(name, value.shape), name)
                self._took(self._context.set_tensor_address(name, value.memory.address), name)
            if missing := self._context.infer_shapes():
                raise self._failed(f"no shape for {', '.join(missing)}")
            found = {
                name: empty(self._driver, tuple(self._context.get_tensor_shape(name)), self.types[name])
                for name in self.outputs
            }
            for name, value in found.items():
                self._took(self._context.set_tensor_address(name, value.memory.address), name)
            if not self._context.execute_async_v3(self._driver.stream):
                raise self._failed("the engine did not run")
            self._driver.wait()
            return {name: found[name] for name in outputs}

    def host(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """:meth:`run`, with outputs as arrays."""
        return {name: download(self._driver, value) for name, value in self.run(inputs, outputs).items()}

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        least, _, most = (tuple(sizes) for sizes in self._engine.get_tensor_profile_shape(name, 0))
        if len(shape) != len(least) or not all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True)):
            raise BadData(
                f"the engine was not made for {name} of this size", file=self._source,
                expected=f"{list(least)} to {list(most)}", found=list(shape),
                fix="export with a wider --profile, or use --device cuda or cpu",
            )  # fmt: skip

    def _took(self, done: bool, name: str) -> None:
        if not done:
            raise self._failed(f"{name} was not taken")

    def _failed(self, how: str) -> NoDevice:
        return NoDevice("TensorRT failed on the GPU", file=self._source, found=how, fix="report it with the log")


class EngineConnector:
    """The steps between engines (:class:`topt_deploy.prompts.graph_backend.Connector`): copies on the GPU.

    Hidden states alone come back, to be added up in float64: a few MB a pass, where an engine that multiplies on the
    GPU would have to be built and kept for every width.

    Args:
        driver: The GPU's.
        decoder, vision: The networks.

    Raises:
        BadBundle: If one's features are not of the type that the other reads.
    """

    def __init__(self, driver: Driver, decoder: Engine, vision: Engine | None) -> None:
        self._driver, self._type = driver, decoder.types["hidden"]
        if vision is not None and "cross" not in decoder.types and vision.types["features"] != self._type:
            raise BadBundle(
                "the vision network's features are of another type than the decoder's embeddings",
                expected=self._type, found=vision.types["features"], fix="export again",
            )  # fmt: skip

    def join(self, features: Sequence[OnGpu]) -> OnGpu:
        """One behind the other."""
        whole = empty(self._driver, (sum(map(len, features)), *features[0].shape[1:]), features[0].dtype)
        at = whole.memory.address
        for part in features:
            self._driver.copy(at, part.memory.address, part.size)
            at += part.size
        return whole

    def place(self, text: Array, features: OnGpu, places: Array) -> OnGpu:
        """Token embeddings with images among them: text from the host, and the features' rows in runs."""
        image = places >= 0
        embeds = np.zeros((*places.shape, text.shape[-1]), self._type)
        embeds[~image] = text
        found = upload(self._driver, embeds)
        row = text.shape[-1] * self._type.itemsize
        flat = places.reshape(-1)
        goes_on = (flat[1:] == flat[:-1] + 1) & (flat[:-1] >= 0)
        begins = np.flatnonzero((flat >= 0) & ~np.concatenate([[False], goes_on]))
        ends = np.flatnonzero((flat >= 0) & ~np.concatenate([goes_on, [False]])) + 1
        for start, stop in zip(begins.tolist(), ends.tolist(), strict=True):
            target, source = found.memory.address + start * row, features.memory.address + int(flat[start]) * row
            self._driver.copy(target, source, (stop - start) * row)
        self._driver.wait()
        return found

    def sums(self, hidden: OnGpu, ranges: Array) -> Array:
        """Sums over ranges of tokens."""
        return HostConnector().sums(download(self._driver, hidden), ranges)
