"""Predictions against what was counted later: the record that ``topt-run check`` writes and the report shows."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from types import UnionType
from typing import Any, Self, cast, get_args, get_origin, get_type_hints

from .console import decimal


@dataclass(frozen=True, kw_only=True)
class Missed:
    """A region whose count lay outside its interval; ``off`` is by how much, on the scale of ∛count."""

    region_id: str
    counted: float
    predicted: float
    lower: float
    upper: float
    off: float


@dataclass(frozen=True, kw_only=True)
class TaskCheck:
    """The check of one task's predictions.

    Attributes:
        task: Its name.
        regions: With a count and a prediction.
        mae, rmse, r2: Of these; R² is None where counts do not vary.
        promised_mae: The held-out error of training; None where no bundle tells it.
        ratio: The one over the other.
        predicted_sum, counted_sum: Of these regions.
        coverage, promised_coverage: Share of counts inside the intervals, and what that should be; None without them.
        coverage_chance: The chance of so few, if the intervals were right.
        extrapolated: Share of the predictions whose inputs lay outside the training city's range.
        missed: The regions that lay furthest outside, and how many did.
        broken: What does not hold, in sentences; empty where all does.
    """

    task: str
    regions: int
    mae: float
    rmse: float
    r2: float | None
    promised_mae: float | None
    ratio: float | None
    predicted_sum: float
    counted_sum: float
    coverage: float | None
    promised_coverage: float | None
    coverage_chance: float | None
    extrapolated: float
    missed: tuple[Missed, ...]
    missed_count: int
    broken: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Check:
    """The check of a file of predictions.

    Attributes:
        predictions, labels, bundle: The files; ``bundle`` is None where there is none to promise anything.
        tasks: By task.
        drift: By input column, the share of regions outside the training range, the largest first; those above zero.
    """

    predictions: str
    labels: str
    bundle: str | None
    tasks: tuple[TaskCheck, ...]
    drift: Mapping[str, float]

    @property
    def broken(self) -> list[str]:
        """The broken promises of all tasks."""
        return [f"{one.task}: {told}" for one in self.tasks for told in one.broken]

    def as_dict(self) -> dict[str, Any]:
        """For machines: plain values."""
        return {**asdict(self), "broken": self.broken}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read back what :meth:`as_dict` gave, from JSON that anyone may have written.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: If a value is absent, or of another type.
        """
        return cast(Self, _read(cls, found))

    def text(self) -> str:
        """For people."""
        lines = []
        for one in self.tasks:
            lines.append(
                f"{one.task}: {one.regions} regions, {one.counted_sum:,.0f} counted, {one.predicted_sum:,.0f} predicted"
            )
            promised = "" if one.promised_mae is None else f", promised {one.promised_mae:.1f} ({one.ratio:.2f} times)"
            lines.append(f"  error      MAE {one.mae:.1f}{promised}; RMSE {one.rmse:.1f}, R² {decimal(one.r2)}")
            if one.coverage is not None:
                wanted = "" if one.promised_coverage is None else f", promised {one.promised_coverage:.0%}"
                lines.append(f"  intervals  hold {one.coverage:.0%} of the counts{wanted}")
            if one.missed:
                named = ", ".join(
                    f"{m.region_id} ({m.counted:g} in {m.lower:.1f} to {m.upper:.1f})" for m in one.missed[:3]
                )
                lines.append(f"  outside    {one.missed_count} regions, the furthest {named}")
            if one.extrapolated:
                lines.append(f"  inputs     {one.extrapolated:.0%} of the regions beyond the training city's range")
            lines += [f"  broken     {told}" for told in one.broken]
        if self.drift:
            named = ", ".join(f"{column} ({share:.0%})" for column, share in list(self.drift.items())[:5])
            lines.append(f"inputs now beyond the training city's range: {named}")
        lines.append("what training promised does not hold" if self.broken else "what training promised holds")
        return "\n".join(lines)

    def metrics(self) -> str:
        """For the textfile collector of Prometheus' node_exporter."""
        told = (
            ("mae", "Mean absolute error.", lambda one: one.mae),
            ("promised_mae", "Mean absolute error on training's held-out folds.", lambda one: one.promised_mae),
            ("coverage", "Share of counts inside the intervals.", lambda one: one.coverage),
            ("promised_coverage", "What that should be.", lambda one: one.promised_coverage),
            ("regions", "Regions with a count and a prediction.", lambda one: one.regions),
            ("extrapolated", "Share of regions beyond the training range.", lambda one: one.extrapolated),
            ("broken", "1 where what training promised does not hold.", lambda one: int(bool(one.broken))),
        )
        lines = []
        for name, meaning, value in told:
            found = {one.task: value(one) for one in self.tasks if value(one) is not None}
            if found:
                lines += [f"# HELP topt_check_{name} {meaning}", f"# TYPE topt_check_{name} gauge"]
                lines += [f"topt_check_{name}{{task={json.dumps(task)}}} {n:.15g}" for task, n in found.items()]
        return "\n".join(lines) + "\n"


def _read(kind: Any, found: Any) -> Any:
    """A value of a type that the records above have, from plain ones."""
    if isinstance(kind, type) and is_dataclass(kind):
        return kind(**{name: _read(hint, found[name]) for name, hint in get_type_hints(kind).items()})
    if get_origin(kind) is UnionType:
        return None if found is None else _read(get_args(kind)[0], found)
    if get_origin(kind) is tuple:
        return tuple(_read(get_args(kind)[0], one) for one in found)
    if get_origin(kind) is Mapping:
        return {str(name): float(value) for name, value in found.items()}
    return kind(found)
