"""Files of a bundle that are mapped by what runs them, and must not change, or are tried in a process of their own."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from topt_deploy.bundle.sealed import Sealed
from topt_deploy.errors import BadBundle, Exit, OutOfMemory, UsageError

LAST_WORDS_BYTES = 1 << 16
_ASKED = re.compile(rb"memory allocation of (\d+) bytes failed")  # as Rust says it


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
        BadBundle: If the process is ended by a signal, or for want of more memory than this machine has.
        OutOfMemory: If it is ended for want of less.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):
            signal.signal(signal.SIGABRT, signal.SIG_DFL)  # whatever it is taken for elsewhere
            os.dup2(theirs, 2)  # its last words are told by what raises them here
            call()
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as words:
        asked = max(map(int, _ASKED.findall(words.read(LAST_WORDS_BYTES))), default=0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    short = 0 < asked <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if code == Exit.TRY_AGAIN or (code == -signal.SIGABRT and short):
        raise OutOfMemory(bundle)
    if code:
        raise BadBundle(
            f"{what} ends the process that reads it", file=bundle, found=signal.Signals(-code).name,
            fix="do not use this bundle",
        )  # fmt: skip


def _stamp(path: Path) -> tuple[int, ...]:
    facts = os.stat(path, follow_symlinks=False)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
