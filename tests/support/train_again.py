"""``topt-deploy train`` as a function, and what goes on with it: a process that is forked finds it by name here,
where it would not find a test's module."""

from pathlib import Path

from topt_deploy.run_folder import RUN_FILE

FRESH, GO_ON = "topt-deploy train . --out run", "the same with --resume where it has begun"
IMPORTED = ("torch", "torch._dynamo", "sklearn.ensemble", "topt_deploy.train.cli.train", "topt_deploy.train.run")
_ARGUMENTS = ("train", ".", "--out", "run")


def train(command: str) -> None:
    """Either command, where the city is; it ends the process."""
    from topt_deploy.cli import cli
    from topt_deploy.console import run

    there = Path("run", RUN_FILE)
    if command == GO_ON and there.exists() and '"finished": true' in there.read_text():
        return
    run(cli, [*_ARGUMENTS, *(["--resume"] if command == GO_ON and there.exists() else [])])
