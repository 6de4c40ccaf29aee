"""The files of a bundle's folder, or of its zip, read without trusting their names and sizes."""

import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from topt_deploy.errors import BadBundle, BadData
from topt_deploy.storage.os_errors import reading

if TYPE_CHECKING:
    import zipfile


TOTAL_LIMIT_BYTES = 64 << 30
FILE_COUNT_LIMIT = 10_000
UNPACKED_RATIO_LIMIT = 100
"""The limit of a zip's unpacked size, in times its size. Weights shrink by a tenth, tables and texts to a fifth."""
DIRECTORY_LIMIT_BYTES = 4 << 20
"""Of a zip's directory, which Python's reader makes objects of: ten times a directory of as many files as may be."""
BLOCK_BYTES = 1 << 18
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z")


def unsound(path: Path, reason: str) -> BadBundle:
    """The error for a bundle that is not as its exporter left it."""
    return BadBundle(reason, file=path, fix="copy or export the bundle again; do not edit its files")


class Archive:
    """The files of a folder or of a zip, or of one folder within, by safe relative names."""

    def __init__(self, path: Path, inside: str = "") -> None:
        self.path, self.inside = path, inside
        self._zip: zipfile.ZipFile | None = None

    def __enter__(self) -> "Archive":
        if not self.path.is_dir():
            import zipfile

            with reading(self.path):
                self._stream = BoundedFile(_open_plain(self.path))
                try:
                    self._zip = zipfile.ZipFile(self._stream)
                except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
                    self._stream.close()
                    raise unsound(self.path, f"neither a folder nor a zip file ({error})") from error
            self._stream.limit = -1
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()
            self._stream.close()

    def sizes(self) -> dict[str, int]:
        """Sizes by name; anything but plain files under plain names is refused."""
        found: dict[str, int] = {}
        limit, total, count = TOTAL_LIMIT_BYTES, 0, 0
        if self._zip is not None:
            limit = min(limit, UNPACKED_RATIO_LIMIT * os.fstat(self._stream.fileno()).st_size)
        for entry, size in self._entries():
            total, count = total + size, count + 1
            if total > limit or count > FILE_COUNT_LIMIT:
                raise unsound(self.path, "too large, or too many files, for a bundle")
            if not entry.startswith(self.inside):
                continue
            name = entry.removeprefix(self.inside)
            if not FILE_NAME.match(name):
                raise unsound(self.path, f"a file has the name {name!r}, which no bundle has")
            if name in found:
                raise unsound(self.path, f"two files have the name {name!r}")
            found[name] = size
        return found

    def _entries(self) -> Iterator[tuple[str, int]]:
        if self._zip is not None:
            for info in self._zip.infolist():
                if info.compress_type not in (0, 8):  # stored, deflated: the others' decoders fail in ways of their own
                    raise unsound(self.path, f"{info.filename} is compressed in a way that no bundle uses")
                if not info.filename.endswith("/"):
                    yield info.filename, info.file_size
            return
        folders = [(self.path, "")]
        while folders:
            folder, before = folders.pop()
            with reading(folder), os.scandir(folder) as entries:
                for entry in entries:
                    name = before + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((Path(entry.path), f"{name}/"))
                    elif entry.is_file(follow_symlinks=False):
                        yield name, entry.stat(follow_symlinks=False).st_size
                    else:
                        raise unsound(self.path, f"{name} is a link or a special file")

    def read(self, name: str, limit: int) -> bytes:
        """At most ``limit`` bytes of a file, and one more where it has more."""
        with self._open(name) as stream:
            return stream.read(limit + 1)

    def read_large(self, name: str, limit: int) -> memoryview:
        """:meth:`read` into memory of numpy's: from 4 MB on that has pages of 2 MB, which come five times as fast."""
        held = np.empty(limit + 1, np.uint8)
        with self._open(name) as stream:
            return held.data[: stream.readinto(held)]  # type: ignore[attr-defined]

    def digest(self, name: str, limit: int) -> str:
        """SHA-256 of what :meth:`read` would give, a block at a time."""
        hashed, left, block = hashlib.sha256(), limit + 1, memoryview(bytearray(BLOCK_BYTES))
        with self._open(name) as stream:
            while size := stream.readinto(block[:left]):  # type: ignore[attr-defined]
                hashed.update(block[:size])
                left -= size
        return hashed.hexdigest()

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self._zip is not None:
            import zipfile
            import zlib

            try:
                with self._zip.open(self.inside + name) as packed:
                    yield packed
                return
            except (
                zipfile.BadZipFile,
                zlib.error,
                RuntimeError,
                NotImplementedError,
                EOFError,
                OSError,
                OverflowError,
                ValueError,
            ) as error:
                raise unsound(self.path, f"{name} cannot be unpacked ({error})") from error
        path = self.path / (self.inside + name)
        try:
            with reading(path), os.fdopen(_open_plain(path, os.O_NOFOLLOW), "rb") as stream:
                yield stream
        except BadData as error:
            raise unsound(self.path, f"{name}: {error.message}") from error


class BoundedFile(io.FileIO):
    """A file of which at most ``limit`` bytes are read at once, where that is not negative."""

    limit = DIRECTORY_LIMIT_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to ``size`` bytes; what asks for the rest of the file gets no more than the limit."""
        if self.limit >= 0:
            size = self.limit if size is None or size < 0 else size
            if size > self.limit:
                raise ValueError("its directory is too large")
        return super().read(size) or b""


def _open_plain(path: Path, flags: int = 0) -> int:
    """A descriptor of a plain file; no pipe is waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise unsound(path, "neither a folder nor a plain file")
    return descriptor
