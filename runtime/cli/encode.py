"""``topt-run encode``."""

from pathlib import Path
from typing import Any

import click

from topt_deploy.console import Log
from topt_deploy.progress import ProgressBar
from topt_deploy.prompts.options import shared_options

from .options import PATH, device_option, encoder_engine_option, log_format_option, signature_option, threads_option


@click.command("encode")
@click.argument("regions", type=PATH)
@click.option("--bundle", type=PATH, required=True, help="A bundle with a prompt encoder.")
@shared_options
@encoder_engine_option
@device_option
@signature_option
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Regions at once.")
@threads_option
@log_format_option
def encode(
    regions: Path,
    bundle: Path,
    templates: Path | None,
    encoder_engine: str,
    device: str,
    require_signature: Path | None,
    batch: int,
    threads: int,
    log_format: str,
    **shared: Any,
) -> int:
    """Encode texts and images of REGIONS, a regions.parquet, to prompt vectors with the encoder of BUNDLE."""
    from topt_deploy.no_memory import end_without_memory
    from topt_deploy.prompts.encode_job import EncodeJob
    from topt_deploy.prompts.templates import load_templates

    from ..encoder_bundles import find_encoder
    from ..prompt_encoder import check_engine, load_encoder

    log = Log(log_format)
    log.listen()
    end_without_memory(log.error)
    check_engine(encoder_engine, device)
    used = [path for path in (templates, require_signature) if path is not None]
    job = EncodeJob(city=regions, read=used, bundles=[bundle], **shared)
    found = find_encoder(bundle, require_signature)
    opened = load_encoder(found, engine=encoder_engine, device=device, threads=threads)
    asked = load_templates(templates) if templates else opened.templates
    with ProgressBar(quiet=log.json) as progress:
        done = job.run(opened.encoder, asked, batch=batch, progress=progress)
    log.result(job.summary(done), **job.facts(done))
    return job.exit_code(done)
