"""Training a city in one call, and the finished run: its figures, its bundle and its report.

``topt-deploy train`` and ``topt_deploy.train`` are both :func:`train`. PyTorch is imported when a city is trained, and
not before.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import pyarrow as pa

from topt_deploy.arguments import Location, check_choice, check_least, several
from topt_deploy.config.load import load_config, presets
from topt_deploy.config.settings import Config
from topt_deploy.data.parquet import read_parquet
from topt_deploy.data.parquet_parts import open_table
from topt_deploy.errors import NoInput, UsageError
from topt_deploy.run_folder import RUNS_DIR, Run, newest_run, open_run
from topt_deploy.storage.hashed_file import Held

from .metrics import Metrics, TaskReport

if TYPE_CHECKING:
    from .cities import CityFiles
    from .loop import TrainingDevice

Format: TypeAlias = Literal["onnx", "trt"]
WeightPrecision: TypeAlias = Literal["fp32", "fp16", "int8", "int4"]

REGIONS_FILE, MOBILITY_FILE, REPORT_FILE = "regions.parquet", "mobility.parquet", "report.html"
HELD_OUT_FILE = "held_out.parquet"
EXPORT = "topt_deploy.export.export_run"
"""Another stage, which is found by name when a run is exported: no stage imports another."""
SMALL_CITY = 500
"""Regions up to which a second thread costs as much as it brings."""


class TrainedRun:
    """A finished training run.

    Args:
        path: The run's folder.

    Attributes:
        path: The run's folder.
        config: Its settings.

    Raises:
        NoInput, BadConfig: If there is no run, or its record is damaged.
        UsageError: If it is not finished.
    """

    def __init__(self, path: Location) -> None:
        self._run: Run = open_run(Path(path))
        if not self._run.finished:
            raise UsageError(
                "this run is not finished", file=self._run.path,
                fix="go on with it: train(city, out=run, resume=True), or topt-deploy train --resume",
            )  # fmt: skip
        self.path: Path = self._run.path
        self.config: Config = self._run.config

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that were trained."""
        return tuple(self.config.tasks)

    @cached_property
    def metrics(self) -> Mapping[str, TaskReport]:
        """The figures of each task, such as ``run.metrics["crime"].held_out.mae``."""
        reports = self._run.facts["reports"]
        return {
            task: TaskReport(**{name: Metrics(**figures) for name, figures in reports[task].items()})
            for task in self.tasks
        }

    @property
    def held_out(self) -> pa.Table:
        """One row per region and task: ``region_id, task, label, fold, held_out, in_sample``.

        ``held_out`` was predicted by the fold that did not train on the region; it is null where there is no label.
        """
        return read_parquet(self.path / HELD_OUT_FILE)

    def __repr__(self) -> str:
        lines = [f"<topt_deploy.TrainedRun {str(self.path)!r}>"]
        for task, found in self.metrics.items():
            r2 = "" if found.held_out.r2 is None else f", R² {found.held_out.r2:.3f}"
            lines.append(
                f"  {task:<16} held out: MAE {found.held_out.mae:.1f}{r2} (boosted trees: MAE {found.trees.mae:.1f})"
            )
        return "\n".join(lines)

    def export(
        self,
        out: Location | None = None,
        *,
        format: Format = "onnx",
        flavour: Literal["tensorrt", "rtx"] | None = None,
        precision: WeightPrecision | None = None,
        profile: str | Sequence[str] = (),
        capability: str | Sequence[str] = (),
        zip: bool = False,
        prompt_encoder: str | None = None,
        encoder_precision: WeightPrecision = "int8",
        encoder_bundle: Location | None = None,
        templates: Location | None = None,
        max_pixels: int | None = None,
        mlflow: Location | None = None,
    ) -> Path:
        """Export the run as a bundle, after its predictions were compared with PyTorch's: ``topt-deploy export``.

        Args:
            out: The bundle, ``model.topt`` beside ``runs/`` by default. An older bundle there is replaced.
            format: ``onnx``, or ``trt``, which adds what TensorRT builds engines of (docs/how-to/tensorrt.md).
            flavour, precision, profile, capability: Of ``trt``: ``tensorrt`` or ``rtx``; the model's precision; sizes
                that engines are made for, as ``MIN,OPT,MAX``; GPUs that engines are built for now, as ``8.9``.
            zip: Write the bundle as one zip file.
            prompt_encoder: Also export this language model, a folder or an id, so that the bundle makes prompts.
            encoder_precision: Of its weights.
            encoder_bundle: A bundle of the encoder's own, which several cities may share; made where it is absent.
            templates: The TOML file that the prompts were encoded with.
            max_pixels: Of its images, as in ``topt-deploy encode``.
            mlflow: Also write an MLflow model into this new folder.

        Returns:
            The bundle's path.

        Raises:
            BadBundle: If the exported model does not predict what PyTorch does.
            UsageError: If options do not go together, or ``out`` is something other than a bundle.
        """
        export_run = import_module(EXPORT).export_run
        place: Path = export_run(
            self._run, out, format=format, flavour=flavour, precision=precision, profile=profile, capability=capability,
            zip=zip, prompt_encoder=prompt_encoder, encoder_precision=encoder_precision, encoder_bundle=encoder_bundle,
            templates=templates, max_pixels=max_pixels, mlflow=mlflow,
        ).path  # fmt: skip
        return place

    def report(
        self, out: Location | None = None, *, evaluation: Location | None = None, check: Location | None = None
    ) -> Path:
        """Write one HTML page with maps, errors and their pattern: ``topt-deploy report``.

        Args:
            out: The page, ``report.html`` in the run's folder by default.
            evaluation: Also show what ``topt-deploy evaluate --out`` left in this folder.
            check: Also show this result of ``topt-run check --out`` on predictions of this run's bundle.

        Returns:
            The page's path.
        """
        from .report.page import write_report

        place = self.path / REPORT_FILE if out is None else Path(out)
        folder, checked = (None if given is None else Path(given) for given in (evaluation, check))
        write_report(self._run, place, folder, checked)
        return place


