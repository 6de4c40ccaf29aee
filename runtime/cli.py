"""``topt-run``: predict, inspect and test bundles on a machine without PyTorch."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from topt_deploy import __version__
from topt_deploy.commandline import Log, decimal, run

from .encode import encode
from .options import device_option, encoder_engine_option, log_format_option, signature_option
from .pandas import without_pandas
from .predict import predict

if TYPE_CHECKING:
    from topt_deploy.bundle import Bundle

_PATH = click.Path(path_type=Path, readable=False)  # what cannot be read is refused where it is read, with its code


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="topt-run")
def cli() -> None:
    """Predict counts per region of a city from an exported bundle."""


@cli.command()
@click.argument("bundle", type=_PATH)
@signature_option
@log_format_option
def info(bundle: Path, require_signature: Path | None, log_format: str) -> None:
    """Show what BUNDLE predicts, what it reads, and what to expect of it; or what encoder it is. Checks every hash."""
    from topt_deploy.bundle import SCHEMA_VERSION, open_sealed

    if open_sealed(bundle, SCHEMA_VERSION).is_encoder:
        from .encoder import info as encoder_info

        lines, about = encoder_info(bundle, require_signature)
    else:
        lines, about = _city(bundle, require_signature)
    Log(log_format).result("\n".join(lines), event="info", **about)


def _city(bundle: Path, key: Path | None) -> tuple[list[str], dict[str, Any]]:
    """What a city's bundle is, for people and for machines."""
    from topt_deploy.bundle import open_bundle, well_formed
    from topt_deploy.signature import check_signature

    opened = open_bundle(bundle)
    check_signature(opened, key)
    opened.verify()
    with well_formed(bundle):
        return _told(opened)


def _told(opened: "Bundle") -> tuple[list[str], dict[str, Any]]:
    m = opened.manifest
    lines = [
        f"bundle     {opened.path} (schema {m.schema_version}, topt-deploy {m.version})",
        f"sha256     {opened.sha256}",
        f"city       {m.source['city_id']}, {m.source['regions']} regions"
        + (" — SYNTHETIC" if m.source["synthetic"] else ""),
        f"reads      {', '.join(f'{v} ({len(names)})' for v, names in m.views.items())}"
        + (", flows" if m.mobility else ""),
        *(f"prompts    {c}: {f['width']} from {f.get('encoder') or 'unnamed'}" for c, f in m.prompts.items()),
        *([f"encoder    {m.encoder['identity']}, {m.encoder['bundle'] or 'inside'}"] if m.encoder else []),
        *(
            f"variant    {name}: {v['graph']}, tolerance {v['tolerance']:g}{_built(v)}"
            for name, v in m.variants.items()
        ),
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
    return lines, {"source": m.source, **facts}


def _built(variant: Mapping[str, Any]) -> str:
    """What engines a variant holds, and what built them; nothing where it is for none."""
    if "engines" not in variant:
        return ""
    built = ", ".join(variant["engines"])
    return f", engines for {built} by {variant['library']}" if built else ", engines are built on the target"


@cli.command()
@click.argument("bundle", type=_PATH)
@device_option
@encoder_engine_option
@signature_option
@log_format_option
def selftest(bundle: Path, device: str, encoder_engine: str, require_signature: Path | None, log_format: str) -> None:
    """Predict BUNDLE's golden cities on this machine and compare with the exporter's values; so too its encoder."""
    from .selftest import selftests

    log = Log(log_format)
    log.listen()
    lines: list[str] = []
    facts: list[dict[str, Any]] = []
    for done in selftests(bundle, device=device, engine=encoder_engine, key=require_signature):
        lines += [*done.lines, f"self-test passed on {done.engine}"]
        facts += done.facts
    log.result("\n".join(lines), event="selftest", checks=facts)


@cli.command()
@click.option("--clear", is_flag=True, help="Remove them.")
@log_format_option
def cache(clear: bool, log_format: str) -> None:
    """List the TensorRT engines that are kept on this machine, the one used longest ago first."""
    from .enginecache import EngineCache, cache_folder, cache_limit

    folder, limit = cache_folder(), cache_limit()
    kept = EngineCache(folder, limit) if folder.exists() else None
    entries = kept.entries() if kept is not None else []
    if clear and kept is not None:
        kept.clear()
    lines = [f"{key[:16]}  {size / 1e6:10.1f} MB" for _, size, key in entries]
    total = sum(size for _, size, _ in entries)
    what = "removed" if clear else "kept"
    lines.append(f"{len(entries)} engines {what}, {total / 1e9:.2f} GB (of {limit / 1e9:g} GB), {folder}")
    facts = [{"key": key, "bytes": size, "used": used} for used, size, key in entries]
    Log(log_format).result("\n".join(lines), event="cache", folder=str(folder), cleared=clear, engines=facts)


cli.add_command(predict)
cli.add_command(encode)


def main() -> None:
    """Entry point."""
    without_pandas()
    # Arrow's own allocator keeps what it has freed; at this size the system's costs nothing and halves the memory.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    run(cli, teardown=False)
