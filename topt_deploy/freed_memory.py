"""Have glibc give freed memory back at once, or keep it for what comes next. Other allocators need neither."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the settings."""
KEPT_BYTES = 1 << 30
"""Up to this size a block is kept for the next one."""
KEPT_BY_OLDER = 1 << 25
"""The most that older glibc takes."""


def give_back_from(block_bytes: int) -> None:
    """Give blocks of this size and larger ones back to the system as soon as they are free."""
    _mallopt()(M_MMAP_THRESHOLD, block_bytes)


def keep_freed_memory() -> None:
    """Keep freed blocks, until :func:`give_back_from` is called.

    By itself glibc would learn to, but not once a size has been set: a step of 400 of 1,000 regions then spent as long
    in getting its memory from the system as in computing.
    """
    if not _mallopt()(M_MMAP_THRESHOLD, KEPT_BYTES):
        _mallopt()(M_MMAP_THRESHOLD, KEPT_BY_OLDER)
    _mallopt()(M_TRIM_THRESHOLD, KEPT_BYTES)


@cache
def _mallopt() -> Callable[[int, int], Any]:
    """glibc's function; one that does nothing where there is another allocator."""
    return getattr(ctypes.CDLL(None), "mallopt", lambda setting, value: 1)
