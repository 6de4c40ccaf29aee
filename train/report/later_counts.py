"""The result of ``topt-run check --out``: predictions of this run's model against what was counted later."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topt_deploy.errors import BadData
from topt_deploy.run_folder import Run
from topt_deploy.storage.os_errors import reading

MADE_BY = "make it with topt-run check PREDICTIONS --labels TABLE --out FILE"
DRIFTED = 5
"""Columns beyond the training range that are named, the most of them first."""


@dataclass(frozen=True, kw_only=True)
class MissedRegion:
    """A region whose count lay outside its interval."""

    region_id: str
    counted: float
    lower: float
    upper: float


@dataclass(frozen=True, kw_only=True)
class CheckedTask:
    """One task: its figures, as :class:`topt_deploy.runtime.check_predictions.TaskCheck` has them.

    Attributes:
        task: Its name.
        regions: With a count and a prediction.
        counted, predicted: Their sums.
        mae, promised: The error, and the held-out error of training.
        ratio: The one over the other; None if no error was promised.
        coverage, promised_coverage: The share of counts inside the intervals, and what that should be; None without.
        missed, missed_count: The regions furthest outside, and how many were.
        broken: What does not hold, in sentences; empty where all does.
    """

    task: str
    regions: int
    counted: float
    predicted: float
    mae: float
    promised: float
    ratio: float | None
    coverage: float | None
    promised_coverage: float | None
    missed: tuple[MissedRegion, ...]
    missed_count: int
    broken: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LaterCounts:
    """The part of the page about later counts.

    Attributes:
        labels: The name of the table of counts.
        tasks: By task.
        drift: Input columns with the share of regions beyond the training range, the largest first.
    """

    labels: str
    tasks: tuple[CheckedTask, ...]
    drift: tuple[tuple[str, float], ...]


def read_later_counts(file: Path, run: Run) -> LaterCounts:
    """Read a check of the run's own model: one that was promised the run's held-out errors, to the last digit.

    Raises:
        NoInput: If the file is missing.
        BadData: If it is no check's result, or one of another model.
    """
    with reading(file):
        text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text)
        promised = {one["task"]: one["promised_mae"] for one in found["tasks"]}
        own = {task: report["held_out"]["mae"] for task, report in run.facts["reports"].items()}
        is_own = bool(promised) and all(
            error is not None and task in own and math.isclose(error, own[task], rel_tol=1e-12)
            for task, error in promised.items()
        )
        shown = _shown(found) if is_own else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(f"not a check's result ({error!r})", file=file, fix=MADE_BY) from error
    if shown is None:
        raise BadData(
            "this check is of another model, or of predictions whose bundle was not there", file=file,
            expected="the held-out errors of this run: " + ", ".join(f"{task} {mae:.6g}" for task, mae in own.items()),
            found=", ".join(f"{task} {mae}" for task, mae in promised.items()) or "no task",
            fix="name the run that the bundle was exported from, and its bundle: topt-run check --bundle",
        )  # fmt: skip
    return shown


def _shown(found: Mapping[str, Any]) -> LaterCounts:
    return LaterCounts(
        labels=Path(found["labels"]).name,
        tasks=tuple(_task(one) for one in found["tasks"]),
        drift=tuple((str(column), float(share)) for column, share in list(found["drift"].items())[:DRIFTED]),
    )


def _task(found: Mapping[str, Any]) -> CheckedTask:
    def maybe(key: str) -> float | None:
        return None if found[key] is None else float(found[key])

    return CheckedTask(
        task=str(found["task"]),
        regions=int(found["regions"]),
        counted=float(found["counted_sum"]),
        predicted=float(found["predicted_sum"]),
        mae=float(found["mae"]),
        promised=float(found["promised_mae"]),
        ratio=maybe("ratio"),
        coverage=maybe("coverage"),
        promised_coverage=maybe("promised_coverage"),
        missed=tuple(
            MissedRegion(
                region_id=str(one["region_id"]), counted=float(one["counted"]), lower=float(one["lower"]),
                upper=float(one["upper"]),
            )
            for one in found["missed"]
        ),
        missed_count=int(found["missed_count"]),
        broken=tuple(str(told) for told in found["broken"]),
    )  # fmt: skip
