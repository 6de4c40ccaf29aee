"""Categories of a count view: found in a table, or checked against the model's."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from topt_deploy.errors import BadData

from .columns import (
    TableReader,
    canonical,
    check_counts,
    floats,
    list_width,
    lists,
    some,
)

Array = np.ndarray[Any, Any]


def find_categories(source: TableReader, view: str) -> tuple[str, ...]:
    """Categories of a view: the list column's own names, or the sorted suffixes of its wide columns."""
    if source.has(view):
        width = list_width(source, view)
        described = (source.field(view).metadata or {}).get(b"categories")
        if described is None:
            raise _unnamed(source, view, f"{width} numbers without names")
        try:
            names = json.loads(described)
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or len(names) != width or len({str(name) for name in names}) != width:
            raise BadData(
                "the list's category names do not fit its width",
                file=source.name,
                column=view,
                expected=f"{width} names, each once, a JSON list, in the field's metadata `categories`",
                found=f"{len(names)} names" if isinstance(names, list) else repr(described),
            )
        return tuple(str(name) for name in names)
    prefix = f"{view}_"
    return tuple(sorted(c.removeprefix(prefix) for c in source.names if c.startswith(prefix)))


def _unnamed(source: TableReader, view: str, found: str, expected: Sequence[str] = ()) -> BadData:
    """Counts by position would mean something else in the next table, and no number would tell."""
    return BadData(
        f"the list column {view!r} does not name its categories",
        file=source.name,
        column=view,
        expected="names, a JSON list, in the field's metadata `categories`"
        + (f": {some(expected)}" if expected else ""),
        found=found,
        fix=f"write one column {view + '_<category>'!r} per category, or add names (pandas drops them)",
    )


def _numbered(categories: Sequence[str]) -> bool:
    """Tell if a model's categories are named by their positions, as those of the published data are."""
    return tuple(categories) == tuple(f"{i:02d}" for i in range(len(categories)))


def read_view(source: TableReader, ids: Array, view: str, categories: Sequence[str]) -> Array:
    if in_list := source.has(view):
        values = lists(source, ids, view, len(categories)).astype(np.float64)
        if b"categories" in (source.field(view).metadata or {}):
            names = [canonical(name) for name in find_categories(source, view)]
            if set(names) != set(map(canonical, categories)):
                _refuse_categories(source, view, categories, names)
            values = values[:, [names.index(canonical(name)) for name in categories]]
        elif not _numbered(categories):
            raise _unnamed(source, view, f"{len(categories)} numbers without names", categories)
        columns = [f"{view}[{name}]" for name in categories]
    else:
        have = {canonical(name): name for name in find_categories(source, view)}
        if set(have) != set(map(canonical, categories)):
            _refuse_categories(source, view, categories, tuple(have.values()))
        columns = [f"{view}_{have[canonical(name)]}" for name in categories]
        values = np.stack([floats(source, ids, column) for column in columns], axis=1)
    if not (np.isfinite(values) & (values >= 0)).all():
        for position, column in enumerate(columns):
            check_counts(source, ids, column, values[:, position], view if in_list else None)
    return values


def _refuse_categories(source: TableReader, view: str, expected: Sequence[str], found: Sequence[str]) -> None:
    ours, theirs = ({canonical(name) for name in names} for names in (expected, found))
    missing = [name for name in expected if canonical(name) not in theirs]
    unknown = [name for name in found if canonical(name) not in ours]
    sides = [f"without {some(missing)}"] * bool(missing) + [f"with unknown {some(unknown)}"] * bool(unknown)
    raise BadData(
        f"the categories of view {view!r} are not the model's",
        file=source.name,
        column=some([f"{view}_{name}" for name in (missing or unknown)]),
        expected=f"{len(expected)} categories: {some(expected)}",
        found=f"{len(found)} categories, {' and '.join(sides)}",
        fix="count the same categories as in training; a category without any POI is a column of zeros",
    )
