"""The end of a process whose C++ libraries find no memory, as one with the exit code for that.

Arrow and ONNX Runtime throw std::bad_alloc also where no exception may pass. Then C++ calls a handler, whose default
ends the process by SIGABRT, which says nothing of why. Whatever else gets there still ends like that.
"""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from topt_deploy.errors import Exit, OutOfMemory

LIBRARY = "libstdc++.so.6"
NAMES = (b"St9bad_alloc", b"St20bad_array_new_length")
"""As the compiler writes std::bad_alloc, and what an array throws that is too large for it."""
_Handler = ctypes.CFUNCTYPE(None)
_installed: list[Any] = []
_tell: list[Callable[[OutOfMemory], object]] = []


def end_without_memory(tell: Callable[[OutOfMemory], object]) -> None:
    """Have the process end with :attr:`Exit.TRY_AGAIN` where C++ would end it for want of memory.

    Where the C++ library is another one, as on macOS, nothing changes.

    Args:
        tell: Called with the error before that, in place of what an earlier call named.
    """
    _tell[:] = [tell]
    if _installed:
        return
    try:
        library = ctypes.CDLL(LIBRARY)
        install, thrown = library["_ZSt13set_terminatePFvvE"], library["__cxa_current_exception_type"]
    except (OSError, AttributeError):
        return
    install.restype = thrown.restype = ctypes.c_void_p
    install.argtypes = [_Handler]
    before: list[Any] = []

    def end() -> None:
        if _name(thrown()) not in NAMES:
            before[0]()
        try:
            with suppress(Exception):
                _tell[0](OutOfMemory())
        finally:
            os._exit(Exit.TRY_AGAIN)

    _installed.append(_Handler(end))
    before.append(_Handler(install(_installed[0])))


def _name(kind: int | None) -> bytes | None:
    """The name in a std::type_info, which lies behind the pointer to its functions."""
    if not kind:
        return None
    return ctypes.cast(kind + ctypes.sizeof(ctypes.c_void_p), ctypes.POINTER(ctypes.c_char_p))[0]
