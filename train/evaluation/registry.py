"""Every method by name: ToPT and its variants, the literature, the plain baselines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from topt_deploy.errors import UsageError

from .literature import LITERATURE
from .plain_baselines import PLAIN
from .problem import Method
from .topt_variants import VARIANTS, Topt

Group = Literal["variant", "literature", "plain"]

MAIN = "topt"
"""The default preset: what the verdict is about."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method that can be evaluated.

    Attributes:
        group: The method's group.
        make: Makes it.
        settings: The settings that its results depend on beside its name and this version, so that results of other
            settings are not taken for its own.
    """

    group: Group
    make: Callable[[], Method]
    settings: str = ""


def _variant(topt: Topt) -> Entry:
    return Entry(group="variant", make=lambda: topt, settings=topt.settings)


METHODS: dict[str, Entry] = {
    **{name: _variant(topt) for name, topt in VARIANTS.items()},
    **{name: Entry(group="literature", make=make) for name, make in LITERATURE.items()},
    **{name: Entry(group="plain", make=make) for name, make in PLAIN.items()},
}
"""By name, in the order of the tables."""


def choose(patterns: Sequence[str], groups: Sequence[Group], option: str) -> list[str]:
    """Names, in the registry's order, that match a shell pattern (``boosting*``) or are of a group that is named.

    Raises:
        UsageError: If a pattern matches nothing.
    """
    among = {name: entry.group for name, entry in METHODS.items() if entry.group in groups}
    chosen = set()
    for pattern in patterns:
        matched = {name for name, group in among.items() if fnmatchcase(name, pattern) or group == pattern}
        if not matched and pattern not in groups:
            raise UsageError(
                f"{option}: no such method",
                expected=f"names or patterns among {', '.join([*groups, *among])}",
                found=repr(pattern),
            )
        chosen |= matched
    return [name for name in among if name in chosen]
