"""The commands of ``topt-run`` by name."""

import click

from topt_deploy import __version__
from topt_deploy.console import LazyGroup

PLACES = {
    "predict": "topt_deploy.runtime.cli.predict:predict",
    "map": "topt_deploy.runtime.cli.map:map_command",
    "check": "topt_deploy.runtime.cli.check:check",
    "info": "topt_deploy.runtime.cli.info:info",
    "selftest": "topt_deploy.runtime.cli.selftest:selftest",
    "encode": "topt_deploy.runtime.cli.encode:encode",
    "cache": "topt_deploy.runtime.cli.cache:cache",
}
"""The module and the name in it of each command."""


@click.group(cls=LazyGroup, places=PLACES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="topt-run")
def cli() -> None:
    """Predict counts per region of a city from an exported bundle."""
