"""The made-up city as publishers would give it away: areas, points, trips and incidents, with their usual dirt.

What ``topt-deploy build`` counts in these files is the city of :mod:`.sample`, region by region. The dirt (blank
positions, positions at (0, 0) and outside, incidents told twice, trips to unknown zones, a mark before the first
column) is what has to be told apart from it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from topt_deploy.data.geometry import geo_library
from topt_deploy.data.parquet import write_parquet
from topt_deploy.errors import ToptError
from topt_deploy.storage.atomic import atomic_file
from topt_deploy.storage.os_errors import read_plain, writing
from topt_deploy.storage.outputs import check_outputs
from topt_deploy.storage.text_files import write_text

from .sample import CITY, Drawn, draw_city
from .sample_recipe import LAND_USE, POI

Array = np.ndarray[Any, Any]

RECIPE = "city.toml"
YEAR = np.datetime64("2025-01-01T00:00:00")
YEAR_S = 365 * 24 * 3600
DIRT = 0.01
"""Share of rows that are blank, at (0, 0), outside or told twice, each."""
TEXT = """\
# The synthetic demo city from raw files. Nothing in it is real.
city = "{city}"
timezone = "Atlantic/Azores"
from = 2025-01-01
to = 2026-01-01

[regions]
file = "areas.geojson"
id = "area_id"
name = "area_name"

[points.poi]
file = "pois.csv"
category = "category"
categories = "own"
key = "poi_id"

[areas.land_use]
file = "zoning.geojson"
category = "zone"
categories = "own"

