"""Last night's predictions as a page of maps that needs no other file, no network and no PyTorch."""

from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.data.columns import GEOMETRY, REGION_ID, TableReader, floats, strings
from topt_deploy.data.geometry import geo_library, read_shapes
from topt_deploy.drawing.outlines import Outlines, point_outlines, polygon_outlines, project_m
from topt_deploy.drawing.scales import BLUES, PURPLES, Scale, number, sequential
from topt_deploy.errors import BadData, BadRows, NoInput, how_many
from topt_deploy.intended_use import INTENDED_USE
from topt_deploy.storage.os_errors import check_place
from topt_deploy.storage.text_files import write_text

from .read_predictions import Predicted, PredictionFile, read_predictions

Array = np.ndarray[Any, Any]

STYLE = Path(__file__).with_name("map_page.css")
SHOWN = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class _Place:
    """Where a city's regions are, in the order of the predictions, and what people call them."""

    outlines: Outlines
    names: list[str]


def write_map(predictions: Path, out: Path, *, regions: Path | None = None) -> int:
    """Write the page atomically; the same files give the same bytes.

    Args:
        predictions: What ``topt-run predict`` wrote.
        out: The page.
        regions: The table that was predicted from, for shapes, positions and names that the predictions lack; by
            default the receipt's.

    Returns:
        Its size in bytes.

    Raises:
        NoInput, BadData: If a file is absent, or nothing tells where the regions are.
    """
    check_place(out)
    found = read_predictions(predictions)
    page = _page(found, _place(found, regions))
    write_text(out, page)
    return len(page.encode())


def _place(found: PredictionFile, given: Path | None) -> _Place:
    recorded = found.receipt.get("inputs", {}).get("regions", {})
    named = given or (Path(str(recorded["file"])) if isinstance(recorded, dict) and recorded.get("file") else None)
    names, source, order = found.region_id.tolist(), None, None
    if named is not None and (given is not None or named.exists()):
        source = TableReader(named, BadRows.REGIONS)
        ids = np.array([str(value) for value in strings(source, REGION_ID, "write the ids as strings")])
        order = _order(ids, found.region_id, named)
        if source.has("name"):
            told = source.column("name").to_pylist()
            names = [
                f"{told[i]} ({region})" if told[i] else region
                for i, region in zip(order.tolist(), found.region_id.tolist(), strict=True)
            ]
    return _Place(outlines=_outlines(found, source, order), names=names)


def _order(ids: Array, wanted: Array, path: Path) -> Array:
    """Where each of the predictions' regions stands in the table."""
    place = {region: row for row, region in enumerate(ids.tolist())}
    absent = [region for region in wanted.tolist() if region not in place]
    if absent:
        raise BadData(
            "has not the regions that were predicted", file=path, column=REGION_ID, ids=absent,
            fix="name the table that was predicted from: --regions",
        )  # fmt: skip
    return np.array([place[region] for region in wanted.tolist()])


def _outlines(found: PredictionFile, source: TableReader | None, order: Array | None) -> Outlines:
    if found.geometry is not None:
        return _drawn(read_shapes(found.geometry, str(found.path), found.region_id))
    if source is not None and order is not None:
        if source.has(GEOMETRY):
            from topt_deploy.data.geometry import with_geo_key

            table = source.table if source.file is None else with_geo_key(source.table, source.file)
            return _drawn(read_shapes(table.select([GEOMETRY]), source.name, found.region_id)[order])
        if source.has("lon") and source.has("lat"):
            ids = found.region_id
            lonlat = np.stack([floats(source, ids, axis)[order] for axis in ("lon", "lat")], axis=1)
            return point_outlines(project_m(lonlat, centre=lonlat[0]))
    raise NoInput(
        "nothing tells where the regions are", file=found.path, expected="a geometry, or lon and lat",
        fix="name the table that was predicted from: --regions regions.parquet",
    )  # fmt: skip


def _drawn(shapes: Array) -> Outlines:
    shapely = geo_library("shapely")
    areas = [shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON]
    if np.isin(shapely.get_type_id(shapes), areas).all():
        return polygon_outlines(shapes)
    lonlat = shapely.get_coordinates(shapely.centroid(shapes))
    return point_outlines(project_m(lonlat, centre=lonlat[0]))


def _page(found: PredictionFile, place: _Place) -> str:
    city = found.city or found.path.resolve().parent.name
    when = str(found.receipt.get("started", ""))[:10]
    about = [how_many(len(found.region_id), "region")] + ([f"predicted {when}"] if when else [])
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(city)}: predictions</title>",
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>",
        f'<p class="over">Predictions</p><h1>{escape(city)}</h1><p class="soft">{escape(", ".join(about))}</p>',
        _defs(place.outlines),
    ]
    parts += [_task(name, task, found, place) for name, task in found.tasks.items()]
    parts.append("<h2>Intended use</h2>" + "".join(f"<p>{escape(text)}</p>" for text in INTENDED_USE))
    bundle = found.receipt.get("bundle", {})
    if isinstance(bundle, dict) and bundle.get("sha256"):
        parts.append(f'<p class="small">Predicted by the bundle with SHA-256 {escape(str(bundle["sha256"]))}.</p>')
    return "\n".join([*parts, "</main></body></html>\n"])


