"""Optimisation profiles: the least, the usual and the largest size of every free dimension that an engine is made for.

A profile goes by the names that a graph gives its inputs' free dimensions, ``regions``, ``batch`` or ``past``, and one
name is one size wherever it stands. In a manifest it is ``{"regions": [1, 256, 4096]}``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topt_deploy.errors import UsageError

Shape = tuple[int, ...]
MAY_BE_NOTHING = frozenset({"past"})
"""Dimensions that may have no length: before the first token nothing was read."""
LARGEST = 2**31 - 1
"""TensorRT's dimensions are int32 in part."""


@dataclass(frozen=True, kw_only=True)
class ProfileRange:
    """Sizes of a dimension.

    Attributes:
        min, opt, max: An engine takes every size from min to max, and is fastest at opt.
    """

    min: int
    opt: int
    max: int

    def as_list(self) -> list[int]:
        """As it stands in a manifest."""
        return [self.min, self.opt, self.max]


Profile = Mapping[str, ProfileRange]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """An input's shapes under a profile, as TensorRT is told them."""

    min: Shape
    opt: Shape
    max: Shape


def read_range(name: str, sizes: Sequence[Any]) -> ProfileRange:
    """The range of a dimension.

    Args:
        name: The dimension's.
        sizes: Least, usual and largest size.

    Raises:
        UsageError: If they are not three whole numbers in order, or one is too small or too large; names the dimension.
    """
    smallest = 0 if name in MAY_BE_NOTHING else 1
    whole = len(sizes) == 3 and all(type(size) is int for size in sizes)
    if not whole or not smallest <= sizes[0] <= sizes[1] <= sizes[2] <= LARGEST or sizes[1] < 1:
        raise UsageError(
            f"no profile of {name}",
            expected=f"min,opt,max, whole numbers with {smallest} <= min <= opt <= max and 1 <= opt",
            found=",".join(map(str, sizes)) or "nothing",
            fix=f"--profile {name}={smallest},256,1024, for example",
        )
    return ProfileRange(min=sizes[0], opt=sizes[1], max=sizes[2])


def parse_profile(texts: Sequence[str], default: Profile, *, unnamed: str) -> dict[str, ProfileRange]:
    """The profile that a command line asks for.

    Args:
        texts: ``min,opt,max`` or ``name=min,opt,max`` each.
        default: Every dimension, with what it has where nothing is asked.
        unnamed: The dimension that is meant where none is named.

    Raises:
        UsageError: If a text is neither, or names a dimension that is not there, or the same one twice.
    """
    asked: dict[str, ProfileRange] = {}
    for text in texts:
        before, equals, after = text.partition("=")
        name, sizes = (before.strip(), after) if equals else (unnamed, text)
        if name not in default or name in asked:
            raise UsageError(
                f"--profile names {name!r} {'twice' if name in asked else 'and there is no such dimension'}",
                expected=f"each of {', '.join(default)} at most once", found=text,
            )  # fmt: skip
        numbers = [int(part) if part.strip().isdecimal() else part for part in sizes.split(",")]
        asked[name] = read_range(name, numbers)
    return {**default, **asked}


def read_profile(record: Mapping[str, Any]) -> dict[str, ProfileRange]:
    """A profile of a manifest's values.

    Raises:
        TypeError: If they are no profile; names the dimension.
    """
    try:
        return {name: read_range(name, sizes) for name, sizes in record.items()}
    except UsageError as error:
        raise TypeError(f"{error.message}: {error.found}") from error


def as_record(profile: Profile) -> dict[str, list[int]]:
    """A profile as it stands in a manifest."""
    return {name: sizes.as_list() for name, sizes in profile.items()}


def shapes(inputs: Mapping[str, Sequence[int | str | None]], profile: Profile) -> dict[str, Shapes]:
    """Least, usual and largest shape of every input that has a free dimension.

    Args:
        inputs: Dimensions of each input, by its name: a number, or the name of a free one.
        profile: The sizes of each name.

    Raises:
        UsageError: If a free dimension has no sizes, or no name, or the profile has sizes of one that no input has;
            names input and dimension.
    """
    named = {dim for dims in inputs.values() for dim in dims if not isinstance(dim, int)}
    for asked in profile:
        if asked not in named:
            raise UsageError(
                f"the profile has sizes for {asked!r}, and no input has such a dimension",
                expected=", ".join(sorted(map(str, named))) or "inputs of fixed size alone",
                found=", ".join(profile),
            )
    found = {}
    for name, dims in inputs.items():
        free = [dim for dim in dims if not isinstance(dim, int)]
        for dim in free:
            if dim is None or dim not in profile:
                raise UsageError(
                    f"the profile has no sizes for dimension {dim or 'without a name'!r} of input {name!r}",
                    expected=f"min,opt,max of each of {', '.join(sorted({str(d) for d in free}))}",
                    found=", ".join(profile) or "an empty profile",
                    fix=f"add --profile {dim}=min,opt,max" if dim else "export the graph with named dimensions",
                )
        if free:
            found[name] = Shapes(
                min=tuple(dim if isinstance(dim, int) else profile[str(dim)].min for dim in dims),
                opt=tuple(dim if isinstance(dim, int) else profile[str(dim)].opt for dim in dims),
                max=tuple(dim if isinstance(dim, int) else profile[str(dim)].max for dim in dims),
            )
    return found
