"""A GPU for machines without one: NVIDIA's driver as a library of our own in C, TensorRT as ONNX Runtime on its memory.

What these cannot show is that the real ones do as their documentation says. Imports no torch.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

SOURCE = Path(__file__).with_name("fake_cuda.c")


def fake_libcuda(folder: Path) -> Path:
    """The library, compiled into a folder; the test is skipped where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a driver with")
    library = folder / "libcuda.so.1"
    if not library.exists():
        subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, SOURCE], check=True)
    return library


_TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(bool)": "BOOL"}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BOOL": np.bool_}


class _Engine:
    def __init__(self, graph: Any, most: int) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors, self.most = len(self.tensors), most

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"TensorRT's engine has no {name}, as far as this stand-in knows")

    def _of(self, name: str) -> Any:
        (tensor,) = (tensor for tensor in self.tensors if tensor.name == name)
        return tensor

    def get_tensor_name(self, index: int) -> str:
        return str(self.tensors[index].name)

    def get_tensor_mode(self, name: str) -> Any:
        inputs = [tensor.name for tensor in self.session.get_inputs()]
        return FAKE_TRT.TensorIOMode.INPUT if name in inputs else FAKE_TRT.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_TYPES[self._of(name).type])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        shape = self._of(name).shape
        sizes = [0, 8, self.most]
        return [tuple(s if isinstance(s, int) else size for s in shape) for size in sizes]

    def create_execution_context(self) -> "_Context":
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self._found: dict[str, np.ndarray] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address, "TensorRT takes no null"
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        missing = [t.name for t in self.engine.session.get_inputs() if t.name not in self.shapes]
        if not missing:  # ONNX Runtime knows shapes when it has computed; on the memory as it is now
            inputs = {name: self._array(name, shape) for name, shape in self.shapes.items()}
            names = [t.name for t in self.engine.session.get_outputs()]
            self._found = dict(zip(names, self.engine.session.run(names, inputs), strict=True))
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._found[name].shape

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle
        for name, value in self._found.items():
            target = self._array(name, value.shape)
            target[...] = value
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = np.dtype(_NUMPY[self.engine.get_tensor_dtype(name).name])
        size = int(np.prod(shape)) * kind.itemsize
        block = (ctypes.c_byte * size).from_address(self.addresses[name])
        return np.frombuffer(block, kind).reshape(shape)


class _Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, engine: Any) -> _Engine | None:
        """An "engine" is an ONNX file's path, or ONNX itself."""
        data = bytes(engine)
        if data == b"of another GPU":
            self.logger.log(FAKE_TRT.ILogger.ERROR, "The engine was built for another device")
            return None
        return _Engine(data.removeprefix(b"path:").decode() if data.startswith(b"path:") else data, FAKE_TRT.most)


class _Logger:
    WARNING, ERROR = 2, 1


FAKE_TRT = SimpleNamespace(
    Runtime=_Runtime, ILogger=_Logger, TensorIOMode=SimpleNamespace(INPUT=1, OUTPUT=2), most=1 << 20
)
"""The part of TensorRT's Python package that runs an engine."""
