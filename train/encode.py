"""``topt-deploy encode``."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from topt_deploy.commandline import Lines
from topt_deploy.encoder.command import shared_options
from topt_deploy.encoder.encode import Progress, limit_pixels
from topt_deploy.encoder.job import Job
from topt_deploy.encoder.table import read_regions
from topt_deploy.encoder.templates import load_templates

BATCH_ON_CUDA = 8


@click.command("encode")
@click.argument("city", type=click.Path(path_type=Path), default=".")
@click.option("--model", required=True, help="The model's folder, or its id on the Hugging Face hub.")
@shared_options
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="An absent one is an error."
)
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="To compute in."
)
@click.option("--max-pixels", type=click.IntRange(min=1), help="Resize images to at most this (Qwen2.5-VL).")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help=f"Regions at once, where short enough [default: 1; {BATCH_ON_CUDA} on CUDA].",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads on the CPU.")
@click.option("--allow-download", is_flag=True, help="Fetch the model from the hub; needs --revision.")
@click.option("--revision", help="Commit of the hub's model.")
def encode(
    city: Path,
    model: str,
    templates: Path | None,
    device: str,
    precision: str,
    max_pixels: int | None,
    batch: int | None,
    threads: int,
    allow_download: bool,
    revision: str | None,
    **shared: Any,
) -> None:
    """Encode texts and images of CITY, a folder with regions.parquet, to prompt vectors with a frozen language model.

    What was encoded before and has not changed is taken from a cache, so that a run that was cut off goes on where it
    was.
    """
    job = Job(city=city, **shared)
    asked = load_templates(templates)
    for task in job.tasks:
        asked.question(task)
    read_regions(job.regions, asked.wording)  # a bad table is refused before minutes of loading

    import torch

    from topt_deploy.model.encoder.load import check_device, open_checkpoint, quiet, torch_encoder

    quiet()
    torch.set_num_threads(threads)
    check_device(device)
    checkpoint = open_checkpoint(model, allow_download=allow_download, revision=revision)
    if max_pixels is not None:
        checkpoint = replace(checkpoint, spec=limit_pixels(checkpoint.spec, max_pixels))
    encoder = torch_encoder(checkpoint, device=device, precision=precision)
    click.echo(f"{encoder.spec.identity} on {device} in {precision}", err=True)
    try:
        with _progress() as progress:
            done = job.run(encoder, asked, batch=batch or (BATCH_ON_CUDA if device == "cuda" else 1), progress=progress)
    except KeyboardInterrupt:
        if not job.no_cache:
            click.echo("interrupted; go on with the same command and --resume", err=True)
        raise
    click.echo(job.summary(done))


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar with the time left; lines where there is no terminal."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("regions"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
