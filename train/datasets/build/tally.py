"""The fate of every row: counts by reason, a few rows of each reason, and warnings with their figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.errors import BadData

Array = np.ndarray[Any, Any]

LISTED = 1000
"""Rows of each reason that rejects.parquet lists for each source; the receipt counts all."""
BAD = ("bad_line", "bad_number", "bad_date", "bad_position")
"""Reasons for which a row cannot be read. The others are facts of the data, such as a blank position."""
LEFT = ("blank", "null_island", "outside", "duplicate", "no_date", "unknown_region", "no_category")
"""Reasons for which a row is read and counts for no region."""
ASIDE = ("filtered", "other_period", "period_before")
"""Rows that the recipe does not ask for, or for the period before only; they are counted, and not listed."""
EXPLAINED = {
    "bad_line": "a line with too many or too few columns",
    "bad_number": "not a number",
    "bad_date": "not a date",
    "bad_position": "not a position in degrees",
    "blank": "no position",
    "null_island": "at (0, 0), where nothing is",
    "outside": "in no region",
    "duplicate": "told before",
    "no_date": "no date",
    "unknown_region": "names a region that there is not",
    "no_category": "no category",
}
COLUMNS = {"source": pa.string(), "file": pa.string(), "line": pa.int64(), "reason": pa.string(), "value": pa.string()}


@dataclass
class Tally:
    """The fate of a source's rows.

    Attributes:
        name: The source, such as ``points.poi``.
        fail: Whether a row that cannot be read ends the build.
        read: Rows that were read, lines that are no rows included.
        assigned: Rows that count for a region.
        on_border: Positions exactly on a border.
        reasons: Rows by why they do not count.
        other: Rows of categories without a name of their own.
        warnings: Sentences for the user.
        rejects: Some rows of each reason: file, line, reason, value.
    """

    name: str
    fail: bool = True
    read: int = 0
    assigned: int = 0
    on_border: int = 0
    other: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    rejects: list[tuple[str, int, str, str]] = field(default_factory=list)

    def reject(self, path: Path, lines: Array, reason: str, values: Sequence[Any], column: str | None = None) -> None:
        """Count rows that do not count, and list the first of them.

        Args:
            path: Their file.
            lines: int64 (R,), their lines.
            reason: One of the words above.
            values: What stands there (R,).
            column: Where it stands, for messages.

        Raises:
            BadData: If they cannot be read, and that ends the build.
        """
        if len(lines) == 0:
            return
        if self.fail and reason in BAD:
            raise BadData(
                f"{EXPLAINED[reason]}, on line {int(lines[0])}", file=path, column=column,
                found=", ".join(repr(str(v)) for v in values[:3]),
                fix='mend the file, or set such rows aside: --on-bad-row quarantine (on_bad_row = "quarantine")',
            )  # fmt: skip
        room = LISTED - self.reasons[reason]
        self.reasons[reason] += len(lines)
        for line, value in zip(lines[: max(room, 0)], values[: max(room, 0)], strict=False):
            self.rejects.append((str(path), int(line), reason, "" if value is None else str(value)))

    @property
    def bad(self) -> int:
        """Rows that could not be read."""
        return sum(self.reasons[reason] for reason in BAD)

    def as_dict(self) -> dict[str, Any]:
        """The counts, for the receipt."""
        facts: dict[str, Any] = {"read": self.read, "assigned": self.assigned}
        facts |= {reason: self.reasons[reason] for reason in (*LEFT, *BAD, *ASIDE) if self.reasons[reason]}
        if self.on_border:
            facts["on_border"] = self.on_border
        if self.other:
            facts["other"] = self.other
        return facts | ({"warnings": self.warnings} if self.warnings else {})

    def saved(self) -> dict[str, Any]:
        """Everything, to be kept until the next build."""
        return {**vars(self), "reasons": dict(self.reasons)}


def tally_of(saved: Mapping[str, Any], fail: bool) -> Tally:
    """A tally that was kept."""
    facts = {**saved, "reasons": Counter(saved["reasons"]), "rejects": [tuple(row) for row in saved["rejects"]]}
    return Tally(**{**facts, "fail": fail})


def rejects_table(tallies: Sequence[Tally]) -> pa.Table:
    """The rows that are listed, of all sources."""
    rows = [(tally.name, *row) for tally in tallies for row in tally.rejects]
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    return pa.table(
        {name: pa.array(values, kind) for (name, kind), values in zip(COLUMNS.items(), columns, strict=True)}
    )
