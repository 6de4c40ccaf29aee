"""``topt-deploy export``."""

from pathlib import Path

import click

from topt_deploy.bundle import SUFFIX
from topt_deploy.runs import RUNS_DIR, newest_run, open_run

DEFAULT_OUT = f"model{SUFFIX}"


@click.command("export")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option(
    "--format", "form", type=click.Choice(["onnx"]), default="onnx", show_default=True, help="What to export."
)
@click.option("--out", type=click.Path(path_type=Path), help=f"Bundle [default: {DEFAULT_OUT} beside runs/].")
@click.option("--zip", "as_zip", is_flag=True, help="Write the bundle as one zip file.")
def export(run: Path | None, form: str, out: Path | None, as_zip: bool) -> None:
    """Export RUN as a bundle that topt-run predicts with. RUN is the newest finished one under ./runs."""
    opened = open_run(run) if run else newest_run(Path(), finished=True)
    if out is None:
        folder = opened.path.parent
        out = (folder.parent if folder.name == RUNS_DIR else folder) / DEFAULT_OUT

    from .bundle import export_bundle

    done = export_bundle(opened, out, say=lambda text: click.echo(text, err=True), as_zip=as_zip)
    click.echo(f"bundle {done.path}: {done.bytes / 1e6:.1f} MB, parity passed on {len(done.parity)} cities")
    regions = out.with_name("regions.parquet")
    found = regions.exists() and out.name == DEFAULT_OUT
    click.echo(f"next: topt-run predict {regions}" if found else f"next: topt-run predict REGIONS --bundle {out}")
