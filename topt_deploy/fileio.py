"""Reading and writing files so that nothing partial ever stands under a final name."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import BadData, CannotCreate, IOFailure, NoInput, NoPermission, ToptError

_CANNOT_CREATE = {
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


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
    return IOFailure(f"writing failed ({reason})", file=path, fix="free space or mend the disk, then run again")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's errors of reading ``path`` into the user's."""
    try:
        yield
    except FileNotFoundError as error:
        raise NoInput("no such file", file=path) from error
    except PermissionError as error:
        raise NoPermission("this user may not read it", file=path, fix="grant read permission") from error
    except IsADirectoryError as error:
        raise BadData("is a folder", file=path, expected="a file") from error
    except OSError as error:
        raise IOFailure(f"reading failed ({error.strerror or error})", file=path) from error


def check_place(path: Path) -> None:
    """Refuse a place that no file can be written to, before the work whose result would go there.

    Raises:
        CannotCreate: If it is a folder, or the operating system does not take the name.
    """
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            raise write_error(path, IsADirectoryError(errno.EISDIR, "it is a folder"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise write_error(path, error) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in ``path``'s folder; flush it and rename it to ``path`` on success.

    The temporary name starts with a dot and keeps the suffix. Whatever happens, ``path`` is either the old
    whole file or the new whole file, and no temporary file stays behind unless the process is killed.

    Raises:
        CannotCreate, IOFailure: Where the operating system refuses.
    """
    path = Path(path)
    check_place(path)
    temporary = path.with_name(f".{path.stem}.{_token()}{path.suffix}")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` and swap it in as a whole on success.

    An older folder of that name is moved aside first and removed last, so a failure leaves it in place.
    """
    import shutil  # with its compressors, too dear for every start of topt-run

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_token()}")
    old = temporary.with_name(temporary.name + ".old")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise write_error(path, error) from error
    finally:
        for leftover in (temporary, old):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON atomically; NaN and infinity are refused, for JSON has none."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # What is not UTF-8 in a file's name is a lone surrogate in Python, and \udcff in JSON.
    write_text(path, text.encode(errors="backslashreplace").decode())


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
    finally:
        os.close(descriptor)
