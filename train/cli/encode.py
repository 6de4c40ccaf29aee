"""``topt-deploy encode``."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from topt_deploy.errors import Exit
from topt_deploy.progress import ProgressBar
from topt_deploy.prompts.encode import limit_pixels
from topt_deploy.prompts.encode_job import EncodeJob
from topt_deploy.prompts.options import shared_options
from topt_deploy.prompts.table import read_regions
from topt_deploy.prompts.templates import load_templates

from ..encode.processes import check_team, joined, launched, run_team

BATCH_ON_CUDA = 8


@click.command("encode")
@click.argument("city", type=click.Path(path_type=Path), default=".")
@click.option("--model", required=True, help="The model's folder, or its id on the Hugging Face hub.")
@shared_options
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="The command fails if the device is missing.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Precision to compute in.",
)
@click.option("--max-pixels", type=click.IntRange(min=1), help="Resize images to at most this (Qwen2.5-VL).")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help=f"Regions at once, if they are short enough [default: 1; {BATCH_ON_CUDA} on CUDA].",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads on the CPU.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Share the regions among so many processes; on CUDA each has a device of its own. Needs accelerate.",
)
@click.option("--shared-cache", type=click.Path(path_type=Path), hidden=True, help="For the processes of --processes.")
@click.option("--allow-download", is_flag=True, help="Fetch the model from the hub; needs --revision.")
@click.option("--revision", help="Commit of the hub's model.")
@click.pass_context
def encode(
    context: click.Context,
    /,
    city: Path,
    model: str,
    templates: Path | None,
    device: str,
    precision: str,
    max_pixels: int | None,
    batch: int | None,
    threads: int,
    processes: int,
    allow_download: bool,
    revision: str | None,
    **shared: Any,
) -> int:
    """Encode texts and images of CITY, a folder with regions.parquet, to prompt vectors with a frozen language model.

    What was encoded before and has not changed is taken from a cache, so that a run that was cut off goes on where it
    was.
    """
    job = EncodeJob(city=city, **shared)
    asked = load_templates(templates)
    for task in job.tasks:
        asked.question(task)
    read_regions(job.regions, asked.wording)  # a bad table is refused before minutes of loading
    if processes > 1:
        _in_processes(context, processes, job, device=device, threads=threads)
        return int(Exit.DONE)

    import torch

    from topt_deploy.model.training_device import check_device
    from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint, quiet
    from topt_deploy.prompts.pytorch.load import torch_encoder

    quiet()
    torch.set_num_threads(threads)
    check_device(device)
    checkpoint = open_checkpoint(model, allow_download=allow_download, revision=revision)
    if max_pixels is not None:
        checkpoint = replace(checkpoint, spec=limit_pixels(checkpoint.spec, max_pixels))
    batch = batch or (BATCH_ON_CUDA if device == "cuda" else 1)
    try:
        with joined(device) if launched() else nullcontext() as team:
            encoder = torch_encoder(checkpoint, device=device, precision=precision)
            among = f", {team.size} processes" if team else ""
            click.echo(f"{encoder.spec.identity} on {device} in {precision}{among}", err=True)
            # The first process's progress stands for all.
            with ProgressBar(quiet=team is not None and team.rank > 0) as progress:
                how: dict[str, Any] = {"batch": batch, "progress": progress}
                done = job.run_in(team, encoder, asked, **how) if team else job.run(encoder, asked, **how)
    except KeyboardInterrupt:
        if not job.no_cache:
            click.echo("interrupted; go on with the same command and --resume", err=True)
        raise
    if done is None:
        return int(Exit.DONE)
    click.echo(job.summary(done))
    return job.exit_code(done)


def _in_processes(context: click.Context, processes: int, job: EncodeJob, *, device: str, threads: int) -> None:
    """Run this very command in several processes; without a cache of the city's, they meet in one for the time."""
    check_team(processes, device)
    arguments = arguments_of(context, leave_out=("processes", "no_cache"))
    try:
        if not job.no_cache:
            run_team(arguments, processes, threads=threads)
            return
        with TemporaryDirectory() as folder:
            shared = ["--shared-cache", str(Path(folder, "prompts.sqlite"))]
            run_team([*arguments, *shared], processes, threads=threads)
    except KeyboardInterrupt:
        if not job.no_cache:
            click.echo("interrupted; go on with the same command and --resume", err=True)
        raise


def arguments_of(context: click.Context, leave_out: Sequence[str]) -> list[str]:
    """A command and its parameters as arguments again, but for some of them."""
    arguments = [str(context.info_name)]
    for parameter in context.command.params:
        value = context.params[str(parameter.name)]
        if parameter.name in leave_out or value is None or value is False:
            continue
        if isinstance(parameter, click.Argument):
            arguments.append(str(value))
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            arguments.append(parameter.opts[0])
        else:
            for one in value if parameter.multiple else [value]:
                arguments += [parameter.opts[0], str(one)]
    return arguments