def train(
    city: Location | Sequence[Location],
    *,
    out: Location | None = None,
    preset: str | None = None,
    config: Location | None = None,
    tasks: str | Iterable[str] = (),
    set: Mapping[str, object] | None = None,
    seed: int | None = None,
    resume: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    precision: Literal["fp32", "tf32", "bf16"] | None = None,
    compile: bool | None = None,
    threads: int | None = None,
) -> TrainedRun:
    """Train both stages on a city, as ``topt-deploy train`` does; progress goes to standard error.

    Args:
        city: A folder with ``regions.parquet`` and ``mobility.parquet`` (docs/reference/files.md). Regions whose label
            is null are the ones to predict. Several folders train one model on all of them
            (docs/how-to/several-cities.md).
        out: The run's folder; ``runs/<time>`` in the city by default. Several cities need one.
        preset: Settings to start from; the file's own, or ``default``.
        config: A TOML file of settings; ``topt.toml`` in the city by default, which several cities must agree on.
        tasks: One task or several; those of the settings by default.
        set: Settings to override, such as ``{"srel.epochs": 100}``.
        seed: Of the run; the settings' by default.
        resume: Go on with ``out``, or with the city's newest unfinished run.
        device: ``cpu`` or ``cuda``. One that is not there is an error.
        precision: ``fp32``, ``tf32`` or ``bf16``; by default ``fp32``, and ``tf32`` on CUDA.
        compile: Compile the steps; by default on CUDA.
        threads: CPU threads; by default 1 up to 500 regions, and those of PyTorch beyond.

    Raises:
        NoInput, BadData, BadConfig: If the city's files or the settings are not what they should be.
        UsageError: If the run's folder is taken, or options do not go together.
        NoDevice: If the device is not there.
    """
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in (set or {}).items())
    place = None if out is None else Path(out)
    file = None if config is None else Path(config)
    cities = [Path(city)] if isinstance(city, str | os.PathLike) else [Path(one) for one in city]
    return train_cities(
        cities, out=place, preset=preset, config=file, tasks=several(tasks), overrides=overrides, seed=seed,
        resume=resume, device=device, precision=precision, compile_=compile, threads=threads,
    )  # fmt: skip


