"""Options that several commands of ``topt-run`` have."""

from pathlib import Path

import click

from topt_deploy.bundle import SIGNATURE_VARIABLE
from topt_deploy.console import LOG_FORMATS

PATH = click.Path(path_type=Path, readable=False)  # what cannot be read is refused where it is read, with its code


log_format_option = click.option(
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    default="text",
    show_default=True,
    help="Messages as text or JSON.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "tensorrt", "auto"]),
    default="cpu",
    show_default=True,
    help="The command fails if the device is missing; auto takes the best that works and says why.",
)
encoder_engine_option = click.option(
    "--encoder-engine",
    type=click.Choice(["onnxruntime", "openvino"]),
    default="onnxruntime",
    show_default=True,
    help="Library that runs the prompt encoder; the command fails if it is missing.",
)
signature_option = click.option(
    "--require-signature",
    type=PATH,
    metavar="KEY",
    envvar=SIGNATURE_VARIABLE,
    help=f"Refuse a bundle that the holder of this key (public, PEM) did not sign [default: ${SIGNATURE_VARIABLE}].",
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads for the model."
)
