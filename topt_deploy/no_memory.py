"""The end of a process whose native libraries find no memory, as one with the exit code for that.

Arrow and ONNX Runtime throw std::bad_alloc also where no exception may pass. Then C++ calls a handler, whose default
ends the process by SIGABRT, which says nothing of why. Whatever else gets there still ends like that. Rust's libraries
know no other way than SIGABRT: where one is at work that has no other reason for it, that is taken for the same.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from topt_deploy.errors import Exit, OutOfMemory

LIBRARY = "libstdc++.so.6"
NAMES = (b"St9bad_alloc", b"St20bad_array_new_length")
"""As the compiler writes std::bad_alloc, and what an array throws that is too large for it."""
_Handler, _SignalHandler = ctypes.CFUNCTYPE(None), ctypes.CFUNCTYPE(None, ctypes.c_int)
_installed: list[Any] = []
_tell: list[Callable[[OutOfMemory], object]] = []
_rust_at_work: list[bool] = []


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
        _leave()

    def abort(number: int) -> None:  # where this comes back, the process ends by the signal all the same
        if _rust_at_work:
            _leave()

    _installed.extend((_Handler(end), _SignalHandler(abort)))
    before.append(_Handler(install(_installed[0])))
    ctypes.CDLL(None)["signal"](signal.SIGABRT, _installed[1])


def _leave() -> NoReturn:
    try:
        with suppress(Exception):
            _tell[0](OutOfMemory())
    finally:
        os._exit(Exit.TRY_AGAIN)


@contextmanager
def rust_at_work() -> Iterator[None]:
    """While this is open, SIGABRT counts as want of memory, where :func:`end_without_memory` was called."""
    _rust_at_work.append(True)
    try:
        yield
    finally:
        _rust_at_work.pop()


def _name(kind: int | None) -> bytes | None:
    """The name in a std::type_info, which lies behind the pointer to its functions."""
    if not kind:
        return None
    return ctypes.cast(kind + ctypes.sizeof(ctypes.c_void_p), ctypes.POINTER(ctypes.c_char_p))[0]
