"""NVIDIA's driver, asked through its own library: which GPU there is, and memory on it.

libcuda belongs to the driver, so it is wherever a GPU can be used, in one version whose functions keep their names and
arguments. So nothing has to be installed, no package has to match the CUDA that something else brought along, and
asking costs no import: ctypes alone.
"""

import ctypes
import weakref
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from topt_deploy.errors import NoDevice

LIBRARY = "libcuda.so.1"
KERNEL_MODULE = Path("/sys/module/nvidia/version")
_MAJOR, _MINOR = 75, 76
"""CUDA's numbers of the two halves of the compute capability."""
_NAME_BYTES = 256
_RELEASE_THRESHOLD = 4
"""CUDA's number of a memory pool's setting: how many bytes it keeps."""
_FIX = "use --device cpu, or a machine with an NVIDIA GPU and its driver"
_EXPLAINED = {
    2: "its memory is full",
    3: "CUDA was in use before this process was forked from another one",
    34: "the library is a stub that was built to link against, not the driver's",
    100: "no GPU can be seen: CUDA_VISIBLE_DEVICES may hide it, or the container was started without it (--gpus all)",
    802: "the GPUs of this machine are not ready yet (Fabric Manager)",
    803: "library and kernel module are of different driver versions: restart after an update",
    804: "the container's CUDA is newer than this GPU's driver can be used with",
    999: "the driver cannot be reached: is its kernel module loaded (nvidia-smi)?",
}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first GPU that this process may use.

    Attributes:
        name: Its product name.
        capability: Its compute capability, as 9.0.
        memory: Bytes in all.
        cuda: The newest CUDA that the driver runs, as 13.0.
        driver: The driver's version, as 580.95.05; "" where the system does not tell.
    """

    name: str
    capability: str
    memory: int
    cuda: str
    driver: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability}, CUDA {self.cuda})"


class Driver:
    """NVIDIA's driver, with its first GPU made this thread's.

    Args:
        library: Its library, found as the system finds libraries.

    Raises:
        NoDevice: If there is no driver or no GPU, saying why.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise NoDevice("no NVIDIA driver", expected=library, found=str(error), fix=_FIX) from error
        self._call("cuInit", c_uint(0))
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        if not count.value:
            raise NoDevice("no NVIDIA GPU", expected="one that CUDA sees", found=_EXPLAINED[100], fix=_FIX)
        device = c_int()
        self._call("cuDeviceGet", byref(device), c_int(0))
        self._device = device
        self._context: c_void_p | None = None
        self._stream: c_void_p | None = None
        self.gpu = self._describe()

    def _describe(self) -> Gpu:
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", name, c_int(_NAME_BYTES), self._device)
        major, minor, version, memory = c_int(), c_int(), c_int(), c_size_t()
        self._call("cuDeviceGetAttribute", byref(major), c_int(_MAJOR), self._device)
        self._call("cuDeviceGetAttribute", byref(minor), c_int(_MINOR), self._device)
        self._call("cuDriverGetVersion", byref(version))
        self._call("cuDeviceTotalMem_v2", byref(memory), self._device)
        return Gpu(
            name=name.value.decode(errors="replace"),
            capability=f"{major.value}.{minor.value}",
            memory=memory.value,
            cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
            driver=KERNEL_MODULE.read_text().strip() if KERNEL_MODULE.exists() else "",
        )

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._cuda, function)(*arguments)
        if code:
            raise NoDevice(f"NVIDIA's driver refuses {function}", expected="success", found=self._error(code), fix=_FIX)

    def _error(self, code: int) -> str:
        name = c_char_p()
        self._cuda.cuGetErrorName(c_int(code), byref(name))
        known = f"{(name.value or b'unknown').decode()} ({code})"
        return f"{known}: {_EXPLAINED[code]}" if code in _EXPLAINED else known

    @property
    def stream(self) -> int:
        """The one stream of work that everything here is put on, and so done in order; made on first use.

        Also makes this thread use the GPU, in the context that CUDA's other libraries share.

        Raises:
            NoDevice: If the driver refuses.
        """
        if self._context is None:
            context, stream, pool = c_void_p(), c_void_p(), c_void_p()
            self._call("cuDevicePrimaryCtxRetain", byref(context), self._device)
            self._call("cuCtxSetCurrent", context)
            self._call("cuStreamCreate", byref(stream), c_uint(0))
            # What is freed stays with this process for the next pass: asking the system takes as long as a small one.
            self._call("cuDeviceGetDefaultMemPool", byref(pool), self._device)
            self._call("cuMemPoolSetAttribute", pool, c_int(_RELEASE_THRESHOLD), byref(c_uint64(2**64 - 1)))
            self._context, self._stream = context, stream
        self._call("cuCtxSetCurrent", self._context)
        assert self._stream is not None
        return self._stream.value or 0

    def allocate(self, size: int) -> "Memory":
        """Memory of the GPU, given back when nothing refers to it any more.

        Args:
            size: In bytes.

        Raises:
            NoDevice: If there is not that much left.
        """
        address, stream = c_uint64(), c_void_p(self.stream)
        self._call("cuMemAllocAsync", byref(address), c_size_t(max(size, 1)), stream)  # CUDA gives none of size 0
        return Memory(address.value, size, lambda: self._cuda.cuMemFreeAsync(address, stream))

    def upload(self, target: int, source: int, size: int) -> None:
        """Copy bytes from an address of this process, where they must stay until :meth:`wait` is over, to the GPU."""
        if size:
            stream = c_void_p(self.stream)
            self._call("cuMemcpyHtoDAsync_v2", c_uint64(target), c_void_p(source), c_size_t(size), stream)

    def download(self, target: int, source: int, size: int) -> None:
        """Copy bytes from an address of the GPU to one of this process, where they are once :meth:`wait` is over."""
        if size:
            stream = c_void_p(self.stream)
            self._call("cuMemcpyDtoHAsync_v2", c_void_p(target), c_uint64(source), c_size_t(size), stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes from one address of the GPU to another."""
        if size:
            stream = c_void_p(self.stream)
            self._call("cuMemcpyDtoDAsync_v2", c_uint64(target), c_uint64(source), c_size_t(size), stream)

    def wait(self) -> None:
        """Wait until everything is done."""
        self._call("cuStreamSynchronize", c_void_p(self.stream))


class Memory:
    """A block of a GPU's memory.

    Args:
        address, size: Where it is, and of how many bytes.
        free: Gives it back; called once.
    """

    def __init__(self, address: int, size: int, free: Callable[[], Any]) -> None:
        self.address, self.size = address, size
        weakref.finalize(self, free).atexit = False  # the driver takes everything back by itself then


@cache
def driver() -> Driver:
    """The driver of this machine.

    Raises:
        NoDevice: If there is no driver or no GPU, saying why.
    """
    return Driver()
