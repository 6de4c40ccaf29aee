"""``topt-deploy``: commands by name. A stage is imported when its command is called, and not before."""

import sys

import click

from . import __version__
from .console import LazyGroup, run
from .pandas_blocker import without_pandas

_COMMANDS = {
    "build": ("topt_deploy.train.cli.build:build", "Build a city from the files that cities publish."),
    "sample": ("topt_deploy.train.cli.datasets:sample", "Make up a synthetic city to try everything on."),
    "import": ("topt_deploy.train.cli.datasets:import_group", "Turn published research data into a city."),
    "encode": ("topt_deploy.train.cli.encode:encode", "Turn texts and images into prompt vectors with a frozen model."),
    "train": ("topt_deploy.train.cli.train:train", "Train both stages on a city."),
    "evaluate": ("topt_deploy.train.cli.evaluate:evaluate", "Compare methods on labels that were held out."),
    "report": (
        "topt_deploy.train.cli.report:report",
        "Show a run's maps, errors and their pattern on one HTML page.",
    ),
    "export": (
        "topt_deploy.export.cli.export:export",
        "Export a trained run as a bundle, behind the parity gate.",
    ),
    "sign": ("topt_deploy.export.cli.sign:sign", "Sign a bundle with a private key."),
}
"""The module and the short help of each command, as text: listing commands must not import PyTorch."""


class _Listed(LazyGroup):
    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(
    cls=_Listed,
    places={name: place for name, (place, _) in _COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="topt-deploy")
def cli() -> None:
    """Train ToPT on a city and export it; topt-run then predicts without PyTorch."""


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["build"]:  # training may need pandas, for libraries that others add
        without_pandas()
    run(cli)
