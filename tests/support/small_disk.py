"""A disk of our own that is nearly full: a small tmpfs, and what may be free of it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

BLOCK = 4096


@dataclass(frozen=True)
class SmallDisk:
    """A mounted disk.

    Attributes:
        folder: Where; for outputs.
    """

    folder: Path

    @property
    def _filler(self) -> Path:
        return self.folder.parent / "filler"

    def used(self) -> int:
        """Bytes of its blocks that outputs take."""
        return sum(BLOCK * -(-path.stat().st_size // BLOCK) for path in self.folder.rglob("*") if path.is_file())

    def leave(self, free: int) -> None:
        """Fill it up to so many bytes."""
        self._filler.unlink(missing_ok=True)
        with self._filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(BLOCK)):
                    pass
            except OSError:  # it is full
                pass
            file.truncate(max(0, file.tell() - free) // BLOCK * BLOCK)

    def state(self) -> dict[str, bytes]:
        """Every file below the folder."""
        return {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[SmallDisk]:
    """Mount one, or skip the test where this user may not."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        (place / "disk").mkdir()
        yield SmallDisk(place / "disk")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
