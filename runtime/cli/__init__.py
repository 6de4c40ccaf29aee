"""``topt-run``: predict, inspect and test bundles on a machine without PyTorch. One command a file."""

import gc
import os

import click

from topt_deploy import __version__
from topt_deploy.console import run
from topt_deploy.pandas_blocker import without_pandas

from . import cache, check, encode, info, predict, selftest
from . import map as map_


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="topt-run")
def cli() -> None:
    """Predict counts per region of a city from an exported bundle."""


for command in (
    info.info, selftest.selftest, cache.cache, predict.predict, check.check, map_.map_command, encode.encode,
):  # fmt: skip
    command.context_settings.update(cli.context_settings)  # -h helps a command that is called by itself, too
    cli.add_command(command)


def main() -> None:
    """Entry point."""
    without_pandas()
    # By itself Python looks for garbage sixty times in all that is being imported, where there is none.
    gc.set_threshold(100_000)
    # Arrow's own allocator keeps what it has freed; at this size the system's costs nothing and halves the memory.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    run(cli, teardown=False)
