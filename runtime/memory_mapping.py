"""Files of a bundle that are mapped by what runs them, and must not change, or are tried in a process of their own."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from topt_deploy.bundle.sealed import Sealed
from topt_deploy.errors import BadBundle, UsageError


@contextmanager
def mapped(bundle: Sealed, files: frozenset[str]) -> Iterator[Path]:
    """The folder of files of a bundle, which are what its manifest says, before and after they are opened.

    Raises:
        UsageError: If the bundle is a zip.
        BadBundle: If a file is not the manifest's, or changes meanwhile.
    """
    if not bundle.path.is_dir():
        raise UsageError(
            "large weights are mapped, not unpacked", file=bundle.path, expected="a folder", found="a zip file",
            fix="unzip the bundle",
        )  # fmt: skip
    folder = bundle.path / bundle.inside
    before = [_stamp(folder / file) for file in files]
    bundle.verify(skip=frozenset(bundle.record["files"]) - files)
    yield folder
    if [_stamp(folder / file) for file in files] != before:
        raise BadBundle("files changed while they were read", file=bundle.path, fix="nothing may write to a bundle")


def survives(call: Callable[[], object], bundle: Path, what: str) -> None:
    """Refuse a part of a bundle that ends the process which reads it: it is read by another one first.

    What it raises there it raises here, too, and is not told of.

    Raises:
        BadBundle: If the process is ended by a signal.
    """
    child = os.fork()
    if not child:
        with suppress(BaseException):
            signal.signal(signal.SIGABRT, signal.SIG_DFL)  # whatever a signal is taken for elsewhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its last words are told by what raises them here
            call()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise BadBundle(
            f"{what} ends the process that reads it", file=bundle,
            found=signal.Signals(os.WTERMSIG(status)).name, fix="do not use this bundle",
        )  # fmt: skip


def _stamp(path: Path) -> tuple[int, ...]:
    facts = os.stat(path, follow_symlinks=False)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
