"""``topt-run encode``."""

from pathlib import Path
from typing import Any

import click

from topt_deploy.commandline import Lines, Log
from topt_deploy.encoder.command import shared_options

engine_option = click.option(
    "--engine",
    type=click.Choice(["onnxruntime", "openvino"]),
    default="onnxruntime",
    show_default=True,
    help="What runs the prompt encoder; an absent one is an error.",
)


@click.command("encode")
@click.argument("regions", type=click.Path(path_type=Path, readable=False))
@click.option(
    "--bundle", type=click.Path(path_type=Path, readable=False), required=True, help="A bundle with a prompt encoder."
)
@shared_options
@engine_option
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Regions at once.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads for the model.")
def encode(
    regions: Path,
    bundle: Path,
    templates: Path | None,
    engine: str,
    batch: int,
    threads: int,
    log_format: str,
    **shared: Any,
) -> None:
    """Encode texts and images of REGIONS, a regions.parquet, to prompt vectors with the encoder of BUNDLE."""
    from topt_deploy.encoder.job import Job
    from topt_deploy.encoder.templates import load_templates

    from .encoder import locate, open_encoder

    job = Job(city=regions, **shared)
    path, inside = locate(bundle)
    opened = open_encoder(path, inside=inside, engine=engine, threads=threads)
    log = Log(log_format)
    asked = load_templates(templates) if templates else opened.templates
    done = job.run(opened.encoder, asked, batch=batch, progress=(lambda *_: None) if log.json else Lines())
    log.result(job.summary(done), **job.facts(done))
