"""Measured parts of pages: what stands between two comments is written by a benchmark, the rest by hand.

A table there may have columns of several machines, and a section parts of several machines under headings of their
own: each writes its own, and keeps the others'.
"""

import re
from pathlib import Path

from topt_deploy.runtime.processor import CPUINFO, processor_name

Columns = dict[str, dict[str, str]]
"""By column and row, a cell of the table."""


def this_processor() -> str:
    """Name and instruction sets, with the generation: EPYC is the name of many."""
    lines = dict(line.split("\t", 1) for line in CPUINFO.read_text().splitlines() if "\t" in line)
    told = [lines[key].strip(": \t") for key in ("cpu family", "model") if key in lines]
    return f"{processor_name()}, family {' model '.join(told)}"


def read_section(page: Path, name: str) -> str:
    """Return what stands between the page's comments ``<!-- name -->`` and ``<!-- /name -->``."""
    return _found(page, name)[0][2]


def write_section(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the page's comments ``<!-- name -->`` and ``<!-- /name -->``."""
    match, whole = _found(page, name)
    page.write_text(f"{whole[: match.end(1)]}{text.strip()}\n{whole[match.start(3) :]}", encoding="utf-8")


def _found(page: Path, name: str) -> tuple[re.Match[str], str]:
    whole = page.read_text(encoding="utf-8")
    match = re.search(rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)", whole, re.DOTALL)
    if not match:
        raise SystemExit(f"{page} has no place for {name}")
    return match, whole


def with_part(section: str, heading: str, text: str) -> str:
    """A section with this text below its heading of the third level, in place of what stood there; at the end where the
    section has no such heading. Other parts stay."""
    parts = dict(
        part.split("\n", 1) for part in re.split(r"^### ", section.strip() + "\n", flags=re.MULTILINE) if part.strip()
    )
    parts[heading] = text
    return "\n\n".join(f"### {name}\n\n{part.strip()}" for name, part in parts.items())


def read_columns(table: str) -> Columns:
    """The columns of a table that :func:`written` has made; none of an empty text."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.strip().splitlines()]
    if not rows:
        return {}
    (_, *names), _, *cells = rows
    return {name: {row[0]: row[k] for row in cells} for k, name in enumerate(names, start=1)}


def written(columns: Columns) -> str:
    """A table of all columns; where one has no such row, a dash."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(column.get(row, "–") for column in columns.values())] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def joined(table: str, own: Columns, processor: str) -> str:
    """A table with a processor's columns in place of those that it had before; the others' stay.

    Args:
        table: The table as it stands.
        own: The processor's columns now, whose names are its name, or begin with it and a comma.
        processor: Its name.
    """
    others = {n: column for n, column in read_columns(table).items() if not f"{n},".startswith(f"{processor},")}
    return written(others | own)
