"""Locks by which one process alone writes an output."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from topt_deploy.errors import TryAgain

from .os_errors import write_error

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only process that writes ``path``, and whatever is written along with it.

    The lock is the operating system's, on a hidden file beside ``path``: a process that is killed lets go of it.

    Raises:
        TryAgain: If another process holds it.
        CannotCreate, IOFailure: Where the operating system refuses.
    """
    lock = path.with_name(f".{path.name}.lock")
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            _lock(descriptor, path)
            # Whoever held it before has removed the file by now, perhaps: then this is a lock on nothing.
            if not os.path.exists(lock) or os.stat(lock).st_ino != os.fstat(descriptor).st_ino:
                continue
            try:
                yield
            finally:
                with suppress(OSError):
                    os.unlink(lock)
            return
        except BlockingIOError as error:
            raise TryAgain(
                "another process is writing this output", file=path, fix="wait for it, or name another place with --out"
            ) from error
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Lock a file, or say that its file system has no locks.

    Raises:
        BlockingIOError: If another process holds the lock.
        IOFailure: Where the operating system refuses for another reason.
    """
    import fcntl  # POSIX only

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise write_error(path, error) from error
        import logging  # which hardly any run needs

        logging.getLogger(__name__).warning(
            "%s: this file system has no locks (%s): see to it that one run at a time writes here",
            path.parent, error.strerror,
        )  # fmt: skip
