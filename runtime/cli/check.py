"""``topt-run check``."""

from pathlib import Path

import click

from topt_deploy.console import Log
from topt_deploy.errors import Exit

from .options import log_format_option

_PATH = click.Path(path_type=Path, readable=False)


@click.command("check")
@click.argument("predictions", type=_PATH)
@click.option("--labels", type=_PATH, required=True, help="What was counted since: regions.parquet of that period.")
@click.option("--bundle", type=_PATH, help="What predicted [default: model.topt beside, else the receipt's].")
@click.option("--tolerance", type=click.FloatRange(min=0), default=1.25, show_default=True,
              help="How many times the promised error may be.")  # fmt: skip
@click.option("--out", type=_PATH, help="Also write the result as JSON.")
@click.option("--metrics-file", type=_PATH, help="Figures for Prometheus' node_exporter: FILE.prom.")
@log_format_option
def check(
    predictions: Path,
    labels: Path,
    bundle: Path | None,
    tolerance: float,
    out: Path | None,
    metrics_file: Path | None,
    log_format: str,
) -> int:
    """Compare PREDICTIONS with what was counted since, and with what training promised.

    Exit code 0: that holds. 3: it does not, so tell someone, and train again.
    """
    from topt_deploy.storage.text_files import write_json, write_text

    from ..check_predictions import check_predictions

    found = check_predictions(predictions, labels, bundle=bundle, tolerance=tolerance)
    if out is not None:
        write_json(out, found.as_dict())
    if metrics_file is not None:
        write_text(metrics_file, found.metrics())
    Log(log_format).result(found.text(), event="checked", **found.as_dict())
    return Exit.PARTIAL if found.broken else Exit.DONE
