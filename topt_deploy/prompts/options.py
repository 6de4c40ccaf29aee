"""The options that `topt-deploy encode` and `topt-run encode` share; listing them must import nothing large."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

REGIONS, OUT, CACHE = "regions.parquet", "prompts.parquet", Path(".topt", "prompts.sqlite")
TASKS = ("crime", "check_in", "service_call")

_PATH = click.Path(path_type=Path, readable=False)  # what cannot be read is refused where it is read, with its code
_OPTIONS = (
    click.option("--task", "tasks", multiple=True, help=f"Task (repeatable) [default: {', '.join(TASKS)}]."),
    click.option("--templates", type=_PATH, help="TOML file with tasks and wordings of your own."),
    click.option("--out", type=_PATH, help=f"[default: {OUT} beside the regions]"),
    click.option("--update-regions", is_flag=True, help="Also put the vectors into the regions' own file."),
    click.option("--images-root", type=_PATH, help="Folder that images lie below [default: that of the regions]."),
    click.option(
        "--on-bad-image",
        type=click.Choice(["fail", "skip"]),
        default="fail",
        show_default=True,
        help="Leave a region with an unreadable image out, with the reason, instead of failing.",
    ),
    click.option("--resume", is_flag=True, help="Continue a run that was cut off; the command fails if there is none."),
    click.option("--no-cache", is_flag=True, help=f"Neither read nor write {CACHE} beside the regions."),
)  # fmt: skip


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that :class:`.encode_job.Job` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
