"""The end of a process whose native libraries find no memory, as one with the exit code for that.

Arrow and ONNX Runtime throw std::bad_alloc also where no exception may pass. Then C++ calls a handler, whose default
ends the process by SIGABRT, which says nothing of why. Whatever else gets there still ends like that.

ONNX Runtime, here and there, and the regular expressions of tokenizers go on with the null pointer that malloc gave
them. What is left of the cause is the thread's errno, which is malloc's ENOMEM until another call of the system fails:
by this such an end is told from any other. Rust's libraries know no other way than SIGABRT, and print a good deal
before, which changes errno: where one is at work that has no other reason for it, that is taken for the same.
"""

import ctypes
import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from topt_deploy.errors import Exit, OutOfMemory

LIBRARY = "libstdc++.so.6"
NAMES = (b"St9bad_alloc", b"St20bad_array_new_length")
"""As the compiler writes std::bad_alloc, and what an array throws that is too large for it."""
SIGNALS = (signal.SIGABRT, signal.SIGSEGV)
"""By which libraries end a process that has no memory."""
_Handler = ctypes.CFUNCTYPE(None)
_SignalHandler = ctypes.CFUNCTYPE(None, ctypes.c_int, use_errno=True)
_installed: list[Any] = []
_tell: list[Callable[[OutOfMemory], object]] = []
_rust_at_work: list[bool] = []


def end_without_memory(tell: Callable[[OutOfMemory], object]) -> None:
    """Have the process end with :attr:`Exit.TRY_AGAIN` where a library would end it for want of memory.

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

    _installed.append(_Handler(end))
    before.append(_Handler(install(_installed[0])))
    _handle_signals()


def _handle_signals() -> None:
    """Take :data:`SIGNALS` for want of memory where that was the last error of the thread that gets them."""
    c = ctypes.CDLL(None)
    handle, send = c["signal"], c["raise"]
    handle.restype, handle.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before: dict[int, int | None] = {}

    def end(number: int) -> None:
        if ctypes.get_errno() == errno.ENOMEM or (number == signal.SIGABRT and _rust_at_work):
            _leave()
        handle(number, before[number])
        send(number)  # held back until this is over

    _installed.append(_SignalHandler(end))
    for number in SIGNALS:
        before[number] = handle(number, ctypes.cast(_installed[-1], ctypes.c_void_p))


@contextmanager
def rust_at_work() -> Iterator[None]:
    """While this is open, SIGABRT counts as want of memory, where :func:`end_without_memory` was called."""
    _rust_at_work.append(True)
    try:
        yield
    finally:
        _rust_at_work.pop()


def _leave() -> NoReturn:
    try:
        with suppress(Exception):
            _tell[0](OutOfMemory())
    finally:
        os._exit(Exit.TRY_AGAIN)


def _name(kind: int | None) -> bytes | None:
    """The name in a std::type_info, which lies behind the pointer to its functions."""
    if not kind:
        return None
    return ctypes.cast(kind + ctypes.sizeof(ctypes.c_void_p), ctypes.POINTER(ctypes.c_char_p))[0]
