"""How fast points are counted per region: against reading the same columns alone, and against geopandas.

    python dev/benchmarks/build.py --points 5000000 --csv 1000000
    python dev/benchmarks/build.py --points 100000000 --csv 20000000 --geopandas 5000000 --write-docs

The city has 2,000 regions whose common borders are as crooked as real ones (some hundred corners each). Every figure is
a process of its own: its time, the time that all its threads had a processor, and the most memory that it held (VmHWM
of /proc/self/status). What is compared is measured in one run, one after the other. Ratios are of processor time, which
a busy machine changes little; the time of a clock, with two threads, is beside it.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import shapely

REGIONS = 2000
PIECES = 16
CATEGORIES = ("restaurant", "bar", "cafe", "school", "hotel", "bank", "park", "library", "museum", "fuel")
AT_ONCE = 1_000_000
DOCS = Path(__file__).resolve().parents[2] / "docs" / "background"


def crooked(shapes: Any) -> Any:
    """Polygons whose common borders have many corners, the same on both sides."""

    def border(a: tuple[float, float], b: tuple[float, float]) -> list[tuple[float, float]]:
        low, high = min(a, b), max(a, b)
        rng = np.random.default_rng(abs(hash((low, high))) % 2**32)
        along = np.linspace(0, 1, PIECES + 1)[1:-1]
        step = np.array(high) - np.array(low)
        wave = np.cumsum(rng.normal(size=PIECES - 1)) * 0.01
        wave -= along * wave[-1]
        points = np.array(low) + along[:, None] * step + wave[:, None] * np.array([-step[1], step[0]])
        inner = [tuple(point) for point in points.tolist()]
        return inner if (low, high) == (a, b) else inner[::-1]

    made = []
    for shape in shapes:
        ring = list(shape.exterior.coords)
        corners = [p for a, b in pairwise(ring) for p in (a, *border(a, b))]
        made.append(shapely.Polygon(corners))
    return shapely.make_valid(np.array(made, dtype=object))


def make_city(folder: Path, points: int, rows: int, few: int) -> None:
    """Write areas.geojson, points.parquet, points.csv and, for geopandas, few.parquet."""
    rng = np.random.default_rng(0)
    west, south, east, north = -88.0, 41.6, -87.5, 42.1
    seeds = rng.uniform((west, south), (east, north), size=(REGIONS, 2))
    outline = shapely.box(west, south, east, north)
    cells = shapely.get_parts(shapely.voronoi_polygons(shapely.multipoints(seeds), extend_to=outline))
    cells = crooked(shapely.intersection(cells, outline))
    features = [
        {"type": "Feature", "properties": {"id": f"R{i:04d}"}, "geometry": json.loads(shapely.to_geojson(cell))}
        for i, cell in enumerate(cells)
    ]
    (folder / "areas.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    words = pa.array(CATEGORIES)

    def some(n: int) -> pa.Table:
        centre = rng.uniform((west, south), (east, north), size=(50, 2))[rng.integers(50, size=n)]
        lonlat = centre + rng.normal(scale=0.03, size=(n, 2))
        codes = pa.array(rng.integers(len(CATEGORIES), size=n), pa.int32())
        return pa.table({"lon": lonlat[:, 0], "lat": lonlat[:, 1], "category": words.take(codes)})

    for name, many in (("points", points), ("few", few)):
        with pq.ParquetWriter(folder / f"{name}.parquet", some(1).schema) as writer:
            for start in range(0, many, AT_ONCE):
                writer.write_table(some(min(AT_ONCE, many - start)))
    with pacsv.CSVWriter(folder / "points.csv", some(1).schema) as csv_writer:
        for start in range(0, rows, AT_ONCE):
            csv_writer.write_table(some(min(AT_ONCE, rows - start)))


def read_parquet(folder: Path) -> int:
    """Read the columns and do nothing with them."""
    parts = pq.ParquetFile(folder / "points.parquet").iter_batches(1 << 19, columns=["lon", "lat", "category"])
    return sum(len(part) for part in parts)


def read_csv(folder: Path) -> int:
    """Read the columns as pyarrow reads them by itself: numbers as numbers."""
    return sum(len(part) for part in pacsv.open_csv(folder / "points.csv"))


def build_of(file: str) -> Callable[[Path], int]:
    """Build the city with one file of points, from nothing: the command itself."""

    def run(folder: Path) -> int:
        from topt_deploy.cli import main

        with tempfile.TemporaryDirectory() as out:
            sys.argv = ["topt-deploy", "build", "--regions", str(folder / "areas.geojson"), "--id-col", "id",
                        "--points", f"poi={folder / file}", "--out", out]  # fmt: skip
            with suppress(SystemExit):
                main()
            receipt = json.loads((Path(out) / "build.receipt.json").read_text())
        return int(receipt["sources"]["points.poi"]["assigned"])

    return run


def geopandas(folder: Path) -> int:
    """The same counts as most people would make them."""
    import geopandas as gpd

    areas = gpd.read_file(folder / "areas.geojson")
    table = pq.read_table(folder / "few.parquet").to_pandas()
    points = gpd.GeoDataFrame(table, geometry=gpd.points_from_xy(table.lon, table.lat), crs="EPSG:4326")
    joined = gpd.sjoin(points, areas, predicate="within")
    return int(joined.groupby(["id", "category"]).size().sum())


def regions_alone(folder: Path) -> int:
    """The cost of a build without points: reading 2,000 areas."""
    from topt_deploy.pandas_blocker import without_pandas
    from topt_deploy.train.datasets.build.recipe import recipe_of
    from topt_deploy.train.datasets.build.regions import read_regions

    without_pandas()  # as the command does
    return len(read_regions(recipe_of({"regions": {"file": "areas.geojson", "id": "id"}}, folder=folder, name="c")))


WAYS: dict[str, Callable[[Path], int]] = {
    "read Parquet": read_parquet,
    "build Parquet": build_of("points.parquet"),
    "read CSV": read_csv,
    "build CSV": build_of("points.csv"),
    "build for comparison": build_of("few.parquet"),
    "geopandas": geopandas,
    "regions alone": regions_alone,
}


def measured(way: str, folder: Path) -> dict[str, Any]:
    """A way in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--way", way, "--folder", str(folder)], capture_output=True, text=True, check=True
    )
    return {"way": way, **json.loads(done.stdout.splitlines()[-1])}


