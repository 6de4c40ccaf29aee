"""The facts of a report: everything is read from the run folder, and shapes and flows from the city's tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topt_deploy.data.features import POSITION
from topt_deploy.data.parquet import read_parquet
from topt_deploy.errors import BadData, UsageError
from topt_deploy.model.checkpoint import load_model, load_tensors
from topt_deploy.model.topt import TopT
from topt_deploy.run_folder import INPUTS_FILE, MODEL_FILE, Run

from ..fused import ensembles
from ..metrics import Metrics, TaskReport
from ..trained_run import HELD_OUT_FILE
from .attention import Attention, read_attention
from .contributions import Contributions, read_contributions
from .geography import Place, read_place
from .intervals import Intervals, fold_predictions, read_intervals

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskFacts:
    """One task over the N regions, in canonical order.

    Attributes:
        reported: float64 (N,), labels; NaN where unknown.
        held_out: float64 (N,), NaN for regions that took no part in the folds.
        predicted: float64 (N,), the held-out prediction, or the deployed model's where there is none.
        intervals: Around ``predicted``; None with too few labels for them.
        scores: How many held-out scores there are to make intervals of.
        report: The run's figures.
        coverage: How often intervals hold, of all held-out regions and of the thirds by size; empty where unknown.
    """

    reported: Array
    held_out: Array
    predicted: Array
    intervals: Intervals | None
    scores: int
    report: TaskReport
    coverage: Mapping[str, float]

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
        far: Ids of the regions that are too unlike the labelled ones to be trusted.
        encoders: Per prompt column, the encoder that the data named.
        place: Where the regions are and what flows between them.
        attention: Of every stage-1 model; empty where the model has none.
        contributions: By task, of those with an ensemble head.
    """

    run: Run
    region_ids: tuple[str, ...]
    position: Array
    tasks: Mapping[str, TaskFacts]
    far: frozenset[str]
    encoders: Mapping[str, str]
    place: Place
    attention: list[Attention]
    contributions: Mapping[str, Contributions]


def read_facts(run: Run) -> Facts:
    """Gather a run's facts.

    Raises:
        UsageError: If the run is not finished.
        BadConfig: If an earlier version trained it.
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
    region_ids, tasks = _read_tasks(run, model, inputs)
    return Facts(
        run=run,
        region_ids=region_ids,
        position=position,
        tasks=tasks,
        far=frozenset(run.facts.get("far", ())),
        encoders=described["encoders"],
        place=read_place(run, position),
        attention=read_attention(model, inputs),
        contributions=read_contributions(model, inputs),
    )


def _read_tasks(run: Run, model: TopT, inputs: Mapping[str, Tensor]) -> tuple[tuple[str, ...], dict[str, TaskFacts]]:
    """The region ids, and every task in the configuration's order."""
    file, regions = run.path / HELD_OUT_FILE, len(inputs[POSITION])
    table = read_parquet(file)
    of_task = np.array(table["task"].to_pylist())
    ids = np.array(table["region_id"].to_pylist())
    columns = {name: table[name].to_numpy().astype(np.float64) for name in ("label", "held_out", "in_sample")}
    first = next(iter(run.config.tasks))
    region_ids = tuple(ids[of_task == first].tolist())
    own: dict[str, dict[str, Array]] = {}
    for task in run.config.tasks:
        rows = of_task == task
        if tuple(ids[rows].tolist()) != region_ids or len(region_ids) != regions:
            raise BadData(
                f"the rows of task {task!r} are not the run's regions", file=file, expected=f"{regions} regions",
                found=f"{int(rows.sum())} rows", fix="train again",
            )  # fmt: skip
        own[task] = {name: column[rows] for name, column in columns.items()}
    held = {task: ~np.isnan(found["held_out"]) for task, found in own.items()}
    folds = fold_predictions(model, inputs)
    leverage = np.zeros(regions)
    if model.leverage is not None:
        fitted = np.any([held[task] for task in ensembles(run.config)], axis=0)
        leverage = model.leverage.left_out(inputs, torch.from_numpy(fitted))
    tasks = {}
    for task, found in own.items():
        predicted = np.where(held[task], found["held_out"], found["in_sample"])
        tasks[task] = TaskFacts(
            reported=found["label"],
            held_out=found["held_out"],
            predicted=predicted,
            intervals=read_intervals(run, task, predicted, held[task], folds.get(task), leverage),
            scores=len(run.facts["scores"][task]),
            report=TaskReport(**{name: Metrics(**figures) for name, figures in run.facts["reports"][task].items()}),
            coverage=run.facts.get("coverage", {}).get(task, {}),
        )
    return region_ids, tasks
