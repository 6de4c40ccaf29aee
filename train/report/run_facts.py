"""The facts of a report: everything is read from the run folder, and shapes and flows from the city's tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from topt_deploy.data.features import POSITION
from topt_deploy.data.parquet import read_parquet
from topt_deploy.errors import BadData, UsageError
from topt_deploy.intervals import carries, interval
from topt_deploy.model.checkpoint import load_model, load_tensors
from topt_deploy.run_folder import INPUTS_FILE, MODEL_FILE, Run

from ..metrics import Metrics, TaskReport
from ..trained_run import HELD_OUT_FILE
from .attention import Attention, read_attention
from .contributions import Contributions, read_contributions
from .geography import Place, read_place

Array = np.ndarray[Any, Any]

COVERAGE = 0.9
"""The coverage of the report's intervals."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskFacts:
    """One task over the N regions, in canonical order.

    Attributes:
        reported: float64 (N,), labels; NaN where unknown.
        held_out: float64 (N,), NaN for regions that took no part in the folds.
        predicted: float64 (N,), the held-out prediction, or the deployed model's where there is none.
        interval: Lower and upper ends around ``predicted``, each (N,); None with too few labels for them.
        scores: Held-out scores, which intervals are made of.
        report: The run's figures.
    """

    reported: Array
    held_out: Array
    predicted: Array
    interval: tuple[Array, Array] | None
    scores: list[float]
    report: TaskReport

    @property
    def residual(self) -> Array:
        """Held-out prediction less reported count (N,); NaN where either is missing."""
        return self.held_out - self.reported


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """A finished run's facts. N regions.

    Attributes:
        run: Its record.
        region_ids: The ids, sorted.
        position: float64 (N, 3), metres (:func:`topt_deploy.data.features.local_position_m`).
        tasks: By name.
        encoders: Per prompt column, the encoder that the data named.
        place: Where the regions are and what flows between them.
        attention: Of every stage-1 model; empty where the model has none.
        contributions: By task, of those with an ensemble head.
    """

    run: Run
    region_ids: tuple[str, ...]
    position: Array
    tasks: Mapping[str, TaskFacts]
    encoders: Mapping[str, str]
    place: Place
    attention: list[Attention]
    contributions: Mapping[str, Contributions]


def read_facts(run: Run) -> Facts:
    """Gather a run's facts.

    Raises:
        UsageError: If the run is not finished.
        NoInput, BadData: If one of its files is missing or damaged.
    """
    if not run.finished:
        raise UsageError("this run is not finished", file=run.path, fix="topt-deploy train --resume")
    if run.others:
        raise UsageError(
            "a report shows one city, and this run was trained on several", file=run.path,
            fix="export the run, predict a city and draw it: topt-run predict, topt-run map",
        )  # fmt: skip
    model = load_model(run.path / MODEL_FILE)
    inputs, described = load_tensors(run.path / INPUTS_FILE)
    position = inputs[POSITION].double().numpy()
    region_ids, tasks = _read_tasks(run, regions=len(position))
    return Facts(
        run=run,
        region_ids=region_ids,
        position=position,
        tasks=tasks,
        encoders=described["encoders"],
        place=read_place(run, position),
        attention=read_attention(model, inputs),
        contributions=read_contributions(model, inputs),
    )


def interval_of(prediction: Array, scores: list[float]) -> tuple[Array, Array] | None:
    """:func:`topt_deploy.intervals.interval` at the report's coverage; None where there are too few labels for it."""
    return interval(prediction, scores, COVERAGE) if carries(scores, COVERAGE) else None


def _read_tasks(run: Run, *, regions: int) -> tuple[tuple[str, ...], dict[str, TaskFacts]]:
    """The region ids, and every task in the configuration's order."""
    file = run.path / HELD_OUT_FILE
    table = read_parquet(file)
    of_task = np.array(table["task"].to_pylist())
    ids = np.array(table["region_id"].to_pylist())
    columns = {name: table[name].to_numpy().astype(np.float64) for name in ("label", "held_out", "in_sample")}
    first = next(iter(run.config.tasks))
    region_ids = tuple(ids[of_task == first].tolist())
    tasks = {}
    for task in run.config.tasks:
        rows = of_task == task
        if tuple(ids[rows].tolist()) != region_ids or len(region_ids) != regions:
            raise BadData(
                f"the rows of task {task!r} are not the run's regions", file=file, expected=f"{regions} regions",
                found=f"{int(rows.sum())} rows", fix="train again",
            )  # fmt: skip
        held_out, deployed = columns["held_out"][rows], columns["in_sample"][rows]
        predicted = np.where(np.isnan(held_out), deployed, held_out)
        scores = run.facts["scores"][task]
        tasks[task] = TaskFacts(
            reported=columns["label"][rows],
            held_out=held_out,
            predicted=predicted,
            interval=interval_of(predicted, scores),
            scores=scores,
            report=TaskReport(**{name: Metrics(**figures) for name, figures in run.facts["reports"][task].items()}),
        )
    return region_ids, tasks
