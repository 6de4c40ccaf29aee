"""Is the model still right? What was predicted against what was counted since, and against what training promised.

A model breaks its promise where its error is larger than the held-out error of training by more than is tolerated, or
where its intervals hold so few counts that this would be rare chance (one in a hundred) if they were right.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.bundle.manifest import Bundle, open_bundle
from topt_deploy.data.columns import REGION_ID, TableReader, floats, strings
from topt_deploy.errors import BadData, BadRows, NoInput
from topt_deploy.later_counts import Check, Missed, TaskCheck

from .read_predictions import Predicted, PredictionFile, read_predictions

Array = np.ndarray[Any, Any]

TOLERANCE = 1.25
"""How many times the promised error may be."""
RARE = 0.01
"""The chance below which too few hits are no chance."""
SHOWN = 10


def check_predictions(
    predictions: Path, labels: Path, *, bundle: Path | None = None, tolerance: float = TOLERANCE
) -> Check:
    """Compare predictions with counts that came since.

    Args:
        predictions: What ``topt-run predict`` wrote, with its receipt beside it.
        labels: A table with ``region_id`` and a column of counts for each task, such as the next regions.parquet.
        bundle: The bundle that predicted; by default model.topt beside the predictions, or the receipt's.
        tolerance: How many times the promised error may be.

    Raises:
        NoInput, BadData, BadBundle: Naming the file and what it lacks.
    """
    found = read_predictions(predictions)
    opened = _bundle(found, bundle)
    source = TableReader(labels, BadRows.REGIONS)
    if not source.has(REGION_ID):
        raise BadData("the region ids are absent", file=labels, column=REGION_ID, found=", ".join(source.everything))
    ids = np.array([str(value) for value in strings(source, REGION_ID, "write the ids as strings")])
    if len(np.unique(ids)) < len(ids):
        raise BadData("region ids occur more than once", file=labels, column=REGION_ID)
    tasks = [task for task in found.tasks if source.has(task)]
    if not tasks:
        raise BadData(
            "no task of the predictions has counts here", file=labels, expected=", ".join(found.tasks),
            found=", ".join(source.everything),
        )  # fmt: skip
    order = np.argsort(ids)
    place = np.minimum(np.searchsorted(ids[order], found.region_id), len(ids) - 1)
    known = ids[order][place] == found.region_id
    if not known.any():
        raise BadData(
            "no region of the predictions is here", file=labels, column=REGION_ID,
            expected=f"such as {found.region_id[0]!s}", found=f"such as {ids[0]!s}",
        )  # fmt: skip
    counts = {t: np.where(known, floats(source, ids, t, nulls=True)[order][place], np.nan) for t in tasks}
    return Check(
        predictions=str(predictions),
        labels=str(labels),
        bundle=None if opened is None else str(opened.path),
        tasks=tuple(_task(task, found, counts[task], opened, tolerance) for task in tasks),
        drift={} if opened is None else _drift(source, ids, opened),
    )


def _bundle(found: PredictionFile, given: Path | None) -> Bundle | None:
    """The bundle that predicted; one that is named must be there."""
    if given is not None:
        return open_bundle(given)
    recorded = found.receipt.get("bundle", {})
    named = [found.path.with_name("model.topt")]
    named += [Path(recorded["file"])] if isinstance(recorded, dict) and isinstance(recorded.get("file"), str) else []
    for path in named:
        try:
            return open_bundle(path)
        except NoInput:
            continue
    return None


def _task(task: str, found: PredictionFile, counted: Array, bundle: Bundle | None, tolerance: float) -> TaskCheck:
    predicted = found.tasks[task]
    both = ~np.isnan(counted) & ~np.isnan(predicted.value)
    if not both.any():
        raise BadData("no region has a count and a prediction", file=found.path, column=task)
    y, value = counted[both], predicted.value[both]
    error = value - y
    mae, spread = float(np.abs(error).mean()), float(((y - y.mean()) ** 2).sum())
    promised_mae = _promised_mae(task, bundle)
    ratio = None if not promised_mae else mae / promised_mae
    ids, inside = found.region_id[both], _inside(predicted, both, y)
    held = ~np.isnan(inside)
    coverage = float(inside[held].mean()) if held.any() else None
    wanted = _promised_coverage(task, found)
    chance = None
    if wanted is not None and held.any():
        chance = binomial_below(int(inside[held].sum()), int(held.sum()), wanted)
    broken = []
    if ratio is not None and ratio > tolerance:
        broken.append(f"the error is {ratio:.2f} times what was promised, and {tolerance:g} times is tolerated")
    if chance is not None and coverage is not None and chance < RARE:
        broken.append(
            f"the intervals hold {coverage:.0%} of the counts where {wanted:.0%} were promised, by chance once in"
            f" {1 / max(chance, 1e-9):,.0f} times"
        )
    missed = _missed(ids, y, predicted, both, inside)
    return TaskCheck(
        task=task,
        regions=int(both.sum()),
        mae=mae,
        rmse=float(np.sqrt((error**2).mean())),
        r2=None if spread == 0 else float(1 - (error**2).sum() / spread),
        promised_mae=promised_mae,
        ratio=ratio,
        predicted_sum=float(value.sum()),
        counted_sum=float(y.sum()),
        coverage=coverage,
        promised_coverage=wanted,
        coverage_chance=chance,
        extrapolated=float((predicted.status == "extrapolated").mean()),
        missed=tuple(missed[:SHOWN]),
        missed_count=len(missed),
        broken=tuple(broken),
    )


def _inside(predicted: Predicted, both: Array, counted: Array) -> Array:
    """1 where a count lies inside its interval, 0 where outside, NaN where there is none. (K,)"""
    lower, upper = predicted.lower[both], predicted.upper[both]
    return np.where(np.isnan(lower) | np.isnan(upper), np.nan, (lower <= counted) & (counted <= upper))


def _missed(ids: Array, counted: Array, predicted: Predicted, both: Array, inside: Array) -> list[Missed]:
    lower, upper, value = predicted.lower[both], predicted.upper[both], predicted.value[both]
    off = np.maximum(np.cbrt(counted) - np.cbrt(upper), np.cbrt(np.maximum(lower, 0)) - np.cbrt(counted))
    rows = np.flatnonzero(inside == 0)
    rows = rows[np.lexsort((ids[rows], -off[rows]))]
    return [
        Missed(
            region_id=str(ids[i]), counted=float(counted[i]), predicted=float(value[i]), lower=float(lower[i]),
            upper=float(upper[i]), off=float(off[i]),
        )
        for i in rows
    ]  # fmt: skip


def _promised_mae(task: str, bundle: Bundle | None) -> float | None:
    if bundle is None or task not in bundle.manifest.tasks:
        return None
    return float(bundle.manifest.tasks[task]["report"]["held_out"]["mae"])


def _promised_coverage(task: str, found: PredictionFile) -> float | None:
    options = found.receipt.get("options", {})
    coverage = options.get("coverage") if isinstance(options, dict) else None
    value = coverage.get(task) if isinstance(coverage, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _drift(source: TableReader, ids: Array, bundle: Bundle) -> dict[str, float]:
    """Of the inputs that the labels' table has too: the share of regions outside the training range."""
    shares = {}
    for column, (low, high) in bundle.manifest.ranges.items():
        if source.has(column):
            values = floats(source, ids, column, nulls=True)
            outside = (values < low) | (values > high)
            shares[column] = float(outside.mean())
    return dict(sorted(((c, s) for c, s in shares.items() if s > 0), key=lambda item: (-item[1], item[0])))


def binomial_below(hits: int, trials: int, chance: float) -> float:
    """The probability of ``hits`` or fewer in ``trials`` independent ones of this chance."""
    if hits >= trials or chance <= 0:
        return 1.0
    if chance >= 1:
        return 0.0
    terms = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(chance) + (trials - k) * math.log1p(-chance)
        for k in range(hits + 1)
    ]  # fmt: skip
    return min(1.0, _summed(terms))


def _summed(logs: Sequence[float]) -> float:
    high = max(logs)
    return math.exp(high) * math.fsum(math.exp(log - high) for log in logs)
