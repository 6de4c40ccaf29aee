"""Commands that bring data in: ``topt-deploy import hafusion`` and ``topt-deploy sample``."""

from pathlib import Path

import click

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


@click.group("import")
def import_group() -> None:
    """Turn published research data into regions.parquet and mobility.parquet."""


@import_group.command("hafusion")
@click.argument("directory", type=FOLDER)
@click.option("--city", required=True, help="Which of the clone's data_<CITY> folders: Chi, NY or SF.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the two files; it is made if it is missing.")
@click.option("--prompt4re", type=FOLDER, help="Clone of Prompt4RE: Chicago's coordinates, texts and prompts.")
@click.option("--encoder", type=click.Choice(["llama", "qwen"]), help="Prompt vectors to take [default: none].")
@click.option("--geometry", type=FILE, help="The regions' places: GeoJSON, GeoPackage, shapefile, Parquet or CSV.")
@click.option("--geometry-id", metavar="COLUMN", help="Column of --geometry with each region's number, from 1.")
@click.option(
    "--geometry-order",
    type=click.Choice(["position"]),
    help="Trust that the features of --geometry are in the published order.",
)
@click.option("--geometry-name", metavar="COLUMN", help="Column of --geometry with the regions' names.")
@click.option("--src-crs", metavar="EPSG:…", help="The reference system of a --geometry file that states none.")
def hafusion(
    directory: Path,
    city: str,
    out: Path,
    prompt4re: Path | None,
    encoder: str | None,
    geometry: Path | None,
    geometry_id: str | None,
    geometry_order: str | None,
    geometry_name: str | None,
    src_crs: str | None,
) -> None:
    """Import a city from DIRECTORY, a clone of HAFusion's repository."""
    from ..datasets.hafusion import import_hafusion

    report = import_hafusion(
        directory,
        city,
        out=out,
        prompt4re=prompt4re,
        encoder=encoder,
        geometry=geometry,
        geometry_id=geometry_id,
        geometry_by_position=geometry_order == "position",
        geometry_name=geometry_name,
        src_crs=src_crs,
    )
    click.echo(report)


@click.command("sample")
@click.option("--out", type=FOLDER, required=True, help="Folder for the files; it is made if it is missing.")
@click.option("--regions", default=120, show_default=True, help="How many regions the city has.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option("--raw", is_flag=True, help="Write what publishers would: GeoJSON, CSV, trip records, and a recipe.")
def sample(out: Path, regions: int, seed: int, raw: bool) -> None:
    """Make up a synthetic city with known truth, to try the whole chain on."""
    from ..datasets.sample import make_sample
    from ..datasets.sample_raw import make_raw

    click.echo(make_raw(out, regions=regions, seed=seed) if raw else make_sample(out, regions=regions, seed=seed))
