"""Our commands as a user runs them, and the folder that a test runs them in. Imports no torch."""

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 1800.0
"""After this a test hangs. No verdict depends on it: how long something takes is up to the rest of the machine."""


@dataclass(frozen=True)
class Said:
    """What a command ended with and printed."""

    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    """This process's, with our commands on the path and compiled modules kept, as on a user's machine."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", "TOPT_BUNDLE")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}", **more}


def shell(command: str, folder: Path, before: Callable[[], None] | None = None, **more: str) -> Said:
    """Run a command as a user would type it in ``folder``; ``before`` is called in the child."""
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment(**more),
        preexec_fn=before,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE_S,
    )
    return Said(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Desk:
    """A folder of a test's own with a city and a bundle, as topt-run expects them."""

    folder: Path

    @property
    def regions(self) -> Path:
        return self.folder / "regions.parquet"

    @property
    def mobility(self) -> Path:
        return self.folder / "mobility.parquet"

    @property
    def bundle(self) -> Path:
        return self.folder / "model.topt"

    @property
    def out(self) -> Path:
        return self.folder / "predictions.parquet"

    @property
    def receipt(self) -> Path:
        return self.folder / "predictions.receipt.json"

    def state(self) -> dict[str, str]:
        """Every name below the folder, with a hash of what it holds."""
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file() and os.access(path, os.R_OK)
            else "no file"
            for path in self.folder.rglob("*")
        }


_PR_CAPBSET_DROP = 24
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


def without_privileges() -> None:
    """In a child about to start a command: what modes forbid is forbidden, to root as well.

    Root reads and writes anything by a capability of its own; without it, it is a user like others, and the
    interpreter and packages that root owns are still within reach, as they would not be for another user.
    """
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
            if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")
