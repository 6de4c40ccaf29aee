"""A training run: a folder that holds its settings, its progress and, at the end, the fused model."""

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from topt_deploy import __version__
from topt_deploy.config.settings import Config
from topt_deploy.data.city import City, Schema
from topt_deploy.data.columns import file_of
from topt_deploy.data.features import features, range_columns
from topt_deploy.data.parquet import write_parquet
from topt_deploy.errors import BadConfig, BadData, UsageError
from topt_deploy.intervals import COVERAGE, SizeTrend, coverage_by_size, fold_scores, nonconformity_scores
from topt_deploy.model.checkpoint import save_model, save_tensors
from topt_deploy.model.leverage import Leverage
from topt_deploy.model.srel import Srel
from topt_deploy.model.topt import all_features
from topt_deploy.run_folder import INPUTS_FILE, MODEL_FILE, Run, TrainedOn
from topt_deploy.storage.atomic import sweep_folder
from topt_deploy.storage.hashed_file import Held
from topt_deploy.storage.os_errors import writing

from .boosted_trees import boosted_trees
from .cities import CityFiles, read_cities
from .ensemble import train_ensemble
from .fused import Far, ensembles, fit_leverage, fused
from .loop import TrainingDevice, Workplace
from .metrics import TaskReport, metrics
from .progress import Reporter
from .prompt4re import HeadResult, by_city, fold_of, train_head, training_sets
from .srel import embed, train_embedding
from .trained_run import HELD_OUT_FILE

Array = np.ndarray[Any, Any]

METRICS_FILE = "metrics.jsonl"
PROTOCOL = (
    "held out = every labelled region predicted by the fold that did not train on it (KFold, shuffled, fixed seed),"
    " last epoch, nothing selected; stage 1 and the prompt basis see the features of all regions and no label"
)


