"""``topt-deploy build``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from topt_deploy.console import LOG_FORMATS, Log
from topt_deploy.errors import Exit, UsageError
from topt_deploy.progress import ProgressBar

_PATH = click.Path(path_type=Path)


@click.command("build")
@click.argument("recipe", type=_PATH, required=False)
@click.option("--out", type=_PATH, help="The city's folder; made where absent.")
@click.option("--init", type=_PATH, metavar="FOLDER", help="Look at the files there and print a recipe to correct.")
@click.option("--city", help="The city's name [default: the recipe's, or the folder's].")
@click.option("--regions", metavar="FILE[:LAYER]", help="Areas: GeoJSON, GeoPackage, shapefile, KML, GeoParquet, …")
@click.option("--id-col", metavar="COLUMN", help="Their column of ids.")
@click.option("--name-col", metavar="COLUMN", help="Their column of names for people.")
@click.option("--src-crs", metavar="EPSG:…", help="The reference system of a file of areas that states none.")
@click.option("--grid", metavar="h3:8|square:500m", help="Regions are the cells of a grid.")
@click.option("--boundary", metavar="FILE[:LAYER]", help="The outline that the grid covers.")
@click.option("--points", multiple=True, metavar="VIEW=FILE", help="Points of interest (repeatable).")
@click.option("--areas", multiple=True, metavar="VIEW=FILE", help="Land use and the like, in hectares (repeatable).")
@click.option("--flows", multiple=True, metavar="FILE", help="Trips between regions (repeatable).")
@click.option("--labels", multiple=True, metavar="TASK=FILE", help="Incidents to predict (repeatable).")
@click.option("--embeddings", multiple=True, metavar="VIEW=FILE", help="Numbers by region or by polygon (repeatable).")
@click.option("--history", is_flag=True, help="Labels' counts of the period before, as a view.")
@click.option("--from", "since", metavar="DATE", help="The period's first day, in the city's own time.")
@click.option("--to", "until", metavar="DATE", help="The day after its last.")
@click.option("--timezone", help="The city's, such as America/Chicago.")
@click.option(
    "--on-bad-row", type=click.Choice(["fail", "quarantine"]), help="Rows that cannot be read [default: fail]."
)
@click.option("--log-format", type=click.Choice(LOG_FORMATS), default="text", show_default=True, help="Text or JSON.")
def build(recipe: Path | None, out: Path | None, init: Path | None, log_format: str, **options: Any) -> int:
    """Build a city's regions.parquet and mobility.parquet from the files that cities publish.

    By a RECIPE, a TOML file, or by options. Exit code 3: rows that cannot be read were set aside in rejects.parquet.
    """
    log = Log(log_format)
    if init is not None:
        from ..datasets.build.init import write_recipe

        click.echo(write_recipe(init), nl=False)
        return Exit.DONE
    if out is None:
        raise UsageError("where the city goes is not stated", expected="--out FOLDER")
    import pyarrow as pa

    from ..datasets.build.city import build as build_city

    # Arrow's own allocator keeps what it has freed; here batches come and go.
    pa.set_memory_pool(pa.system_memory_pool())
    given = _recipe(recipe, options)
    changes = {name: options[name] for name in ("city", "since", "until", "timezone", "on_bad_row")}
    with ProgressBar("MB", quiet=log.json) as megabytes:
        report = build_city(
            given,
            out,
            progress=lambda done, total: megabytes(done // 10**6, total // 10**6) if done else None,
            **changes,
        )
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True) if log.json else None
    log.result(str(report), event="built", **report.as_dict())
    return Exit.PARTIAL if report.set_aside else Exit.DONE


def _recipe(path: Path | None, options: dict[str, Any]) -> Path | dict[str, Any]:
    """The recipe's file, or what the options say in the words of such a file."""
    from ..datasets.build.layers import split_layer

    direct = [name for name in ("regions", "grid", "boundary", "points", "areas", "flows", "labels", "embeddings",
                                "id_col", "name_col", "src_crs", "history") if options[name]]  # fmt: skip
    if path is not None:
        if direct:
            named = ", ".join("--" + name.replace("_", "-") for name in direct)
            raise UsageError("a recipe names its own sources", found=named, fix="write them into the recipe")
        return path
    if not options["regions"] and not options["grid"]:
        raise UsageError(
            "what the city is made from is not stated", expected="a RECIPE, or --regions FILE or --grid with sources",
            fix="topt-deploy build --init FOLDER > city.toml looks at your files and writes a recipe",
        )  # fmt: skip
    regions: dict[str, Any] = {"id": options["id_col"], "name": options["name_col"], "crs": options["src_crs"]}
    for key, given in (("file", options["regions"]), ("boundary", options["boundary"])):
        if given:
            regions[key], layer = split_layer(given)
            regions["layer"] = layer or regions.get("layer")
    regions["grid"] = options["grid"]
    return {
        "regions": {key: value for key, value in regions.items() if value is not None},
        "points": _by_name(options["points"], "--points VIEW=FILE"),
        "areas": _by_name(options["areas"], "--areas VIEW=FILE"),
        "labels": _by_name(options["labels"], "--labels TASK=FILE", history=options["history"]),
        "embeddings": _by_name(options["embeddings"], "--embeddings VIEW=FILE"),
        "flows": [_file(given) for given in options["flows"]],
    }


def _by_name(given: Sequence[str], form: str, history: bool = False) -> dict[str, list[dict[str, Any]]]:
    named: dict[str, list[dict[str, Any]]] = {}
    for one in given:
        name, equals, file = one.partition("=")
        if not equals or not name or not file:
            raise UsageError("not a name and a file", expected=form, found=one)
        named.setdefault(name, []).append(_file(file) | ({"history": True} if history else {}))
    return named


def _file(given: str) -> dict[str, Any]:
    from ..datasets.build.layers import split_layer

    file, layer = split_layer(given)
    return {"file": file} | ({"layer": layer} if layer else {})