def run_way(way: str, folder: Path) -> None:
    """Run a way and print what it took."""
    began, used = time.perf_counter(), time.process_time()
    count = WAYS[way](folder)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    megabytes = round(int(held.split()[1]) / 1024)
    print(json.dumps({"seconds": round(seconds, 2), "cpu": round(cpu, 3), "mb": megabytes, "rows": count}))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=5_000_000, help="rows of the Parquet file")
    parser.add_argument("--csv", type=int, default=1_000_000, help="rows of the CSV file")
    parser.add_argument("--geopandas", type=int, default=0, help="compare with geopandas too, on so many points")
    parser.add_argument("--folder", type=Path, help="where the files are, or go and stay")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--write-docs", action="store_true", help="write the table and the plot into docs/background")
    given = parser.parse_args()
    if given.way:
        run_way(given.way, given.folder)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        folder.mkdir(exist_ok=True)
        if not (folder / "areas.geojson").exists():
            make_city(folder, given.points, given.csv, given.geopandas)
        compared = {"build for comparison", "geopandas"}
        ways = [way for way in WAYS if way not in compared or given.geopandas]
        found = {way: measured(way, folder) for way in ways}
    rows = {"Parquet": given.points, "CSV": given.csv, "comparison": given.geopandas, "geopandas": given.geopandas}
    text = f"{table(found, rows)}\n\n{goals(found, rows)}"
    print(text)
    if given.write_docs:
        write_docs(found, text)


def table(found: dict[str, dict[str, Any]], rows: dict[str, int]) -> str:
    """The figures as Markdown."""
    lines = [
        "| | rows | processor time | clock | most memory | times reading |",
        "|---|---|---|---|---|---|",
    ]
    reading = {"build Parquet": "read Parquet", "build CSV": "read CSV"}
    for way, facts in found.items():
        base = found.get(reading.get(way, ""))
        ratio = f"{facts['cpu'] / base['cpu']:.1f}" if base else ""
        size = f"{rows[way.split()[-1]]:,}" if way.split()[-1] in rows else ""
        took = f"{facts['cpu']:.2f} s | {facts['seconds']:.1f} s"
        lines.append(f"| {way} | {size} | {took} | {facts['mb']:,} MB | {ratio} |")
    if "geopandas" in found:
        ours, theirs = found["build for comparison"], found["geopandas"]
        lines += ["", f"geopandas takes {theirs['cpu'] / ours['cpu']:.1f} times the processor time and "
                  f"{theirs['mb'] / ours['mb']:.1f} times the memory of build."]  # fmt: skip
    machine = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), platform.machine())  # fmt: skip
    return "\n".join(
        [*lines, "", f"{date.today()}, {machine}, Python {platform.python_version()}, pyarrow {pa.__version__}."]
    )


def goals(found: dict[str, dict[str, Any]], rows: dict[str, int]) -> str:
    """The goals, and how far each is met, as Markdown."""

    def line(goal: str, same_size: bool, one: str, other: str, what: str, bound: float, most: bool = True) -> str:
        value = found[one][what] / found[other][what]
        kept = "met" if (value <= bound if most else value >= bound) else "not met"
        size = "" if same_size else ", at another size than the goal's"
        return f"| {goal} | {'at most' if most else 'at least'} {bound:g} | {value:.1f} | {kept}{size} |"

    full, full_csv = rows["Parquet"] == 100_000_000, rows["CSV"] == 20_000_000
    lines = [
        "| goal | | measured | |",
        "|---|---|---|---|",
        line("100 million points in Parquet: times merely reading", full, "build Parquet", "read Parquet", "cpu", 3),
        line("20 million points in CSV: times merely reading", full_csv, "build CSV", "read CSV", "cpu", 3),
    ]
    if "geopandas" in found:
        ours, theirs, same = "build for comparison", "geopandas", rows["geopandas"] == 5_000_000
        lines += [
            line("5 million points: times faster than geopandas", same, theirs, ours, "cpu", 10, most=False),
            line("5 million points: geopandas' memory, times ours", same, theirs, ours, "mb", 10, most=False),
        ]
    fixed = found["regions alone"]["cpu"]
    told = f"Reading the 2,000 areas takes {fixed:.2f} s of the build's processor time, however many points there are."
    return "\n".join([*lines, "", told])


def write_docs(found: dict[str, dict[str, Any]], text: str) -> None:
    """The table and a plot into the documentation."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    ways = [way for way in found if way != "regions alone"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", sharey=True)
    for axes, key, label in ((left, "cpu", "processor time (s)"), (right, "mb", "most memory (MB)")):
        axes.barh(ways, [found[way][key] for way in ways], color="#08519c")
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    DOCS.mkdir(parents=True, exist_ok=True)
    figure.savefig(DOCS / "build-benchmark.svg")
    page = f"# How fast points are counted\n\n{__doc__}\n\n![Time and memory](build-benchmark.svg)\n\n{text}\n"
    (DOCS / "build-benchmark.md").write_text(page)


if __name__ == "__main__":
    main()
