"""``topt-deploy build`` as a function: a process that is forked finds it by name here, and not in a test's module."""

IMPORTED = ("topt_deploy.train.cli.build", "topt_deploy.train.datasets.build.city", "shapely", "pyogrio", "pyproj")


def build(command: str) -> None:
    """The command, given as its arguments; it ends the process."""
    from topt_deploy.cli import cli
    from topt_deploy.console import run

    run(cli, ["build", *command.split()])
