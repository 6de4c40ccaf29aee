"""Allocations that fail at the n-th call, as SQLite tests itself: a command forked for each n from a process that has
imported all it needs, so that what is counted is the command's own work.

Run as a script, this is that process: it reads one line of JSON per run, and answers with one.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import environment

LIBRARY = Path(__file__).with_name("failing_malloc.c")
PRELOADED = (
    "topt_deploy.runtime.cli.group", "topt_deploy.runtime.cli.predict", "topt_deploy.runtime.cli.encode",
    "topt_deploy.runtime.predict_city", "topt_deploy.runtime.settings",
    "topt_deploy.runtime.summary", "topt_deploy.runtime.prompt_encoder", "topt_deploy.runtime.missing_prompts",
    "topt_deploy.runtime.encoder_bundles", "topt_deploy.prompts.encode_job", "tokenizers", "PIL.Image",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; negative for the signal that ended it.
        allocations: How many it made, where it could still tell.
        told: What it wrote to standard error.
    """

    code: int
    allocations: int
    told: str


class Commands:
    """A process that runs ``topt-run`` with a failing allocation; one command at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, arguments: Sequence[object], folder: Path, fail_at: int = 0) -> Ended:
        """Run a command in a folder; with 0 nothing fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"arguments": [str(argument) for argument in arguments], "folder": str(folder), "fail_at": fail_at}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return Ended(**json.loads(self._process.stdout.readline()))


def compiled(folder: Path) -> Path | None:
    """The preloaded library; None without a compiler, or where the system's C library is another one than glibc."""
    library = folder / "failing_malloc.so"
    try:
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, LIBRARY], check=True, capture_output=True)
        subprocess.run([sys.executable, "-c", ""], check=True, capture_output=True, env=_environment(library))
    except (OSError, subprocess.CalledProcessError):
        return None
    return library


@contextmanager
def commands(library: Path, **more: str) -> Iterator[Commands]:
    """Start the process, with more variables in its environment."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=_environment(library) | more,
    )  # fmt: skip
    try:
        yield Commands(process)
    finally:
        process.communicate()


def _environment(library: Path) -> dict[str, str]:
    return environment(
        LD_PRELOAD=str(library), ARROW_DEFAULT_MEMORY_POOL="system", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"
    )


def _serve() -> None:
    from importlib import import_module

    from topt_deploy.pandas_blocker import without_pandas

    without_pandas()
    for module in PRELOADED:
        import_module(module)
    shim = ctypes.CDLL(None)
    shim.oom_arm.argtypes, shim.oom_count.restype = [ctypes.c_long], ctypes.c_long
    for line in sys.stdin:
        print(json.dumps(_forked(shim, json.loads(line))), flush=True)


def _forked(shim: Any, asked: dict[str, Any]) -> dict[str, Any]:
    folder = Path(asked["folder"])
    said, counted = os.open(folder / "said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), folder / "counted"
    counted.write_text("0")
    child = os.fork()
    if child == 0:
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(folder)
        code = _command(shim, asked["arguments"], asked["fail_at"])
        shim.oom_arm(0)
        os._exit(code)
    os.close(said)
    _, status = os.waitpid(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status), "allocations": int(counted.read_text()),
        "told": (folder / "said").read_text(errors="replace"),
    }  # fmt: skip


def _command(shim: Any, arguments: list[str], fail_at: int) -> int:
    from topt_deploy.console import run
    from topt_deploy.runtime.cli.group import cli

    shim.oom_arm(fail_at)
    try:
        run(cli, arguments)
    except SystemExit as error:
        allocations = shim.oom_count()
        with open("counted", "w") as file:
            file.write(str(allocations))
        return int(error.code or 0)
    return 1


if __name__ == "__main__":
    _serve()
