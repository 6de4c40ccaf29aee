"""Clusters' own chatter, kept from the user's terminal."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries, and processes that are started here, write to standard error below Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def only_this_thread() -> Iterator[None]:
    """Without what other threads of this process print: Ray's tells of lost workers, between our lines of JSON."""
    kept = sys.stdout
    sys.stdout = _OneThreads(kept)
    try:
        yield
    finally:
        sys.stdout = kept


class _OneThreads:
    """A stream that one thread writes to, and others seem to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._mine = stream, threading.get_ident()

    def write(self, text: str) -> int:
        """Write text, or pass it over."""
        return self._stream.write(text) if threading.get_ident() == self._mine else len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