def _defs(outlines: Outlines) -> str:
    paths = "".join(f'<path id="r{i}" fill-rule="evenodd" d="{path}"/>' for i, path in enumerate(outlines.paths))
    return (
        '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
        '<pattern id="hatch" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<path d="M0 0V4" stroke="#1d2430" stroke-width="1" opacity=".6"/></pattern>'
        f"{paths}</defs></svg>"
    )


def _task(name: str, task: Predicted, found: PredictionFile, place: _Place) -> str:
    title = escape(name.replace("_", " ").capitalize())
    known = ~np.isnan(task.value)
    if not known.any():
        return f"<section><h2>{title}</h2><p>No region has a prediction.</p></section>"
    tips = [_tip(place.names[i], task, i) for i in range(len(place.names))]
    hatched = task.status == "extrapolated"
    width = task.upper - task.lower
    blues, purples = partial(sequential, colours=BLUES), partial(sequential, colours=PURPLES)
    maps = [_map(f"{title}, predicted counts", task.value, place.outlines, tips, hatched, blues)]
    if not np.isnan(width).all():
        maps.append(_map(f"{title}, width of the interval", width, place.outlines, tips, hatched, purples))
    told = [f"{number(float(task.value[known].sum()))} in all"]
    if beyond := int(hatched.sum()):
        told.append(
            f"{how_many(beyond, 'region (hatched) lies', 'regions (hatched) lie')} beyond what the model was trained on"
        )
    if absent := int((~known).sum()):
        told.append(how_many(absent, "region has", "regions have") + " no prediction")
    return (
        f"<section><h2>{title}</h2><p>{escape('; '.join(told))}.</p>"
        f'<div class="pair">{"".join(maps)}</div>{_table(task, place, found)}</section>'
    )


def _tip(name: str, task: Predicted, i: int) -> str:
    if np.isnan(task.value[i]):
        return f"{name}\nno prediction"
    lines = [name, f"predicted {number(float(task.value[i]))}"]
    if not np.isnan(task.lower[i]):
        lines.append(f"interval {number(float(task.lower[i]))} to {number(float(task.upper[i]))}")
    return "\n".join(lines + (["beyond the training range"] if task.status[i] == "extrapolated" else []))


def _map(label: str, values: Array, drawn: Outlines, tips: list[str], hatched: Array, scale: Any) -> str:
    known = ~np.isnan(values)
    classes: Scale = scale(values[known])
    marks = []
    for i, value in enumerate(values.tolist()):
        look = f'fill="{classes.colour(value)}"' if known[i] else 'class="empty"'
        marks.append(f'<use href="#r{i}" {look}><title>{escape(tips[i])}</title></use>')
        if hatched[i]:
            marks.append(f'<use href="#r{i}" class="hatch"/>')
    points = ' class="points"' if drawn.points else ""
    low, high = classes.labels()[0], classes.labels()[-1]
    bar = drawn.height + 6
    return (
        f"<figure><figcaption>{label}</figcaption>"
        f'<svg class="map" role="img" aria-label="{label}: from {low} to {high}"'
        f' viewBox="0 0 {drawn.width:.1f} {drawn.height + 18:.1f}"><g stroke-width="{drawn.line:.2f}"{points}>'
        f'{"".join(marks)}</g><g class="axis"><path d="M4 {bar:.1f}v4h{drawn.bar:.1f}v-4"/>'
        f'<text x="{drawn.bar + 10:.1f}" y="{bar + 5:.1f}">{number(drawn.bar_km)} km</text></g></svg>'
        f"{_legend(classes)}</figure>"
    )


def _legend(scale: Scale) -> str:
    swatch = 280 / len(scale.colours)
    boxes = "".join(
        f'<rect x="{20 + i * swatch:.1f}" y="4" width="{swatch:.1f}" height="10" fill="{colour}"/>'
        for i, colour in enumerate(scale.colours)
    )
    labels = scale.labels()
    texts = "".join(
        f'<text x="{20 + i * swatch if len(labels) > 1 else 160:.1f}" y="26" text-anchor="middle">{text}</text>'
        for i, text in enumerate(labels)
    )
    told = ", ".join(labels)
    head = f'<svg class="legend" role="img" aria-label="classes end at {told}" viewBox="0 0 320 30">'
    return f"{head}{boxes}{texts}</svg>"


def _table(task: Predicted, place: _Place, found: PredictionFile) -> str:
    """The regions with the largest predictions."""
    order = np.lexsort((found.region_id, -np.nan_to_num(task.value, nan=-1.0)))[:SHOWN]
    rows = "".join(_row(place.names[i], task, int(i)) for i in order if not np.isnan(task.value[i]))
    return (
        "<details><summary>Largest predictions</summary><table><thead><tr><th>Region</th><th>Predicted</th>"
        f"<th>Interval</th></tr></thead><tbody>{rows}</tbody></table></details>"
    )


def _row(name: str, task: Predicted, i: int) -> str:
    span = "–"
    if not np.isnan(task.lower[i]):
        span = f"{number(float(task.lower[i]))} to {number(float(task.upper[i]))}"
    return f"<tr><th>{escape(name)}</th><td>{number(float(task.value[i]))}</td><td>{span}</td></tr>"
