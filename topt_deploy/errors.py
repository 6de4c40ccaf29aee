"""Errors that a user can act on, each with the exit code a batch system reads.

The codes are those of BSD's sysexits.h where one fits (docs/reference/exit-codes.md lists them all). Every message
names, as far as they apply, the file, the column, the region ids, what was expected, what was found and
what to do; no user mistake ends in a traceback.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """Exit codes of both commands."""

    DONE = 0
    USAGE = 2
    PARTIAL = 3
    BAD_DATA = 65
    NO_INPUT = 66
    NO_DEVICE = 69
    BUG = 70
    CANNOT_CREATE = 73
    IO_ERROR = 74
    TRY_AGAIN = 75
    BAD_BUNDLE = 76
    NO_PERMISSION = 77
    BAD_CONFIG = 78
    INTERRUPTED = 130
    TERMINATED = 143


def how_many(count: int, noun: str, plural: str = "") -> str:
    """A number and what it counts: "1 region", "1,200 regions"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def printable(text: str, keep: str = "") -> str:
    r"""Text with control characters and the like spelled out, ``\x1b``: what a file says must not steer a terminal.

    Args:
        text: The text.
        keep: Characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class ToptError(Exception):
    """An error for the user.

    Args:
        message: The fault, in one sentence.
        file, column: Where it is wrong.
        ids: The region ids concerned; the first few are shown and all are counted.
        expected, found: Both sides of the disagreement.
        fix: The advice for the user.
    """

    exit_code = Exit.BUG
    IDS_SHOWN = 5

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        column: str | None = None,
        ids: Iterable[object] | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.column = column
        self.ids = None if ids is None else [str(i) for i in ids]
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.fix = fix
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, with whatever a kind of its own has besides."""
        return _again, (type(self), vars(self))

    def __str__(self) -> str:
        place = [printable(self.file)] if self.file else []
        place += [f"column {self.column!r}"] if self.column else []
        message = printable(self.message)
        lines = [f"{', '.join(place)}: {message}" if place else message]
        if self.ids is not None:
            shown = ", ".join(repr(i) for i in self.ids[: self.IDS_SHOWN])
            rest = len(self.ids) - self.IDS_SHOWN
            lines.append(f"  regions:  {shown}" + (f" and {rest} more ({len(self.ids)} in all)" if rest > 0 else ""))
        lines += [f"  expected: {printable(self.expected)}"] if self.expected is not None else []
        lines += [f"  found:    {printable(self.found)}"] if self.found is not None else []
        lines += [f"  to do:    {printable(self.fix)}"] if self.fix else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The same facts for machines (``--log-format json``); absent ones are left out."""
        ids = None if self.ids is None else self.ids[: self.IDS_SHOWN]
        facts = {
            "error": type(self).__name__,
            "exit_code": int(self.exit_code),
            "message": self.message,
            "file": self.file,
            "column": self.column,
            "region_ids": ids,
            "region_count": None if self.ids is None else len(self.ids),
            "expected": self.expected,
            "found": self.found,
            "to_do": self.fix,
        }
        return {key: value for key, value in facts.items() if value is not None}


def _again(kind: type[ToptError], facts: dict[str, Any]) -> ToptError:
    error = kind.__new__(kind)
    vars(error).update(facts)
    return error


class UsageError(ToptError):
    """The command line asks for something that does not exist or does not go together."""

    exit_code = Exit.USAGE


class BadData(ToptError):
    """The input was read and is not what the contract says."""

    exit_code = Exit.BAD_DATA


class BadRows(BadData):
    """Single rows are not what the contract says; the others may be (``--on-bad-row``).

    Args:
        table: The table, :data:`REGIONS` or :data:`MOBILITY`.
        rows: bool, one per row of the table: which rows.
        code: The reason as one word, for machines.
        fill: The columns that a neutral value could stand in for; empty where nothing can.
        facts: The arguments of :class:`ToptError`.
    """

    REGIONS, MOBILITY = "regions", "mobility"

    def __init__(
        self, message: str, *, table: str, rows: Any, code: str, fill: Sequence[str] = (), **facts: Any
    ) -> None:
        super().__init__(message, **facts)
        self.table, self.rows, self.code, self.fill = table, rows, code, tuple(fill)

    def as_dict(self) -> dict[str, object]:
        """The same facts for machines, with the reason's code."""
        return super().as_dict() | {"code": self.code}


