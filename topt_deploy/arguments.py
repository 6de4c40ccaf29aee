"""Arguments of the Python functions, checked as the commands' own parser checks the command line's."""

import numbers
import os
from collections.abc import Iterable
from typing import Any, TypeAlias

from .errors import UsageError

Location: TypeAlias = str | os.PathLike[str]
"""A file or a folder."""


def several(values: str | Iterable[str]) -> tuple[str, ...]:
    """One value, or several: ``"crime"`` is one task and not five letters."""
    return (values,) if isinstance(values, str) else tuple(values)


def check_choice(name: str, given: object, choices: Iterable[object]) -> None:
    """Refuse a value that is not among an option's choices.

    Raises:
        UsageError: Naming the choices.
    """
    choices = tuple(choices)
    if given not in choices:
        raise UsageError(f"no such {name}", expected=f"one of {', '.join(map(repr, choices))}", found=repr(given))


def check_least(name: str, given: int | None, least: int = 1) -> None:
    """Refuse what is no whole number, or too small a one; None is an option that was left out.

    Raises:
        UsageError: Naming the least.
    """
    _check_kind(name, given, numbers.Integral, "a whole number")
    if given is not None and given < least:
        raise UsageError(f"{name} is too small", expected=f"{least} or more", found=given)


def check_number(name: str, given: float | None) -> None:
    """Refuse what is no number; None is an option that was left out.

    Raises:
        UsageError: Naming the kind that it is of.
    """
    _check_kind(name, given, numbers.Real, "a number")


def check_location(name: str, given: Location | None, *, needed: bool = False) -> None:
    """Refuse what is no path; None is an option that was left out, unless it is ``needed``.

    Raises:
        UsageError: Naming the kind that it is of.
    """
    _check_kind(name, given, (str, os.PathLike), "a path", needed=needed)


def _check_kind(name: str, given: object, kind: Any, expected: str, *, needed: bool = False) -> None:
    if (given is not None or needed) and not isinstance(given, kind):
        raise UsageError(f"{name} is not {expected}", expected=expected, found=f"{given!r}, a {type(given).__name__}")
