"""``topt-run``: predict, inspect and test bundles on a machine without PyTorch."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from topt_deploy import __version__
from topt_deploy.commandline import LOG_FORMATS, Lines, Log, decimal, run
from topt_deploy.errors import NoInput, UsageError

from .encode import encode, engine_option

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT_BUNDLE = "model.topt"
DEFAULT_MOBILITY = "mobility.parquet"
DEFAULT_OUT = "predictions.parquet"
BUNDLE_VARIABLE = "TOPT_BUNDLE"
ROWS_SHOWN = 5

_PATH = click.Path(path_type=Path, readable=False)  # what cannot be read is refused where it is read, with its code
log_format = click.option(
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    default="text",
    show_default=True,
    help="Messages as text or JSON.",
)
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="An absent one is an error."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="topt-run")
def cli() -> None:
    """Predict counts per region of a city from an exported bundle."""


@cli.command()
@click.argument("regions", type=_PATH)
@click.option("--bundle", type=_PATH, help=f"[default: {DEFAULT_BUNDLE} beside REGIONS, else ${BUNDLE_VARIABLE}]")
@click.option("--mobility", type=_PATH, help=f"[default: {DEFAULT_MOBILITY} beside REGIONS]")
@click.option("--out", type=_PATH, help=f"[default: {DEFAULT_OUT} beside REGIONS]")
@click.option("--task", "tasks", multiple=True, help="Predict this task only (repeatable).")
@click.option("--wide", is_flag=True, help="One row per region, one column per task.")
@click.option(
    "--coverage", type=float, help="How often lower to upper should hold [default: 0.9, or none with too few labels]."
)
@click.option("--geo", type=_PATH, help="Also write a map for GIS: FILE.gpkg or FILE.geojson (extra `geo`).")
@click.option("--id-col", default="region_id", show_default=True, help="The column of region ids.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads for the model.")
@click.option("--encoder-bundle", type=_PATH, help="The prompt encoder, for regions without prompts [default: found].")
@engine_option
@click.option("--no-cache", is_flag=True, help="Keep no prompts beside REGIONS, and take none from there.")
@device_option
@log_format
def predict(
    regions: Path,
    bundle: Path | None,
    mobility: Path | None,
    out: Path | None,
    tasks: tuple[str, ...],
    wide: bool,
    coverage: float | None,
    geo: Path | None,
    id_col: str,
    threads: int,
    encoder_bundle: Path | None,
    engine: str,
    no_cache: bool,
    device: str,
    log_format: str,
) -> None:
    """Predict every task of a bundle for the city in REGIONS, a regions.parquet."""
    from topt_deploy.fileio import check_place, reading
    from topt_deploy.parquet import write_parquet

    from .predictor import COVERAGE, open_predictor
    from .receipt import Stopwatch, receipt_path, write_receipt

    with reading(regions), regions.open("rb"):
        pass
    bundle = bundle or _default_bundle(regions)
    out = out or regions.with_name(DEFAULT_OUT)
    for place in (out, receipt_path(out)) if out.name else (out,):
        check_place(place)
    if geo is not None:
        _check_map(geo)
    watch = Stopwatch()
    with watch.step("open"):
        predictor = open_predictor(bundle, device=device, threads=threads, encoder=encoder_bundle, engine=engine)
    if not predictor.bundle.manifest.mobility:
        mobility = None  # not read, so it is no part of the receipt either
    elif mobility is None:
        beside = regions.with_name(DEFAULT_MOBILITY)
        mobility = beside if beside.exists() else None
    asked: dict[str, Any] = {"tasks": tasks, "id_col": id_col, "coverage": coverage}
    for file in (regions, mobility):
        if file is not None and out.resolve() == file.resolve():
            raise UsageError("the output would overwrite an input", file=file, fix="name another place with --out")
    progress = (lambda *_: None) if Log(log_format).json else Lines()
    with watch.step("predict"):
        predictions = predictor.predictions(regions, mobility, **asked, cache=not no_cache, progress=progress)
        table = predictions.wide() if wide else predictions.long()
    with watch.step("write"):
        if geo is not None:  # first, for a run that fails must leave no predictions
            _write_map(geo, predictions.wide(), regions)
        write_parquet(out, table)
    asked["coverage"] = COVERAGE if coverage is None else coverage
    options = asked | {"tasks": list(tasks or predictor.tasks), "wide": wide, "device": device}
    receipt = write_receipt(
        out,
        inputs={"regions": regions, "mobility": mobility},
        predictor=predictor,
        predictions=table,
        options=options,
        watch=watch,
    )
    text = f"{_preview(table)}\n\npredictions {out}\nreceipt     {receipt_path(out)}"
    Log(log_format).result(text, event="predicted", file=str(out), **{k: receipt[k] for k in ("status", "seconds")})


@cli.command()
@click.argument("bundle", type=_PATH)
@log_format
def info(bundle: Path, log_format: str) -> None:
    """Show what BUNDLE predicts, what it reads, and what to expect of it; or what encoder it is. Checks every hash."""
    from topt_deploy.bundle import SCHEMA_VERSION, open_bundle, open_sealed

    if open_sealed(bundle, SCHEMA_VERSION).is_encoder:
        from .encoder import info as encoder_info

        lines, about = encoder_info(bundle)
        Log(log_format).result("\n".join(lines), event="info", **about)
        return
    opened = open_bundle(bundle)
    opened.verify()
    m = opened.manifest
    lines = [
        f"bundle     {bundle} (schema {m.schema_version}, topt-deploy {m.version})",
        f"sha256     {opened.sha256}",
        f"city       {m.source['city_id']}, {m.source['regions']} regions"
        + (" — SYNTHETIC" if m.source["synthetic"] else ""),
        f"reads      {', '.join(f'{v} ({len(names)})' for v, names in m.views.items())}"
        + (", flows" if m.mobility else ""),
        *(f"prompts    {c}: {f['width']} from {f.get('encoder') or 'unnamed'}" for c, f in m.prompts.items()),
        *([f"encoder    {m.encoder['identity']}, {m.encoder['bundle'] or 'inside'}"] if m.encoder else []),
        *(f"variant    {name}: {v['graph']}, tolerance {v['tolerance']:g}" for name, v in m.variants.items()),
        f"protocol   {m.source['protocol']}",
    ]
    for task, described in m.tasks.items():
        held, trees = described["report"]["held_out"], described["report"]["trees"]
        lines.append(
            f"{task:<16} held out: MAE {held['mae']:.1f}, RMSE {held['rmse']:.1f}, R² {decimal(held['r2'])}"
            f" (boosted trees: MAE {trees['mae']:.1f})"
        )
    facts: dict[str, Any] = {
        "sha256": opened.sha256,
        "tasks": m.tasks,
        "views": m.views,
        "prompts": m.prompts,
    }
    Log(log_format).result("\n".join(lines), event="info", source=m.source, **facts)


@cli.command()
@click.argument("bundle", type=_PATH)
@device_option
@engine_option
@log_format
def selftest(bundle: Path, device: str, engine: str, log_format: str) -> None:
    """Predict BUNDLE's golden cities on this machine and compare with the exporter's values; so too its encoder."""
    from .selftest import selftests

    lines: list[str] = []
    facts: list[dict[str, Any]] = []
    for done in selftests(bundle, device=device, engine=engine):
        lines += [*done.lines, f"self-test passed on {done.engine}"]
        facts += done.facts
    Log(log_format).result("\n".join(lines), event="selftest", checks=facts)


cli.add_command(log_format(encode))


def _default_bundle(regions: Path) -> Path:
    beside = regions.with_name(DEFAULT_BUNDLE)
    if beside.exists():
        return beside
    if BUNDLE_VARIABLE in os.environ:
        return Path(os.environ[BUNDLE_VARIABLE])
    raise NoInput(
        "no bundle",
        file=beside,
        expected=f"{DEFAULT_BUNDLE} beside the regions, or ${BUNDLE_VARIABLE}",
        fix="topt-deploy export --format onnx, or name one with --bundle",
    )


def _check_map(path: Path) -> None:
    """Refuse early what :func:`_write_map` could not write: a run that fails must not leave half of its output."""
    from topt_deploy.geometry import DRIVERS, geo_library

    if path.suffix.lower() not in DRIVERS:
        raise UsageError("unknown map format", file=path, expected=" or ".join(DRIVERS), found=repr(path.suffix))
    for library in ("shapely", "pyogrio"):
        geo_library(library)


def _write_map(path: Path, wide: "pa.Table", regions: Path) -> None:
    """A map of the predictions, one feature per region: its polygon, or else its point."""
    from topt_deploy.geometry import write_geo
    from topt_deploy.parquet import read_parquet

    if "geometry" not in wide.column_names:
        positions = read_parquet(regions, ["lon", "lat"])
        for axis in ("lon", "lat"):  # predictions keep the input's order of rows
            wide = wide.append_column(axis, positions.column(axis))
    write_geo(path, wide)


def _preview(table: "pa.Table") -> str:
    """The first rows, for people."""
    names = [n for n in table.column_names if n not in ("geometry", "reason")]
    rows = table.slice(0, ROWS_SHOWN).select(names).to_pylist()
    text = [names, *([f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in text) for i in range(len(names))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in text]
    return "\n".join([*shown, f"({len(table)} rows)"])


class _NoPandas:
    """pyarrow imports pandas wherever it is installed, to recognise its types: a fifth of a second for nothing."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        """Say that pandas is not installed, and nothing about anything else."""
        if name == "pandas":
            raise ModuleNotFoundError(name=name)


def main() -> None:
    """Entry point."""
    sys.meta_path.insert(0, _NoPandas)
    # Arrow's own allocator keeps what it has freed; at this size the system's costs nothing and halves the memory.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    run(cli, teardown=False)
