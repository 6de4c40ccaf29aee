"""The operating system's errors of reading and writing, as errors that a user can act on."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topt_deploy.errors import BadData, CannotCreate, IOFailure, NoInput, NoPermission, OutOfMemory, ToptError, shortage

CANNOT_CREATE = {
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
_NO_FILE = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EINVAL}


def write_error(path: Path, error: OSError) -> ToptError:
    """The user's error for a failed write to ``path``."""
    reason = error.strerror or str(error)
    if (short := shortage(error, path)) is not None:
        return short
    if error.errno in CANNOT_CREATE:
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
        if (short := shortage(error, path)) is not None:
            raise short from error
        if error.errno in _NO_FILE:  # trying again would find the same
            raise BadData(f"no file can be there ({error.strerror})", file=path, expected="a plain file") from error
        raise IOFailure(f"reading failed ({error.strerror or error})", file=path) from error


def check_file(path: Path) -> None:
    """Refuse what cannot be read as a file.

    Raises:
        NoInput, NoPermission, BadData, IOFailure: Saying why.
    """
    with reading(path):
        check_kind(path)
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


def check_kind(path: Path) -> None:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BadData("a pipe or a device", file=path, expected="a plain file")  # never waited for


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
