"""``topt-deploy report``."""

from pathlib import Path

import click

from topt_deploy.run_folder import newest_run, open_run

DEFAULT_OUT = "report.html"


@click.command("report")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option("--out", type=click.Path(path_type=Path), help=f"The page [default: {DEFAULT_OUT} in the run's folder].")
@click.option(
    "--evaluation", type=click.Path(path_type=Path), help="Also show the results in this folder of `evaluate --out`."
)
@click.option("--check", type=click.Path(path_type=Path), help="Also show this result of `topt-run check --out`.")
def report(run: Path | None, out: Path | None, evaluation: Path | None, check: Path | None) -> None:
    """Report on RUN as one HTML page: maps, errors and their pattern. RUN is the newest finished one under ./runs."""
    opened = open_run(run) if run else newest_run(Path(), finished=True)
    out = out or opened.path / DEFAULT_OUT

    from ..report.page import write_report

    written = write_report(opened, out, evaluation, check)
    click.echo(f"report {out}: {written / 1e6:.1f} MB; open it in a browser")
