"""The results of ``topt-deploy evaluate`` on the same city, read from its folder, as the page shows them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topt_deploy.errors import BadData
from topt_deploy.run_folder import Run
from topt_deploy.storage.os_errors import reading

from ..evaluation.protocols import PROTOCOLS
from ..evaluation.registry import MAIN
from ..evaluation.tables import FIGURES, GROUPS, Spread

FILE = "results.json"
KEPT = {"literature": 1, "plain": 3}
"""The number of a group's methods that are shown for a task, the best by MAE; all variants are shown."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method: its name, what it is, and its figures as text (MAE, RMSE, R²)."""

    method: str
    group: str
    figures: list[str]
    main: bool


@dataclass(frozen=True, kw_only=True)
class CoverageRow:
    """The coverage of one method's intervals: shares in [0, 1] with the number of regions behind them."""

    task: str
    method: str
    nominal: float
    shares: list[tuple[float, int]]


@dataclass(frozen=True, kw_only=True)
class ShownEvaluation:
    """The part of the page about an evaluation.

    Attributes:
        protocol, meaning: The protocol's name, and what was held out from what.
        repetitions: How often folds were drawn.
        version: Of topt-deploy that it was made with.
        tables: Rows by task.
        verdicts: A sentence by task, where the main method and a plain baseline ran.
        coverage: Empty where it was not measured.
        strata: The groups of regions whose shares a coverage row gives.
    """

    protocol: str
    meaning: str
    repetitions: int
    version: str
    tables: Mapping[str, list[Row]]
    verdicts: Mapping[str, str]
    coverage: list[CoverageRow]
    strata: list[str]


def read_evaluation(folder: Path, run: Run) -> ShownEvaluation:
    """Read an evaluation of the run's own city.

    Raises:
        NoInput: If the folder holds no results.
        BadData: If they are damaged, or of another city's bytes.
    """
    file = folder / FILE
    with reading(file):
        text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text)
        regions = found["regions_sha256"]
        shown = _shown(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadData(
            f"not an evaluation's results ({error!r})", file=file,
            fix="make them with topt-deploy evaluate CITY --out DIR",
        ) from error  # fmt: skip
    if regions != run.regions_sha256:
        raise BadData(
            "this evaluation is of another city, or of another version of its table", file=file,
            expected=f"regions_sha256 {run.regions_sha256}, as in the run", found=regions,
            fix="evaluate the city that the run was trained on",
        )  # fmt: skip
    return shown


def _shown(found: Mapping[str, Any]) -> ShownEvaluation:
    results = found["results"]
    measured = [result for result in results if result["coverage"]]
    sizes = list(measured[0]["coverage"]["by_size"]) if measured else []
    return ShownEvaluation(
        protocol=found["protocol"],
        meaning=PROTOCOLS[found["protocol"]].meaning,
        repetitions=len(found["seeds"]),
        version=found["versions"]["topt-deploy"],
        tables={task: _rows(results, task) for task in dict.fromkeys(result["task"] for result in results)},
        verdicts={v["task"]: v["sentence"].removeprefix(f"{v['task']}: ") for v in found["verdicts"]},
        coverage=[_coverage(result) for result in measured],
        strata=["all regions", *sizes, "worst spatial block"],
    )


def _rows(results: Sequence[Mapping[str, Any]], task: str) -> list[Row]:
    """All variants of ToPT, then the best of the others; what did not run has no row."""
    rows = []
    for group, name in GROUPS.items():
        ran = [r for r in results if (r["task"], r["group"]) == (task, group) and r["figures"]]
        if group in KEPT:
            ran = sorted(ran, key=lambda r: r["figures"]["mae"]["mean"])[: KEPT[group]]
        rows += [
            Row(
                method=r["method"],
                group=name,
                figures=[Spread(**r["figures"][figure]).text(digits) for figure, digits in FIGURES.items()],
                main=r["method"] == MAIN,
            )
            for r in ran
        ]
    return rows


def _coverage(result: Mapping[str, Any]) -> CoverageRow:
    found = result["coverage"]
    worst = min(found["by_block"], key=lambda block: block["coverage"])
    strata = [found["all"], *found["by_size"].values(), worst]
    return CoverageRow(
        task=result["task"],
        method=result["method"],
        nominal=found["nominal"],
        shares=[(stratum["coverage"], stratum["regions"]) for stratum in strata],
    )
