"""SHA-256 of files, and files that are read once for their hash and their content."""

import hashlib
import os
from functools import cached_property
from pathlib import Path

from .os_errors import check_kind, reading

HELD_BYTES = 8 << 20


class Held:
    """A file that is read once, where it is small: what is hashed and what is used are the same bytes.

    Args:
        path: The file.

    Attributes:
        data: Its bytes; None where there are more than :data:`HELD_BYTES` of them.

    Raises:
        NoInput, NoPermission, BadData, IOFailure: If it cannot be read as a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            check_kind(path)
            with path.open("rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                data = stream.readall() if size <= HELD_BYTES else None
                self.data = data if data is not None and len(data) <= HELD_BYTES else None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its bytes, in hexadecimal."""
        return sha256_file(self.path) if self.data is None else sha256_bytes(self.data)


def sha256_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of ``data``, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
