"""The report of a build: regions, views, tasks, and what became of every source's rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tally import Tally


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """A summary of what was built.

    Attributes:
        out: The city's folder.
        city: Its name.
        regions: How many it has.
        views, tasks: By name, how many categories, and the sum of all counts.
        flows: How many pairs, and the sum of trips; None without flows.
        tallies: What became of every source's rows.
        taken: Sources that had not changed, and were not read again.
        facts: What was read, repaired and dissolved of the regions.
        warnings: What the user should know, all sources together.
        seconds: How long it took.
    """

    out: Path
    city: str
    regions: int
    views: Mapping[str, tuple[int, float]]
    tasks: Mapping[str, float]
    flows: tuple[int, float] | None
    tallies: Mapping[str, Tally]
    taken: tuple[str, ...]
    facts: Mapping[str, int]
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def set_aside(self) -> int:
        """Rows that could not be read."""
        return sum(tally.bad for tally in self.tallies.values())

    @property
    def settings(self) -> str:
        """Settings for training on it, as ``topt.toml`` has them."""
        lines = [
            "# Written by topt-deploy build, which leaves it as it is from now on.",
            f"views = {json.dumps(list(self.views))}",
            *([] if self.flows else ["mobility = false"]),
            "",
            "[prompt4re]",
            "enabled = false # until prompts are encoded: topt-deploy encode",
            "",
            *(f"[tasks.{task}]" for task in self.tasks),
        ]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        lines = [f"{self.city}: {self.regions} regions"]
        mended = ", ".join(
            f"{n:,} {what.replace('_', ' ')}" for what, n in self.facts.items() if n and what != "regions"
        )
        lines.append(f"  {'regions':<22} {mended}")
        for name, tally in self.tallies.items():
            rest = {key: n for key, n in tally.as_dict().items() if key not in ("read", "assigned", "warnings")}
            left = "".join(f", {n:,} {key.replace('_', ' ')}" for key, n in rest.items())
            same = ", as before" if name in self.taken else ""
            lines.append(f"  {name:<22} {tally.read:,} read, {tally.assigned:,} assigned{left}{same}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines.append(
            f"next: cd {self.out} && topt-deploy train" if self.tasks else "next: add labels, and train on them"
        )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same for machines."""
        return {
            "out": str(self.out), "city": self.city, "regions": self.regions, "views": self.views, "tasks": self.tasks,
            "flows": self.flows, "sources": {name: tally.as_dict() for name, tally in self.tallies.items()},
            "taken": list(self.taken), "warnings": self.warnings, "set_aside": self.set_aside, "seconds": self.seconds,
        }  # fmt: skip
