"""``topt-run predict``."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from topt_deploy.console import Log
from topt_deploy.errors import NoInput, ToptError, UsageError, how_many, printable
from topt_deploy.progress import ProgressBar
from topt_deploy.storage.outputs import METRICS, check_outputs, check_suffix

from ..inputs import MOBILITY, PREDICTIONS
from .options import PATH, device_option, encoder_engine_option, log_format_option, signature_option, threads_option

if TYPE_CHECKING:
    import pyarrow as pa

    from ..settings import Setting
    from ..summary import CityResult, Summary

DEFAULT_BUNDLE = "model.topt"
BUNDLE_VARIABLE = "TOPT_BUNDLE"
ROWS_SHOWN = 5
_LEFT_OPEN: list[object] = []
"""Kept until the process ends, which is sooner than a session is dismantled."""


@click.command("predict")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--bundle", type=PATH, help=f"[default: ${BUNDLE_VARIABLE}, else {DEFAULT_BUNDLE} beside the regions]")
@click.option("--mobility", type=PATH, help=f"One city's flows [default: {MOBILITY} beside the regions].")
@click.option("--out", help=f"A file, or a folder for many cities [default: {PREDICTIONS} beside the regions].")
@click.option("--task", "tasks", multiple=True, help="Predict this task only (repeatable).")
@click.option("--wide", is_flag=True, help="One row per region, one column per task.")
@click.option(
    "--coverage",
    type=float,
    help="Share of regions between lower and upper [default: 0.9, or no interval with too few labels].",
)
@click.option("--geo", type=PATH, help="Also write one city's map: FILE.gpkg or FILE.geojson (extra `geo`).")
@click.option("--id-col", default="region_id", show_default=True, help="The column of region ids.")
@click.option(
    "--on-bad-row", type=click.Choice(["fail", "mask", "quarantine"]), default="fail", show_default=True,
    help="Single bad rows: refuse the city, give them no prediction, or leave them out.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Skip cities whose output was made with the same inputs and options.")
@click.option("--workers", type=click.IntRange(min=1), help="Cities at once [default: one or two per processor].")
@click.option(
    "--engine", type=click.Choice(["local", "ray", "spark"]), default="local", show_default=True,
    help="Run many cities on this machine, on Ray or on Spark.",
)  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds that one city may take.")
@click.option("--metrics-file", type=PATH, help="Write metrics for Prometheus' node_exporter to FILE.prom.")
@threads_option
@click.option(
    "--encoder-bundle",
    type=PATH,
    help="Bundle of the prompt encoder, for regions without prompts [default: beside the city's].",
)
@encoder_engine_option
@click.option("--no-cache", is_flag=True, help="Neither read nor write prompts beside the regions.")
@signature_option
@device_option
@log_format_option
def predict(
    inputs: tuple[str, ...],
    mobility: Path | None,
    out: str | None,
    geo: Path | None,
    workers: int | None,
    engine: str,
    timeout: float | None,
    metrics_file: Path | None,
    log_format: str,
    **shared: Any,
) -> int:
    """Predict every task of a bundle for the city in INPUT, a regions.parquet or its folder.

    With several INPUTs, globs, folders of cities (Hive partitions city=NAME among them) or URIs (s3://, gs://, az://),
    every city gets a folder city=NAME below --out. Exit code 3: something was set aside, or some cities failed.
    """
    from topt_deploy.no_memory import end_without_memory
    from topt_deploy.storage.os_errors import check_file
    from topt_deploy.storage.table_parts import table_files

    from ..inputs import one_city

    log = Log(log_format)
    log.listen()
    if metrics_file is not None:
        check_suffix(metrics_file, METRICS, "--metrics-file")
        check_outputs([metrics_file], bundles=[] if shared["bundle"] is None else [shared["bundle"]])
    with _measured(metrics_file) as summary:
        regions = one_city(inputs, out)
        for file in table_files(regions) if regions is not None else ():
            check_file(file)
        setting = _setting(regions or Path(inputs[0]), **shared)
        end_without_memory(lambda error: _tell_the_end(error, summary, metrics_file, log))
        if regions is not None:
            if timeout is not None:
                _end_after(timeout, regions, summary, metrics_file, log)
            return _predict_one(regions, setting, summary, log, mobility=mobility, out=out, geo=geo)
        for option, given in (("--mobility", mobility), ("--geo", geo)):
            if given is not None:
                raise UsageError(
                    f"{option} is for one city only", found=f"{len(inputs)} inputs", fix="predict that city alone"
                )
        if out == "-":
            raise UsageError("results go to files, not to standard output", found="-", fix="name a folder with --out")
        if out is None:
            raise UsageError(
                "several cities need an output folder", expected="--out FOLDER", fix="name one; it is made"
            )
        return _predict_many(inputs, out, setting, summary, log, engine=engine, workers=workers, timeout=timeout)


def _setting(
    near: Path,
    *,
    bundle: Path | None,
    encoder_bundle: Path | None,
    require_signature: Path | None,
    resume: bool,
    no_cache: bool,
    device: str,
    threads: int,
    encoder_engine: str,
    **shaping: Any,
) -> "Setting":
    """The command line's options that hold for every city; ``shaping`` are those that shape the output."""
    from ..settings import Options, Setting

    return Setting(
        bundle=str(bundle or _default_bundle(near)),
        encoder_bundle=None if encoder_bundle is None else str(encoder_bundle),
        require_signature=None if require_signature is None else str(require_signature),
        resume=resume,
        cache=not no_cache,
        device=device,
        threads=threads,
        encoder_engine=encoder_engine,
        options=Options(**shaping),
    )


def _predict_one(
    regions: Path,
    setting: "Setting",
    summary: "Summary",
    log: Log,
    *,
    mobility: Path | None,
    out: str | None,
    geo: Path | None,
) -> int:
    from topt_deploy.storage.table_parts import home_of

    from ..predict_city import SKIPPED, CityJob, check_map, predict_city
    from ..receipt import Stopwatch, receipt_path
    from ..summary import result_of

    home = home_of(regions)
    beside = home / MOBILITY
    mobility = mobility or (beside if beside.exists() else None)
    job = CityJob(
        name=home.name,
        regions=str(regions),
        mobility=None if mobility is None else str(mobility),
        out=out if out is not None else str(home / PREDICTIONS),
    )
    if geo is not None:
        check_map(geo)
    watch = Stopwatch()
    with watch.step("open"):
        predictor = setting.open()
    _LEFT_OPEN.append(predictor)
    with ProgressBar(quiet=log.json) as progress:
        done = predict_city(
            predictor, job, setting.options,
            resume=setting.resume, cache=setting.cache, geo=geo, progress=progress, watch=watch,
        )  # fmt: skip
    summary.add(result_of(job, done))
    place, receipt = Path(job.out), done.receipt
    lines = [f"{_preview(done.table)}\n"] if done.table is not None else []
    lines += [f"predictions {place}" + (", as they were" if done.status == SKIPPED else "")]
    for facts in receipt["set_aside"].values():
        counted = ", ".join(f"{rows} {code}" for code, rows in facts["rows"].items())
        lines.append(f"set aside   {place.with_name(facts['file'])}: {counted}")
    lines += [f"receipt     {receipt_path(place)}"]
    said = {key: receipt[key] for key in ("status", "set_aside", "seconds")}
    log.result("\n".join(lines), event="skipped" if done.status == SKIPPED else "predicted", file=job.out, **said)
    return summary.exit_code


def _predict_many(
    inputs: Sequence[str],
    out: str,
    setting: "Setting",
    summary: "Summary",
    log: Log,
    *,
    engine: str,
    workers: int | None,
    timeout: float | None,
) -> int:
    from ..addresses import shown
    from ..batch.run_batch import run_batch
    from ..summary import FAILED

    def told(result: "CityResult", done: int, total: int) -> None:
        if log.json:
            log.result("", event="city", **result.as_dict())
            return
        if result.status == FAILED:
            progress.say(f"{printable(result.city)}: error: {result.told}")
        progress(done, total)

    with summary.recorded(out), ProgressBar("cities", quiet=log.json) as progress:
        run_batch(inputs, out, setting, summary, engine=engine, workers=workers, told=told, timeout=timeout)
        text = f"{summary.text()}\npredictions {shown(out).rstrip('/')}/city=…/{PREDICTIONS}"
        summary.write(out)
        log.result(text, event="batch", **summary.record())
    return summary.exit_code


@contextmanager
def _measured(file: Path | None) -> Iterator["Summary"]:
    """A summary whose figures are written in the end, also where the run fails as a whole, or is ended."""
    from ..summary import Summary, write_metrics

    summary = Summary()
    try:
        yield summary
    except BaseException as error:
        summary.end(error)
        raise
    finally:
        if file is not None:
            write_metrics(file, summary.metrics())


def _end_after(seconds: float, regions: Path, summary: "Summary", metrics: Path | None, log: Log) -> None:
    """End the process once it has taken so long, whatever it is in: what computes does not look at clocks."""
    import threading

    from ..summary import too_long

    def end() -> None:
        error = too_long(str(regions), seconds)
        try:
            _tell_the_end(error, summary, metrics, log)
        finally:
            os._exit(error.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _tell_the_end(error: ToptError, summary: "Summary", metrics: Path | None, log: Log) -> None:
    """Tell why the process is about to end, where no exception can."""
    from ..summary import write_metrics

    summary.end(error)
    if metrics is not None:
        write_metrics(metrics, summary.metrics())
    log.error(error)


def _default_bundle(regions: Path) -> Path:
    from topt_deploy.storage.table_parts import home_of

    beside = home_of(regions) / DEFAULT_BUNDLE
    if os.environ.get(BUNDLE_VARIABLE):  # what whoever runs this has set goes before what came with the data
        return Path(os.environ[BUNDLE_VARIABLE])
    if beside.exists():
        return beside
    raise NoInput(
        "no bundle",
        file=beside,
        expected=f"${BUNDLE_VARIABLE}, or {DEFAULT_BUNDLE} beside the regions",
        fix="topt-deploy export --format onnx, or name one with --bundle",
    )


def _preview(table: "pa.Table") -> str:
    """The first rows, for people."""
    names = [n for n in table.column_names if n not in ("geometry", "reason")]
    rows = table.slice(0, ROWS_SHOWN).select(names).to_pylist()
    text = [names, *([f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in text) for i in range(len(names))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in text]
    return "\n".join([*shown, f"({how_many(len(table), 'row')})"])
