"""Private folders for temporary files."""

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from topt_deploy.errors import CannotCreate, IOFailure

from .os_errors import CANNOT_CREATE

SCRATCH_KEPT_S = 24 * 3600
_PREFIX = "topt-scratch-"
_SCRATCH = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}\Z")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A private folder for temporary files below TMPDIR, and nowhere else where that cannot be written to.

    Those that killed processes left are removed once they are a day old.

    Raises:
        CannotCreate, IOFailure: Where the operating system refuses.
    """
    parent = os.environ.get("TMPDIR", "/tmp")
    with suppress(OSError):
        for entry in os.scandir(parent):
            if _SCRATCH.match(entry.name):
                facts = entry.stat(follow_symlinks=False)  # another user's could lead elsewhere by now
                ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid()
                if ours and time.time() - facts.st_mtime > SCRATCH_KEPT_S:
                    _remove(Path(entry.path))
    folder = Path(parent, _PREFIX + os.urandom(4).hex()).absolute()
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        fix = "set TMPDIR to one that can be written to"
        what = CannotCreate if error.errno in CANNOT_CREATE else IOFailure
        raise what(f"no folder for temporary files ({error.strerror})", file=parent, fix=fix) from error
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # it is not empty
        import shutil  # which takes 2 ms, for it imports what compresses

        shutil.rmtree(folder, ignore_errors=True)