[[flows]]
file = "trips.parquet"
origin = "from_area"
dest = "to_area"
date = "started_at"
"""
LABELS = """
[labels.{task}]
file = "{task}.csv"
date = "reported"
key = "case"
"""


@dataclass(frozen=True, kw_only=True)
class RawReport:
    """The written rows, by file."""

    out: Path
    rows: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{CITY}: a synthetic city as raw files; nothing in it is real"]
        lines += [f"  {name:<18} {rows:,} rows" for name, rows in self.rows.items()]
        return "\n".join([*lines, f"next: topt-deploy build {self.out / RECIPE} --out {self.out.parent / 'city'}"])


def make_raw(out: Path, *, regions: int = 120, seed: int = 0) -> RawReport:
    """Write the raw files and their recipe; the same number and seed give the same bytes.

    Args:
        out: Their folder, made where absent.
        regions: N, at least 20.
        seed: Of all that is random.

    Raises:
        UsageError: If there are too few regions to be a city, or files of these names that are no older sample.
        CannotCreate, IOFailure: If the operating system refuses.
    """
    drawn = draw_city(regions, seed)
    rng = np.random.default_rng([seed, 1])
    out = Path(out)
    recipe = TEXT.format(city=CITY)
    names = ["areas.geojson", "zoning.geojson", "pois.csv", "trips.parquet", *(f"{task}.csv" for task in drawn.labels)]
    check_outputs([out / name for name in (RECIPE, *names)], ours=lambda file: _begins(out / RECIPE, recipe))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    rows = {"areas.geojson": _areas(out, drawn), "zoning.geojson": _zoning(out, drawn)}
    rows["pois.csv"] = _pois(out, drawn, rng)
    rows["trips.parquet"] = _trips(out, drawn, rng)
    for task, counts in drawn.labels.items():
        rows[f"{task}.csv"] = _incidents(out / f"{task}.csv", drawn, counts, rng)
    labels = "".join(LABELS.format(task=task) for task in drawn.labels)
    write_text(out / RECIPE, recipe + labels)
    return RawReport(out=out, rows=rows)


def _begins(file: Path, text: str) -> bool:
    """Tell if a recipe is that of an older sample."""
    try:
        return read_plain(file, 1 << 20).startswith(text.encode())
    except ToptError:
        return False


def _areas(out: Path, drawn: Drawn) -> int:
    properties = [{"area_id": str(i), "area_name": f"District {int(str(i)[1:])}"} for i in drawn.ids]
    _geojson(out / "areas.geojson", properties, drawn.land.cells)
    return len(properties)


def _zoning(out: Path, drawn: Drawn) -> int:
    """Each region cut from west to east into strips with the shares of its land use."""
    shapely = geo_library("shapely")
    properties, shapes = [], []
    for cell, hectares in zip(drawn.land.cells, drawn.land_use, strict=True):
        west, south, east, north = shapely.bounds(cell).tolist()
        cuts = np.cumsum(hectares) / hectares.sum()
        grid = np.linspace(west, east, 400)
        below = shapely.area(shapely.intersection(cell, shapely.box(west - 1, south, grid, north))) / shapely.area(cell)
        edges = [west - 1, *np.interp(cuts[:-1], below, grid), east + 1]
        for name, left, right in zip(LAND_USE, edges[:-1], edges[1:], strict=True):
            strip = shapely.intersection(cell, shapely.box(left, south, right, north))
            if shapely.area(strip) > 0:
                properties.append({"zone": name})
                shapes.append(strip)
    _geojson(out / "zoning.geojson", properties, np.array(shapes, dtype=object))
    return len(properties)


def _geojson(path: Path, properties: list[dict[str, str]], shapes: Array) -> None:
    made = [
        {"type": "Feature", "properties": facts, "geometry": json.loads(text)}
        for facts, text in zip(properties, geo_library("shapely").to_geojson(shapes), strict=True)
    ]
    write_text(path, json.dumps({"type": "FeatureCollection", "features": made}) + "\n")


def _pois(out: Path, drawn: Drawn, rng: np.random.Generator) -> int:
    kinds = np.concatenate([np.repeat(list(POI), counts) for counts in drawn.poi])
    lon, lat = _inside(drawn, drawn.poi.sum(axis=1), rng)
    columns = {"poi_id": np.arange(1, len(kinds) + 1).astype(str), "category": kinds}
    return _write_rows(out / "pois.csv", columns, lon, lat, rng, key="poi_id")


def _incidents(path: Path, drawn: Drawn, counts: Array, rng: np.random.Generator) -> int:
    lon, lat = _inside(drawn, counts, rng)
    moments = YEAR + rng.integers(YEAR_S, size=len(lon)).astype("m8[s]")
    columns = {
        "case": np.array([f"A{number:07d}" for number in range(1, len(lon) + 1)]),
        "reported": np.array([moment.item().strftime("%Y-%m-%d %H:%M:%S") for moment in moments]),
    }
    return _write_rows(path, columns, lon, lat, rng, key="case")


def _inside(drawn: Drawn, counts: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """As many positions in each region, off its border, with five decimals (about a metre)."""
    shapely = geo_library("shapely")
    found = []
    for cell, wanted in zip(drawn.land.cells, counts.tolist(), strict=True):
        inner = shapely.buffer(cell, -2e-5)
        west, south, east, north = shapely.bounds(inner).tolist()
        points = np.empty((0, 2))
        while len(points) < wanted:
            tried = rng.uniform((west, south), (east, north), size=(2 * wanted + 10, 2)).round(5)
            points = np.concatenate([points, tried[shapely.contains_xy(inner, tried)]])
        found.append(points[:wanted])
    lon, lat = np.concatenate(found).T
    return lon, lat


def _write_rows(
    path: Path, columns: dict[str, Array], lon: Array, lat: Array, rng: np.random.Generator, *, key: str
) -> int:
    """A CSV file in random order, with a mark before its first column and dirt among its rows."""
    n = len(lon)
    table = {**columns, "longitude": np.char.mod("%.5f", lon), "latitude": np.char.mod("%.5f", lat)}
    some = rng.choice(n, size=(4, max(1, round(DIRT * n))))
    extra = {name: [values] for name, values in table.items()}
    for place, rows in enumerate(some):
        for name, values in table.items():
            part = values[rows]
            if name == key and place < 3:
                part = np.array([f"{value}-{place}" for value in part])
            if name in ("longitude", "latitude") and place < 3:
                part = np.full(len(rows), ("", "0", "10.00000")[place])
            extra[name].append(part)
    order = rng.permutation(n + some.size)
    whole = pa.table({name: np.concatenate(parts)[order] for name, parts in extra.items()})
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        stream.write("\N{BYTE ORDER MARK}".encode())
        pacsv.write_csv(whole, stream, pacsv.WriteOptions(quoting_style="needed"))
    return len(whole)


def _trips(out: Path, drawn: Drawn, rng: np.random.Generator) -> int:
    origin, dest, flow = drawn.flows
    start, end = np.repeat(drawn.ids[origin], flow), np.repeat(drawn.ids[dest], flow)
    lost = max(1, round(DIRT * len(start)))
    start = np.concatenate([start, np.full(lost, "D999")])
    end = np.concatenate([end, rng.choice(drawn.ids, size=lost)])
    order = rng.permutation(len(start))
    moments = YEAR + rng.integers(YEAR_S, size=len(start)).astype("m8[s]")
    columns = {"started_at": moments.astype("M8[us]"), "from_area": start[order], "to_area": end[order]}
    write_parquet(out / "trips.parquet", pa.table(columns))
    return len(start)