PROTOCOL_CITIES = (
    "held out = every labelled region predicted by the fit that saw no label of its city, last epoch, nothing selected;"
    " stage 1 and the prompt basis see the features of all cities and no label"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskOutcome:
    """A trained head's predictions for its own city.

    Attributes:
        fold: int64 (N,), the fold a region was held out in; -1 for none.
        held_out: float64 (N,): each labelled region as predicted by the fold that did not train on it, at the last
            epoch; NaN for regions that took no part.
        in_sample: float64 (N,): the deployed head on every region.
    """

    fold: Array
    held_out: Array
    in_sample: Array

    @classmethod
    def of(cls, result: HeadResult, fold: Array) -> "TaskOutcome":
        """From a head trained on :func:`topt_deploy.train.prompt4re.training_sets`."""
        own = result.predicted[fold, np.arange(len(fold))]  # fold -1 reads the last row, and is masked
        return cls(fold=fold, held_out=np.where(fold >= 0, own, np.nan), in_sample=result.predicted[-1])


def start_run(
    out: Path,
    city_dir: Path,
    config: Config,
    *,
    regions: Path | Held,
    mobility: Path | Held | None,
    others: Sequence[CityFiles] = (),
) -> Run:
    """Create a run folder and record what the run depends on.

    Args:
        out: The run folder.
        city_dir: The city's folder.
        config: Its settings.
        regions, mobility: The city's tables. Held files are hashed once, here and in :func:`train_run`.
        others: The further cities of a run on several.

    Raises:
        UsageError: If there is something in it already, other than what a process left that was killed here.
    """
    there = UsageError("the run folder exists", file=out, fix="name another with --out, or go on with --resume")
    with writing(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # and no folder
            raise there from None
        sweep_folder(out)
        if any(out.iterdir()):
            raise there
    run = Run(
        path=out,
        config=config,
        city_dir=city_dir.resolve(),
        regions_sha256=held(regions).sha256,
        mobility_sha256=None if mobility is None else held(mobility).sha256,
        finished=False,
        others=tuple(
            TrainedOn(
                city_dir=files.folder.resolve(),
                regions_sha256=own.sha256,
                mobility_sha256=None if flows is None else flows.sha256,
            )
            for files in others
            for own, flows in [_held(files)]
        ),
        facts={"started": datetime.now().astimezone().isoformat(timespec="seconds")},
    )
    run.save()
    return run


def train_run(
    run: Run,
    *,
    regions: Path | Held,
    mobility: Path | Held | None,
    engine: TrainingDevice,
    reporter: Reporter,
    others: Sequence[CityFiles] = (),
) -> dict[str, TaskReport]:
    """Train both stages of every task, going on from what the run folder already holds.

    Args:
        run: A started run.
        regions, mobility: The city's tables; their bytes must be those the run was started with.
        others: The further cities, in the order in which the run was started with them.

    Returns:
        A report per task, also in the run's files.

    Raises:
        BadConfig: If the input has changed since the run was started.
    """
    began = time.monotonic()
    config = run.config
    first = CityFiles(folder=run.city_dir, regions=regions, mobility=mobility)
    city, schema = _read(run, [first, *others], reporter)
    folds = _folds(city, config, None if others else file_of(first.regions))
    # Copied into PyTorch's own memory: MKL's sums depend on how an array is aligned, and numpy's alignment varies.
    inputs = {name: torch.tensor(a, device=engine.device) for name, a in features(city).items()}
    place = _workplace(run, engine, reporter)
    srels: dict[str, Srel] = {}
    embeddings: dict[str, Tensor] = {}
    for name in config.embeddings():
        srels[name] = train_embedding(city, inputs, schema, config, name, place)
        embeddings[name] = embed(srels[name], inputs, city)
    results: dict[str, HeadResult] = {}
    outcomes: dict[str, TaskOutcome] = {}
    for task in config.tasks:
        labels = training_sets(city.labels[task], folds[task])
        results[task] = _train_task(city, inputs, embeddings, schema, config, task, labels, place)
        outcomes[task] = TaskOutcome.of(results[task], folds[task])
    tasks = ensembles(config)
    leverage, far = fit_leverage(schema, inputs, [outcomes[task].fold >= 0 for task in tasks])
    made_with = {what: dict(getattr(city, what)) for what in ("encoders", "templates", "precisions")}
    save_tensors(run.path / INPUTS_FILE, {name: x[city.blocks[0]] for name, x in inputs.items()}, made_with)
    save_model(run.path / MODEL_FILE, fused(config, schema, srels, results, leverage))
    _write_held_out(run.path / HELD_OUT_FILE, city, outcomes)
    reporter.say("plain baseline: boosted trees under the same folds")
    plain = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
    trees = {task: boosted_trees(plain, city.labels[task], outcomes[task].fold) for task in config.tasks}
    reports = {task: report(city.labels[task], outcomes[task], trees[task]) for task in config.tasks}
    facts = _facts(city, schema, tasks, results, outcomes, reports, leverage, far)
    facts["cities"] = _by_city(city, outcomes, trees)
    run.finish(facts | _made_by(engine, time.monotonic() - began))
    return reports


def held(table: Path | Held) -> Held:
    """A table's file, read once where it is small and hashed once."""
    return table if isinstance(table, Held) else Held(table)


def _held(files: CityFiles) -> tuple[Held, Held | None]:
    return held(files.regions), None if files.mobility is None else held(files.mobility)


def _read(run: Run, cities: Sequence[CityFiles], reporter: Reporter) -> tuple[City, Schema]:
    """The city or cities, whose files must be those that the run was started with."""
    config, kept = run.config, []
    for files, recorded in zip(cities, run.trained_on, strict=True):
        regions, mobility = _held(files)
        for file, sha256 in ((regions, recorded.regions_sha256), (mobility, recorded.mobility_sha256)):
            if file is not None and file.sha256 != sha256:
                raise BadConfig("has changed since this run was started", file=file.path, fix="start a new run")
        kept.append(CityFiles(folder=files.folder, regions=regions, mobility=mobility))
    prompts = config.prompt_columns()
    return read_cities(kept, views=config.views, prompts=prompts, labels=config.tasks, say=reporter.say)


def _folds(city: City, config: Config, file: Path | None) -> dict[str, Array]:
    """The fold that each region is held out in, int64 (N,) per task: all are known before anything is trained."""
    folds = {}
    for task, settings in config.tasks.items():
        head, drop_zeros = settings.prompt4re, settings.target.drop_zeros
        try:
            folds[task] = fold_of(
                city.labels[task], folds=head.folds, seed=head.fold_seed, drop_zeros=drop_zeros, part=city.part
            )
        except BadData as error:
            fix = "label more regions, or leave this task out: name the others with --task"
            raise BadData(
                error.message, file=file, column=task, expected=error.expected, found=error.found, fix=fix
            ) from None
    return folds


def _workplace(run: Run, engine: TrainingDevice, reporter: Reporter) -> Workplace:
    """The folder of checkpoints; what killed processes left there is removed."""
    config = run.config
    tables = "".join(f"{own.regions_sha256}{own.mobility_sha256}" for own in run.trained_on)
    identity = hashlib.sha256(f"{tables}{config.views}{config.mobility}{engine.precision}".encode()).hexdigest()
    checkpoints = run.path / "checkpoints"
    with writing(checkpoints):
        checkpoints.mkdir(exist_ok=True)
    for folder in (run.path, checkpoints):
        sweep_folder(folder)
    return Workplace(engine=engine, reporter=reporter, identity=identity, checkpoints=checkpoints)


def _train_task(
    city: City,
    inputs: dict[str, Tensor],
    embeddings: Mapping[str, Tensor],
    schema: Schema,
    config: Config,
    task: str,
    labels: Array,
    place: Workplace,
) -> HeadResult:
    """A task's head, trained on :func:`topt_deploy.train.prompt4re.training_sets`."""
    settings = config.tasks[task]
    column = settings.prompt_column(task)
    prompts = None if column is None else inputs[column]
    if not settings.ensemble.enabled:
        embedding, all_ = embeddings[config.embedding_of(task)], all_features(inputs, schema)
        return train_head(embedding, all_, prompts, labels, config, task, place, part=city.part)
    extra, rows = embeddings[config.embedding_of(task)] if settings.embeds else None, len(labels)
    return train_ensemble(
        inputs, schema, prompts, labels, config, task, place, embedding=extra, rows=rows, part=city.part
    )


def _by_city(city: City, outcomes: Mapping[str, TaskOutcome], trees: Mapping[str, Array]) -> list[dict[str, Any]]:
    """Of a run on several cities, each one's name, regions, and held-out figures; empty for one city."""
    found = []
    for part, block in zip(city.parts, city.blocks, strict=False):
        tasks = {}
        for task, outcome in outcomes.items():
            truth = np.where(outcome.fold >= 0, city.labels[task], np.nan)[block]
            if not np.isnan(truth).all():
                held_out, by_trees = metrics(truth, outcome.held_out[block]), metrics(truth, trees[task][block])
                tasks[task] = {"held_out": asdict(held_out), "trees": asdict(by_trees)}
        found.append({"city_id": part.city_id, "regions": len(part), "tasks": tasks})
    return found


def _facts(
    city: City,
    schema: Schema,
    tasks: Sequence[str],
    results: Mapping[str, HeadResult],
    outcomes: Mapping[str, TaskOutcome],
    reports: Mapping[str, TaskReport],
    leverage: Leverage | None,
    far: Far,
) -> dict[str, Any]:
    """The entries of ``run.json`` on a finished run's city and tasks."""
    trends = {task: SizeTrend.fit(city.labels[task], outcomes[task].held_out, far.left_out) for task in tasks}
    return {
        "regions": len(city),
        "city_id": city.city_id,
        "synthetic": city.synthetic,
        "protocol": PROTOCOL_CITIES if any(_left_out(city, o) for o in outcomes.values()) else PROTOCOL,
        "scores": {
            task: nonconformity_scores(city.labels[task], outcome.held_out) for task, outcome in outcomes.items()
        },
        "size_trend": {task: asdict(trend) for task, trend in trends.items()},
        "fold_scores": {
            task: fold_scores(city.labels[task], outcomes[task].held_out, outcomes[task].fold, far.left_out, trend)
            for task, trend in trends.items()
        },
        "coverage": {
            task: coverage_by_size(
                city.labels[task], outcomes[task].held_out, outcomes[task].fold, far.left_out, COVERAGE
            )
            for task in tasks
        },
        "leverage": None if leverage is None else {"threshold": far.threshold},
        "far": far.regions(city.region_id),
        "parts": {task: _parts(city.labels[task], results[task], outcomes[task]) for task in tasks},
        "reports": {task: asdict(r) for task, r in reports.items()},
        "ranges": {c: [float(v.min()), float(v.max())] for c, v in range_columns(city, schema).items()},
    }


def _left_out(city: City, outcome: TaskOutcome) -> bool:
    """True if whole cities were held out."""
    return by_city(np.where(outcome.fold >= 0, 1.0, np.nan), city.part)


def _made_by(engine: TrainingDevice, seconds: float) -> dict[str, Any]:
    """The entries of ``run.json`` on how a run was made."""
    return {
        "seconds": round(seconds, 1),
        "device": engine.device.type,
        "precision": engine.precision,
        "threads": torch.get_num_threads(),
        "versions": {
            "topt-deploy": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _parts(labels: Array, result: HeadResult, outcome: TaskOutcome) -> dict[str, dict[str, float]]:
    """Weight of each part of an ensemble, and the held-out MAE without it."""
    truth = np.where(outcome.fold >= 0, labels, np.nan)
    regions = np.arange(len(labels))
    found: dict[str, dict[str, float]] = {}
    for name, weight in result.weights.items():
        found[name] = {"weight": weight}
        if name in result.without:
            own = result.without[name][outcome.fold, regions]
            found[name]["mae_without"] = metrics(truth, own).mae
    return found


def report(labels: Array, outcome: TaskOutcome, trees: Array) -> TaskReport:
    """Metrics of a task, and of the baselines, under its own folds."""
    truth = np.where(outcome.fold >= 0, labels, np.nan)
    means = np.full(len(labels), np.nan)
    for k in range(int(outcome.fold.max()) + 1):
        means[outcome.fold == k] = labels[(outcome.fold >= 0) & (outcome.fold != k)].mean()
    return TaskReport(
        held_out=metrics(truth, outcome.held_out),
        in_sample=metrics(truth, outcome.in_sample),
        mean=metrics(truth, means),
        trees=metrics(truth, trees),
    )


def _write_held_out(path: Path, city: City, outcomes: Mapping[str, TaskOutcome]) -> None:
    """One row per region and task: label, fold, held-out and in-sample prediction."""
    tables = [
        pa.table(
            {
                "region_id": city.region_id.tolist(),
                "task": [task] * len(city),
                "label": pa.array(city.labels[task], from_pandas=True),
                "fold": outcome.fold,
                "held_out": pa.array(outcome.held_out, from_pandas=True),
                "in_sample": outcome.in_sample,
            }
        )
        for task, outcome in outcomes.items()
    ]
    write_parquet(path, pa.concat_tables(tables))
