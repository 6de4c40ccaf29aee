"""The page: what is shown of a run, in words and figures, rendered to one HTML file that needs no other."""

from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from topt_deploy.config.settings import DEFAULT_PRESET
from topt_deploy.console import decimal
from topt_deploy.drawing.scales import BLUES, PURPLES, diverging, number, sequential
from topt_deploy.intended_use import INTENDED_USE
from topt_deploy.intervals import COVERAGE
from topt_deploy.later_counts import Check
from topt_deploy.run_folder import Run
from topt_deploy.storage.os_errors import check_place
from topt_deploy.storage.text_files import write_text

from ..cli.train import verdict
from .evaluation import ShownEvaluation, read_evaluation
from .explanations import MadeOf, attention_section, exchanged, made_of
from .figures import SCATTER_SIZE, Choropleth, Scatter, choropleth, scatter
from .later_counts import read_later_counts
from .moran import NEIGHBOURS, PERMUTATIONS, Moran, meaning, morans_i, nearest
from .plain_words import percent, sentence_case, title_of, view_name
from .run_facts import Facts, TaskFacts, read_facts

TEMPLATES = Path(__file__).parent / "templates"
COVERAGE_TEXT = percent(COVERAGE)
REGIONS_SHOWN = 20
"""Of those not to be trusted, at the top of the page."""


@dataclass(frozen=True, kw_only=True)
class TaskSection:
    """The part of the page about one task.

    Attributes:
        title: The task's name as words.
        facts: The task's facts.
        verdict: One sentence on whether the model earns its keep.
        mean_reported: The average reported count, which an error is to be held against.
        without_report: How many regions have no reported count.
        left_out: How many regions have one, and took no part in training.
        predicted, width, residual: Maps; ``width`` is None with too few labels for intervals.
        scatter: Reported against held out.
        moran, moran_meaning: Spatial pattern of the residuals, and what it means.
        made_of: The parts of its predictions; None where the head is not an ensemble.
    """

    title: str
    facts: TaskFacts
    verdict: str
    mean_reported: float
    without_report: int
    left_out: int
    predicted: Choropleth
    width: Choropleth | None
    residual: Choropleth
    scatter: Scatter
    moran: Moran | None
    moran_meaning: str
    made_of: MadeOf | None


def write_report(run: Run, out: Path, evaluation: Path | None = None, check: Path | None = None) -> int:
    """Write a run's report to ``out`` atomically; the same run gives the same bytes.

    Args:
        run: The run.
        out: The page.
        evaluation: Folder of results of the same city (``topt-deploy evaluate``), to be shown as well.
        check: What ``topt-run check --out`` wrote of this run's model, to be shown as well.

    Returns:
        The page's size in bytes.

    Raises:
        UsageError: If the run is not finished.
        BadConfig: If an earlier version trained the run.
        CannotCreate: If ``out`` cannot be written.
        NoInput, BadData: If one of the run's files is missing or damaged, the evaluation is not of its
            city, or the check not of its model.
    """
    check_place(out)
    compared = None if evaluation is None else read_evaluation(evaluation, run)
    later = None if check is None else read_later_counts(check, run)
    page = render(read_facts(run), compared, later)
    write_text(out, page)
    return len(page.encode())


def render(facts: Facts, evaluation: ShownEvaluation | None = None, later: Check | None = None) -> str:
    """The page of a run, as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number,
        decimal=_decimal,
        count_or_dash=_count_or_dash,
        part=_part,
        percent=percent,
        title_of=title_of,
        view_name=view_name,
        sentence_case=sentence_case,
    )
    environment.globals.update(
        coverage_text=COVERAGE_TEXT,
        regions_shown=REGIONS_SHOWN,
        neighbours=NEIGHBOURS,
        permutations=PERMUTATIONS,
        scatter_size=SCATTER_SIZE,
        intended_use=INTENDED_USE,
        default_preset=DEFAULT_PRESET,
    )
    return environment.get_template("page.html").render(
        facts=facts,
        run=facts.run,
        tasks=[task_section(name, task, facts) for name, task in facts.tasks.items()],
        exchanged=exchanged(facts),
        attention=[attention_section(found, facts) for found in facts.attention],
        evaluation=evaluation,
        later=later,
    )


def task_section(name: str, task: TaskFacts, facts: Facts) -> TaskSection:
    """Figures and sentences of one task."""
    title, tips, unreported = title_of(name), _tips(task, facts), np.isnan(task.reported)
    held = ~np.isnan(task.residual)
    moran = morans_i(task.residual[held], nearest(facts.position[held]))
    sentence = verdict(task.report).replace(" %", "\N{NO-BREAK SPACE}%")
    ends = task.intervals
    width = None if ends is None else ends.upper - ends.lower
    blues, purples = partial(sequential, colours=BLUES), partial(sequential, colours=PURPLES)
    shared: dict[str, Any] = {"unit": "counts", "tips": tips}
    return TaskSection(
        title=title,
        facts=task,
        verdict=sentence_case(sentence),
        mean_reported=float(task.reported[held].mean()),
        without_report=int(unreported.sum()),
        left_out=int((~unreported & ~held).sum()),
        predicted=choropleth(task.predicted, blues, label=f"{title}, predicted", hatched=unreported, **shared),
        width=None
        if width is None
        else choropleth(width, purples, label=f"{title}, width of the interval", hatched=unreported, **shared),
        residual=choropleth(task.residual, diverging, label=f"{title}, residual", **shared),
        scatter=scatter(
            task.reported, task.held_out, tips=tips, interval=None if ends is None else ends.around, label=title
        ),
        moran=moran,
        moran_meaning=meaning(moran),
        made_of=made_of(name, facts),
    )


def _decimal(value: float | None, digits: int = 3) -> str:
    return decimal(value, digits).replace("-", "−")


def _count_or_dash(value: float, *, signed: bool = False) -> str:
    return "–" if np.isnan(value) else number(value, signed=signed)


def _part(value: float, *, signed: bool = False) -> str:
    """A contribution: two decimals, for small ones are to be compared with each other, and a count from ten on."""
    if abs(value) >= 9.95:
        return number(value, signed=signed)
    return f"{value:+.2f}".replace("-", "−") if signed else f"{value:.2f}"


def _tips(task: TaskFacts, facts: Facts) -> list[str]:
    """The text that is shown when hovering over a region, in lines."""
    return ["\n".join(_tip(task, i, region_id, facts.far)) for i, region_id in enumerate(facts.region_ids)]


def _tip(task: TaskFacts, i: int, region_id: str, far: Container[str]) -> list[str]:
    reported, held_out, residual = task.reported[i], task.held_out[i], task.residual[i]
    lines = [region_id, "no reported count" if np.isnan(reported) else f"reported {number(reported)}"]
    by = "predicted, by the deployed model" if np.isnan(held_out) else "predicted, held out"
    lines += [f"{by}: {number(task.predicted[i])}"]
    if (ends := task.intervals) is not None:
        lines += [f"{COVERAGE_TEXT} interval: {number(ends.lower[i])} to {number(ends.upper[i])}"]
    if not np.isnan(residual):
        lines += [f"residual {number(residual, signed=True)}"]
    return [*lines, "unlike the labelled regions: do not trust"] if region_id in far else lines
