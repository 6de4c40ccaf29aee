"""Reading and writing files so that nothing partial ever stands under a final name."""

import errno
import os
import re
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .locks import locked
from .os_errors import check_place, write_error, writing

_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
"""Errors of file systems that do not flush folders: CIFS and FUSE."""
_OLD = ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux' fcntl.h
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}(\.[^.]+)?\Z", re.DOTALL)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in ``path``'s folder; flush it and rename it to ``path`` on success.

    The temporary name starts with a dot and keeps the suffix. Whatever happens, ``path`` is either the old
    whole file or the new whole file, and no temporary file stays behind; that of a process that was killed goes when
    ``path`` is written again.

    Raises:
        CannotCreate, IOFailure: Where the operating system refuses.
    """
    path = Path(path)
    sweep(path)
    with writing(path), atomic_files([path]) as (temporary,):
        yield temporary


@contextmanager
def atomic_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """:func:`atomic_file` for files that belong together, renamed in this order.

    None is renamed before all are on the disk, so that a full one leaves every old file. A process that is killed
    between two renames leaves the first ones new and the others old: what vouches for the rest comes last.
    """
    with ExitStack() as stack:
        temporaries = []
        for path in paths:
            check_place(path)
            with writing(path):
                temporaries.append(stack.enter_context(_temporary(path)))
        pairs = list(zip(temporaries, paths, strict=True))
        yield temporaries
        for temporary, path in pairs:
            with writing(path):
                _sync(temporary)
        for temporary, path in pairs:
            with writing(path):
                temporary.replace(path)
        for folder in dict.fromkeys(path.parent for path in paths):
            with writing(folder):
                _sync(folder)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, removed in the end unless it is renamed before.

    It is locked, if the file system has locks, so that :func:`sweep` can tell it from a dead process's.
    """
    import fcntl  # POSIX only

    while True:
        temporary = path.with_name(f".{path.stem}.{_token()}{path.suffix}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # it is being swept
                    continue
            if not os.path.exists(temporary):  # it has been
                continue
            yield temporary
            return
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            os.close(descriptor)


def sweep(*paths: Path) -> None:
    """Remove what killed processes left of :func:`atomic_file` for ``paths``."""
    for folder in dict.fromkeys(path.parent for path in paths):
        _sweep(folder, {(path.stem, path.suffix) for path in paths if path.parent == folder})


def sweep_folder(folder: Path) -> None:
    """Remove what killed processes left of :func:`atomic_file` in ``folder``."""
    _sweep(folder, None)


def _sweep(folder: Path, names: Collection[tuple[str, str]] | None) -> None:
    """Of files with these stems and suffixes; of all where None is given."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            left = _TEMPORARY.match(entry.name)
            if left and (names is None or left.groups("") in names):
                _unlink_if_left(entry.path)


def _unlink_if_left(temporary: str) -> None:
    """Remove a temporary file that no living process has locked."""
    import fcntl  # POSIX only

    with suppress(OSError):
        descriptor = os.open(temporary, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(temporary)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; flush it and swap it in as a whole on success.

    Whatever happens, ``path`` is the old whole folder or the new whole one, where the system exchanges two names in
    one step (Linux, on the usual file systems). Elsewhere the old one is moved aside first: a process that is killed
    between the two renames leaves neither, and the next call for ``path`` puts the old one back before anything else.

    Raises:
        TryAgain: If another process is writing it.
        CannotCreate, IOFailure: Where the operating system refuses.
    """
    path = Path(path)
    if path.is_symlink():
        check_place(path)
    with locked(path):
        _mend_folder(path)
        temporary = path.with_name(f".{path.name}.{_token()}")
        old = temporary.with_name(temporary.name + _OLD)
        try:
            temporary.mkdir()
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                _sync(file)
            if not os.path.lexists(path):
                temporary.rename(path)
            elif not _exchange(temporary, path):
                path.rename(old)
                temporary.rename(path)
            _sync(path.parent)
        except OSError as error:
            if os.path.lexists(old) and not os.path.lexists(path):
                old.rename(path)
            raise write_error(path, error) from error
        finally:
            _remove(temporary)
            _remove(old)


def _mend_folder(path: Path) -> None:
    """Remove what killed processes left of :func:`atomic_folder` for ``path``, but for the old folder where no other
    stands; the lock of ``path`` must be held."""
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}({re.escape(_OLD)})?\Z")
    with writing(path):
        found = [entry.path for entry in os.scandir(path.parent) if left.match(entry.name)]
        for leftover in found:
            if leftover.endswith(_OLD) and not os.path.lexists(path):
                os.rename(leftover, path)
                _sync(path.parent)
    for leftover in found:
        _remove(Path(leftover))


def _exchange(one: Path, other: Path) -> bool:
    """Let two names of one folder change places, in one step of the system's; False where it has no such step."""
    import ctypes  # which costs a start of topt-run some milliseconds

    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code))


def _remove(path: Path) -> None:
    import shutil  # with its compressors, too dear for every start of topt-run

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _token() -> str:
    """A name that no other process chooses."""
    return os.urandom(6).hex()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)