class NoInput(ToptError):
    """An input file is missing."""

    exit_code = Exit.NO_INPUT


class NoDevice(ToptError):
    """The requested device or provider is absent; there is never a silent fall-back."""

    exit_code = Exit.NO_DEVICE


class CannotCreate(ToptError):
    """The output's folder is missing or cannot be written."""

    exit_code = Exit.CANNOT_CREATE


class IOFailure(ToptError):
    """Reading or writing failed: disk full, I/O error."""

    exit_code = Exit.IO_ERROR


class TryAgain(ToptError):
    """Something else is at work on the same output; later it will not be."""

    exit_code = Exit.TRY_AGAIN


class OutOfMemory(TryAgain):
    """The machine has less memory left than this takes; later, or with fewer workers, it may have."""

    def __init__(self, file: object = None) -> None:
        super().__init__(
            "not enough memory", file=file, fix="give it more, or fewer --workers, and go on with --resume"
        )


class TooManyFiles(TryAgain):
    """This process, or the machine, has as many files open as it may have."""

    def __init__(self, file: object = None) -> None:
        super().__init__(
            "too many files are open", file=file,
            fix="allow more (ulimit -n), or use fewer --workers, and go on with --resume",
        )  # fmt: skip


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as SIGINT does: what is open is closed, and the record written."""


class BadBundle(ToptError):
    """The bundle is not whole, not what its manifest says, or fails its own test."""

    exit_code = Exit.BAD_BUNDLE


class NoPermission(ToptError):
    """An input may not be read by this user."""

    exit_code = Exit.NO_PERMISSION


class BadConfig(ToptError):
    """A configuration file or value is wrong."""

    exit_code = Exit.BAD_CONFIG


def user_error(error: BaseException, file: object = None) -> ToptError | None:
    """The user's error for what no part of ours has put into words; None where it is a bug of ours, or no error.

    Args:
        error: What was raised.
        file: What was at work on, where the error names none.
    """
    if isinstance(error, ToptError):
        return error
    if (short := next(filter(None, (shortage(cause, file) for cause in _causes(error))), None)) is not None:
        return short
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return IOFailure(
            f"the operating system refused something ({reason})", file=error.filename or file,
            fix="mend what it says, then run again",
        )  # fmt: skip
    return None


def shortage(error: BaseException, file: object = None) -> TryAgain | None:
    """The user's error for memory or open files that could not be had; None for whatever else was raised."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, ImportError):  # what the system's loader says is in the text alone
        number = next((n for n in (errno.ENOMEM, errno.EMFILE, errno.ENFILE) if os.strerror(n) in str(error)), None)
    if isinstance(error, SystemError):  # of C code that failed without a word
        number = _last_errno()
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return OutOfMemory(file)
    return TooManyFiles(file) if number in (errno.EMFILE, errno.ENFILE) else None


def _last_errno() -> int | None:
    """C's errno of this thread, where the system's library is glibc."""
    import ctypes

    place = getattr(ctypes.CDLL(None), "__errno_location", None)
    if place is None:
        return None
    place.restype = ctypes.POINTER(ctypes.c_int)
    return int(place()[0])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came of: a module that found no memory while it was loaded is told as broken."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def exit_code(error: BaseException) -> Exit:
    """The exit code of a command that ends by this: the one place that decides it, for process, record and metrics."""
    if isinstance(error, Terminated):
        return Exit.TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    known = user_error(error)
    return Exit.BUG if known is None else known.exit_code
