"""An ONNX graph in the making, whose large weights go to a file as they come."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import set_external_data

from topt_deploy.storage.hashed_file import sha256_bytes

Array = np.ndarray[Any, Any]
Place = tuple[int, tuple[int, ...], str]

EXTERNAL_FROM_BYTES = 1024
ALIGNMENT = 64
MICROSOFT = "com.microsoft"
INT4, UINT4 = FOUR_BITS = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)


class Weights:
    """A file of weights, written front to back, that graphs name as their external data.

    Args:
        path: The file, in the folder of the graphs.

    Attributes:
        places: Offset in bytes, shape and numpy type of every weight, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, Place] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Weights":
        self._file = self.path.open("xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, name: str, value: Array) -> None:
        """Store a weight; of :data:`FOUR_BITS`, two numbers to a byte."""
        assert self._file is not None
        self.places[name] = (self._file.tell(), value.shape, value.dtype.name)
        if value.dtype in FOUR_BITS:
            value = _two_to_a_byte(value)
        self._file.write(np.ascontiguousarray(value).data)
        self._file.write(b"\0" * (-value.nbytes % ALIGNMENT))

    def tensor(self, name: str, bytes_as: tuple[int, ...] | None = None) -> onnx.TensorProto:
        """A stored weight, as a graph declares it: as what it is, or its bytes in a shape of their own."""
        offset, shape, dtype = self.places[name]
        kind, count = np.dtype(dtype), int(np.prod(shape))
        length = (count + 1) // 2 if kind in FOUR_BITS else count * kind.itemsize
        if bytes_as is not None:
            shape, kind = bytes_as, np.dtype(np.uint8)
        tensor = onnx.TensorProto(name=name, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(kind), raw_data=b"")
        set_external_data(tensor, self.path.name, offset=offset, length=length)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        return tensor


class Builder:
    """Collects nodes.

    Args:
        weights: Where large weights go; several graphs may share them.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.quantised: dict[str, tuple[str, str]] = {}
        """Codes and scale of activations that have been quantised, by name; shared by all maps that read them."""
        self.ranks: dict[str, int] = {}
        """Of what layers give, by name: a graph has to say it of its outputs."""
        self.far: dict[str, str] = {}
        """The value added to scores where a mask forbids attention, by the mask's name."""
        self.halves: dict[str, str] = {}
        """Values in half precision, by the names of what they are in float32."""
        self._count = 0

    def node(self, kind: str, inputs: Sequence[str], *, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Add a node; the name of its first output, the others' being that with /1, /2 behind."""
        self._count += 1
        first = f"{kind}_{self._count}"
        names = [first, *(f"{first}/{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=first, domain=domain, **attributes))
        return first

    def constant(self, value: Any) -> str:
        """A constant, the same one for the same value of the same numpy type."""
        value = np.asarray(value)
        digest = sha256_bytes(f"{value.dtype.str}{value.shape}".encode() + value.tobytes())
        return self.weight(f"constant/{digest[:16]}", lambda: value)

    def weight(self, name: str, make: Callable[[], Array], *, bytes_as: tuple[int, ...] | None = None) -> str:
        """A weight, in the file where it is large; its name. One that is used twice is made and stored once.

        Args:
            name: Its name.
            make: Makes it.
            bytes_as: The shape in which this graph declares the bytes of a weight of :data:`UINT4`, where its operators
                take them packed. Another graph may declare the same bytes as the numbers that they are.
        """
        if name in self.initializers:
            return name
        if name not in self.weights.places:
            value = make()
            if value.nbytes < EXTERNAL_FROM_BYTES:
                if bytes_as is not None:
                    value = _two_to_a_byte(value).reshape(bytes_as)
                self.initializers[name] = numpy_helper.from_array(value, name)
                return name
            self.weights.add(name, value)
        self.initializers[name] = self.weights.tensor(name, bytes_as)
        return name


def _two_to_a_byte(value: Array) -> Array:
    """Numbers of 4 bits in bytes, the first of each pair in the lower half, as ONNX and MatMulNBits have them."""
    flat = value.reshape(-1).view(np.uint8) & 15
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    pairs: Array = flat[0::2] | (flat[1::2] << 4)
    return pairs