def train_cities(
    cities: Sequence[Path],
    *,
    out: Path | None,
    preset: str | None,
    config: Path | None,
    tasks: tuple[str, ...],
    overrides: tuple[str, ...],
    seed: int | None,
    resume: bool,
    device: str,
    precision: str | None,
    compile_: bool | None,
    threads: int | None,
) -> TrainedRun:
    """:func:`train` with settings to override as texts, ``KEY=VALUE``."""
    if not cities:
        raise UsageError("no city is named", expected="at least one folder with regions.parquet")
    cities = sorted(cities, key=lambda city: city.resolve().name)  # no result depends on their order
    if not resume:
        _check_cities(cities, out)
    check_choice("device", device, ("cpu", "cuda"))
    check_choice("precision", precision, (None, "fp32", "tf32", "bf16"))
    check_choice("preset", preset, (None, *presets()))
    check_least("threads", threads)
    if resume:
        given = {"preset": preset, "config": config, "task": tasks, "set": overrides, "seed": seed}
        begun = _unfinished(cities[0], out, [option for option, value in given.items() if value not in (None, ())])
        run: Run | None = begun
        settings, said = begun.config, list[str]()
        cities = [own.city_dir for own in begun.trained_on] if begun.others else cities
        _check_cities(cities, begun.path)
    else:
        from .settle import common_file, settle_cities

        config = config or common_file(cities)
        changes = [*overrides, *([f"seed={seed}"] if seed is not None else [])]
        run, settings = None, load_config(preset=preset, file=config, tasks=tasks, overrides=changes)
        settings, said = settle_cities(settings, cities, file=config, overrides=overrides)

    import torch

    from .loop import TrainingDevice
    from .run import start_run

    engine = TrainingDevice.choose(device, precision, compile_)
    first, *others = (_files(city, settings.mobility) for city in cities)
    if run is None:
        out = out or cities[0] / RUNS_DIR / datetime.now().strftime("%Y%m%d-%H%M%S")
        run = start_run(out, cities[0], settings, regions=first.regions, mobility=first.mobility, others=others)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or _threads(cities, before))
    try:
        _train(run, [first, *others], engine, said)
    finally:
        torch.set_num_threads(before)
    return TrainedRun(run.path)


def _check_cities(cities: Sequence[Path], out: Path | None) -> None:
    """Refuse folders without a city, and several without a place for their run."""
    for city in cities:
        if not (city / REGIONS_FILE).exists():
            raise NoInput(
                "no city in this folder",
                file=city / REGIONS_FILE,
                expected="a folder with regions.parquet and mobility.parquet",
                fix="topt-deploy sample --out demo/, or topt-deploy import, makes one",
            )
    if len(cities) > 1 and out is None:
        raise UsageError("a run on several cities needs a place of its own", fix="name its folder with --out")


def _files(city: Path, mobility: bool) -> "CityFiles":
    """A city's tables, each read and hashed once."""
    from .cities import CityFiles

    flows = Held(city / MOBILITY_FILE) if mobility else None
    return CityFiles(folder=city, regions=Held(city / REGIONS_FILE), mobility=flows)


def _unfinished(city: Path, out: Path | None, changed: Sequence[str]) -> Run:
    """The run to go on with; it keeps its settings, so that no option may have been given that changes them."""
    if changed:
        raise UsageError(f"--{changed[0]} cannot change with --resume", fix="a run keeps its settings; start a new one")
    run = open_run(out) if out else newest_run(city, finished=False)
    if run.finished:
        raise UsageError("this run is finished", file=run.path, fix="topt-deploy export")
    return run


def _train(run: Run, cities: "Sequence[CityFiles]", engine: "TrainingDevice", said: Iterable[str]) -> None:
    """Train a run that was begun, and tell how far it is."""
    from .progress import Reporter
    from .run import METRICS_FILE, train_run

    reporter = Reporter(run.path / METRICS_FILE)
    reporter.say(f"run {run.path}: preset {run.config.preset}, tasks {', '.join(run.config.tasks)}")
    for sentence in said:
        reporter.say(sentence)
    try:
        first, *others = cities
        train_run(run, regions=first.regions, mobility=first.mobility, engine=engine, reporter=reporter, others=others)
    except KeyboardInterrupt:
        named = " ".join(str(files.folder) for files in cities)
        reporter.say(f"interrupted; go on with: topt-deploy train {named} --resume --out {run.path}")
        raise


def _threads(cities: Sequence[Path], most: int) -> int:
    """One thread for a small city: at a hundred regions the second one costs as much as it brings. For a large one as
    many as PyTorch takes by itself, which are those of OMP_NUM_THREADS or else the cores that the process may use."""
    regions = sum(open_table(city / REGIONS_FILE).rows for city in cities)
    return 1 if regions <= SMALL_CITY else most
