"""Arguments of the Python functions, checked as the commands' own parser checks the command line's."""

import os
from collections.abc import Iterable
from typing import TypeAlias

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
    """Refuse a number that is too small; None is an option that was left out.

    Raises:
        UsageError: Naming the least.
    """
    if given is not None and given < least:
        raise UsageError(f"{name} is too small", expected=f"{least} or more", found=given)
