"""TensorRT-RTX for tests, where it is installed, and tiny graphs for it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.parser import parse_model

from topt_deploy.errors import NoDevice
from topt_deploy.tensorrt.library import RTX, Library, find_library

UNSUPPORTED = """g (float[regions, 3] x) => (float[regions, 3] y) {
    [dynamic] q, s, z = DynamicQuantizeLinear(x)
    y = DequantizeLinear(q, s, z)
}"""
"""A graph that checkers of the standard let pass, and that ONNX Runtime's own quantiser writes."""
HEADER = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'


def rtx() -> Library:
    """The library; skips the test, by the library's name, where it is not installed."""
    try:
        return find_library(RTX)
    except NoDevice as error:
        pytest.skip(f"no TensorRT-RTX: {error.found}")


def write_graph(path: Path, text: str) -> Path:
    """Write a graph in ONNX's text form; types are not inferred, for operators of others have none."""
    path.write_bytes(parse_model(f"{HEADER}\n{text}").SerializeToString())
    return path


def write_external(path: Path, text: str, **weights: np.ndarray) -> Path:
    """The same, with inputs that are weights in a file beside it."""
    proto = parse_model(f"{HEADER}\n{text}")
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    kept = [value for value in proto.graph.input if value.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    onnx.save_model(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path
