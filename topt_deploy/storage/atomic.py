"""Reading and writing files so that nothing partial ever stands under a final name."""

import errno
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from topt_deploy.errors import BadData, CannotCreate, IOFailure, NoInput, NoPermission, OutOfMemory, ToptError, TryAgain

_CANNOT_CREATE = {
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip

_NO_FILE = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EINVAL}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
"""Errors of file systems that have no locks, or do not flush folders: CIFS, FUSE, and NFS without its daemon."""

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
HELD_BYTES = 8 << 20
SCRATCH_KEPT_S = 24 * 3600
_OLD = ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux' fcntl.h
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}(\.[^.]+)?\Z", re.DOTALL)
_SCRATCH = re.compile(r"topt-[0-9a-f]{16}\Z")


def write_error(path: Path, error: OSError) -> ToptError:
    """The user's error for a failed write to ``path``."""
    reason = error.strerror or str(error)
    if error.errno in _CANNOT_CREATE:
        return CannotCreate(
            f"cannot create this output ({reason})",
            file=path,
            expected=f"an existing folder {str(path.parent)!r} that this user may write to",
            fix="create the folder, or name another place with --out",
        )
    return IOFailure(f"writing failed ({reason})", file=path, fix="free space or repair the disk, then run again")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors of writing ``path`` into the user's."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's errors of reading ``path`` into the user's."""
    try:
        yield
    except FileNotFoundError as error:
        raise NoInput("no such file", file=path) from error
    except NotADirectoryError as error:
        raise NoInput("no such file: a part of its path is no folder", file=path) from error
    except PermissionError as error:
        raise NoPermission("this user may not read it", file=path, fix="grant read permission") from error
    except IsADirectoryError as error:
        raise BadData("is a folder", file=path, expected="a file") from error
    except MemoryError as error:
        raise OutOfMemory(path) from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise OutOfMemory(path) from error
        if error.errno in _NO_FILE:  # trying again would find the same
            raise BadData(f"no file can be there ({error.strerror})", file=path, expected="a plain file") from error
        raise IOFailure(f"reading failed ({error.strerror or error})", file=path) from error


def check_file(path: Path) -> None:
    """Refuse what cannot be read as a file.

    Raises:
        NoInput, NoPermission, BadData, IOFailure: Saying why.
    """
    with reading(path):
        _check_kind(path)
        with path.open("rb"):
            pass


def read_plain(path: Path, limit: int) -> bytes:
    """The bytes of a plain file, not waited for, of which there are no more than ``limit``.

    Raises:
        NoInput, NoPermission, BadData, IOFailure: Saying why not.
    """
    with reading(path), os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise BadData("a pipe or a device", file=path, expected="a plain file")
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise BadData("the file is too large", file=path, expected=f"at most {limit:,} bytes")
    return data


def _check_kind(path: Path) -> None:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BadData("a pipe or a device", file=path, expected="a plain file")  # never waited for


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
            _check_kind(path)
            with path.open("rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                data = stream.readall() if size <= HELD_BYTES else None
                self.data = data if data is not None and len(data) <= HELD_BYTES else None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its bytes, in hexadecimal."""
        return sha256_file(self.path) if self.data is None else sha256_bytes(self.data)


def check_place(path: Path) -> None:
    """Refuse a place that no file can be written to, before the work whose result would go there.

    Only an older file is ever replaced. A link would be replaced by a file, and what it leads to stay old; a device
    would be lost to all other programs.

    Raises:
        CannotCreate: If it is a folder, a link, a device or a pipe, or the operating system does not take the name.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise write_error(path, error) from error
    if stat.S_ISDIR(mode):
        raise write_error(path, IsADirectoryError(errno.EISDIR, "it is a folder"))
    if stat.S_ISLNK(mode):
        raise CannotCreate(
            "cannot create this output (it is a link)", file=path, expected="a plain file, or none",
            found=f"a link to {os.path.realpath(path)}", fix="name the file that it leads to, or remove the link",
        )  # fmt: skip
    if not stat.S_ISREG(mode):
        raise CannotCreate(
            "cannot create this output (it is a pipe or a device)", file=path, expected="a plain file, or none",
            fix="name a file",
        )  # fmt: skip


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


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A private folder for temporary files (by hand: importing tempfile takes 4 ms and 1 MB).

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
                    remove_folder(entry.path)
    folder = os.path.join(parent, f"topt-{os.urandom(8).hex()}")
    try:
        os.mkdir(folder, 0o700)
    except OSError as error:
        fix = "set TMPDIR to one that can be written to"
        what = CannotCreate if error.errno in _CANNOT_CREATE else IOFailure
        raise what(f"no folder for temporary files ({error.strerror})", file=folder, fix=fix) from error
    try:
        yield Path(folder)
    finally:
        remove_folder(folder)


def remove_folder(folder: str | Path) -> None:
    """Remove a folder and what is in it, as far as that can be done (by hand: importing shutil costs a start)."""
    with suppress(OSError):
        for place, _, files in os.walk(folder, topdown=False):
            for file in files:
                os.unlink(os.path.join(place, file))
            os.rmdir(place)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON atomically."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """A value as indented JSON; NaN and infinity are refused, for JSON has none."""
    text = _indented(value, "\n") + "\n"
    # What is not UTF-8 in a file's name is a lone surrogate in Python, and \udcff in JSON.
    return text.encode(errors="backslashreplace").decode()


def _indented(value: Any, newline: str) -> str:
    """The same text as ``json.dumps(value, indent=2)``, which is slower because indentation switches off its C code."""
    inner = f"{newline}  "
    if isinstance(value, dict) and value:
        names = [key if isinstance(key, str) else _JSON(key) for key in value]
        items = [f"{_JSON(name)}: {_indented(one, inner)}" for name, one in zip(names, value.values(), strict=True)]
        return f"{{{inner}{f',{inner}'.join(items)}{newline}}}"
    if isinstance(value, (list, tuple)) and value:
        return f"[{inner}{f',{inner}'.join([_indented(one, inner) for one in value])}{newline}]"
    return _JSON(value)


def sha256_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of ``data``, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
