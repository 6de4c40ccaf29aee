"""SHA-256 of files, and files that are read once for their hash and their content."""

import hashlib
import os
from functools import cached_property
from pathlib import Path

from .os_errors import check_kind, reading
from .table_parts import table_files

HELD_BYTES = 8 << 20


class Held:
    """A table's file that is read once, where it is small: what is hashed and what is used are the same bytes.

    Args:
        path: The file, or the folder of a table in parts.

    Attributes:
        data: Its bytes; None where there are more than :data:`HELD_BYTES` of them, or several files.
        parts: The files of a table in parts, each held for itself; empty for a file.

    Raises:
        NoInput, NoPermission, BadData, IOFailure: If it cannot be read as a table's file or files.
    """

    def __init__(self, path: Path, limit: int = HELD_BYTES) -> None:
        self.path = path
        self.data: bytes | None = None
        self.parts: tuple[Held, ...] = ()
        if os.path.isdir(path):
            for part in table_files(path):
                self.parts += (Held(part, limit),)
                limit -= len(self.parts[-1].data or b"")
            return
        with reading(path):
            check_kind(path)
            with path.open("rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                data = stream.readall() if size <= limit else None
                self.data = data if data is not None and len(data) <= limit else None

    def release(self) -> None:
        """Let go of the bytes, whose hash is known from then on. Who reads the table once more reads the file."""
        for part in self.parts:
            part.release()
        _ = self.sha256  # worked out now, while the bytes are here; it is kept
        self.data = None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its bytes, in hexadecimal; of parts, that of their hashes' text, one after the other."""
        if self.parts:
            return sha256_bytes("".join(part.sha256 for part in self.parts).encode())
        return sha256_file(self.path) if self.data is None else sha256_bytes(self.data)


def stamps(table: Path) -> tuple[tuple[int, ...], ...]:
    """Facts of a table's files that change when someone writes to them."""
    return tuple(_stamp(file) for file in table_files(table))


def _stamp(file: Path) -> tuple[int, ...]:
    with reading(file):
        facts = os.stat(file)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def sha256_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of ``data``, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
