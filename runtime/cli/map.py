"""``topt-run map``."""

from pathlib import Path

import click

from topt_deploy.console import Log

from .options import log_format_option

_PATH = click.Path(path_type=Path, readable=False)


@click.command("map")
@click.argument("predictions", type=_PATH)
@click.option("--out", type=_PATH, help="The page [default: map.html beside the predictions].")
@click.option("--regions", type=_PATH, help="Shapes and names [default: the table that was predicted from].")
@log_format_option
def map_command(predictions: Path, out: Path | None, regions: Path | None, log_format: str) -> None:
    """Show PREDICTIONS as maps, on one HTML page that needs no other file and no network."""
    from ..map_page import write_map

    place = out or predictions.with_name("map.html")
    size = write_map(predictions, place, regions=regions)
    Log(log_format).result(f"map {place} ({size / 1e6:.1f} MB)", event="map", file=str(place), bytes=size)
