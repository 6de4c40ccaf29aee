"""Builds a city: regions first, then every source by region, then the two tables, the rejects and the receipt."""

import json
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from topt_deploy import __version__
from topt_deploy.arguments import Location
from topt_deploy.config.settings import CONFIG_FILE
from topt_deploy.data.geometry import geo_library, geo_metadata, geometry_types
from topt_deploy.data.parquet import save_parquet
from topt_deploy.storage.atomic import atomic_files, sweep
from topt_deploy.storage.hashed_file import sha256_bytes, sha256_file
from topt_deploy.storage.locks import locked
from topt_deploy.storage.os_errors import writing
from topt_deploy.storage.outputs import check_outputs
from topt_deploy.storage.text_files import json_text, write_text

from .locate import CELLS, CELLS_MOST, Locator
from .points import Period, PointCounter
from .recipe import Recipe, Source, as_recipe, files_of
from .regions import Regions, read_regions
from .report import BuildReport
from .sources import Result, Sources
from .tally import Tally, rejects_table

Array = np.ndarray[Any, Any]
Told = Callable[[Path, float], None]
Made = tuple[dict[str, Array], dict[str, Any]]

REGIONS, MOBILITY = "regions.parquet", "mobility.parquet"
REJECTS, RECEIPT = "rejects.parquet", "build.receipt.json"
BYTES_PER_CELL = 64
"""Of the files: a finer grid pays where there are many points."""


def build(
    recipe: Recipe | Mapping[str, Any] | Location,
    out: Location,
    *,
    city: str | None = None,
    since: str | date | None = None,
    until: str | date | None = None,
    timezone: str | None = None,
    on_bad_row: Literal["fail", "quarantine"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Build a city's tables from what cities publish, by a recipe (docs/how-to/build.md).

    Args:
        recipe: A recipe's TOML file, or what such a file says as a mapping, ``{"regions": {"file": "areas.geojson",
            "id": "area"}, "labels": {"crime": "crimes.csv"}}``. Files are looked for below the recipe's folder, those
            of a mapping below the working folder.
        out: The city's folder, made where absent: regions.parquet, mobility.parquet where there are flows,
            rejects.parquet and build.receipt.json, which is written last; and topt.toml, the settings for training,
            where there is none.
        city: Its name, in place of the recipe's.
        since, until: The period in place of the recipe's ``from`` and ``to``: its first day, and the day after its
            last, in the city's own time, such as ``"2019-01-01"``.
        timezone, on_bad_row: In place of the recipe's: an IANA zone, and ``fail`` or ``quarantine``, which sets rows
            that cannot be read aside in rejects.parquet.
        progress: Called with how many bytes are read, and of how many.

    Returns:
        What was built, and what became of every source's rows.

    Raises:
        BadConfig: If the recipe is not one, naming the key.
        NoInput, BadData: If a file is absent, or is not what the recipe says.
        TryAgain: If another process builds there.
        UsageError: If tables stand there that no build wrote, or that the recipe reads.
        CannotCreate, IOFailure: If the operating system refuses.
    """
    out, began, started = Path(out), time.monotonic(), datetime.now(UTC)
    changes = {"city": city, "from": since, "to": until, "timezone": timezone, "on_bad_row": on_bad_row}
    chosen = as_recipe(recipe, name=out.resolve().name, changes=changes)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    places = [out / name for name in (REGIONS, MOBILITY, REJECTS, RECEIPT)]
    with locked(out / RECEIPT):
        check_outputs(places, read=files_of(chosen, _region_files(chosen)), ours=lambda file: bool(_receipt(out)))
        sweep(*places)
        regions = read_regions(chosen)
        wkb = geo_library("shapely").to_wkb(regions.published())
        hashed = sha256_bytes(b"\0".join([*(str(i).encode() for i in regions.ids), *wkb]))
        sources = Sources(chosen, out, hashed, _receipt(out), progress or (lambda done, total: None))
        making = CityInMaking(chosen, regions, sources, out)
        making.read()
        tables = making.tables(wkb)
        report = making.report(round(time.monotonic() - began, 2))
        _write(out, tables, report, chosen, sources, started)
        if report.views and report.tasks and not (out / CONFIG_FILE).exists():
            write_text(out / CONFIG_FILE, report.settings)
    return report


class CityInMaking:
    """A city in the making."""

    def __init__(self, recipe: Recipe, regions: Regions, sources: Sources, out: Path) -> None:
        self.recipe, self.regions, self.sources, self.out = recipe, regions, sources, out
        self.period = Period(since=recipe.since, until=recipe.until, timezone=recipe.timezone)
        self.views: dict[str, dict[str, Array]] = {}
        self.labels: dict[str, Array] = {}
        self.columns: dict[str, Any] = {}
        self.flows: tuple[Array, Array, Array] | None = None
        self._locator: Locator | None = None

    @property
    def locator(self) -> Locator:
        """Made when a source is first read that has points."""
        if self._locator is None:
            kinds = [*self.recipe.points.values(), *self.recipe.labels.values(), self.recipe.flows]
            size = sum(path.stat().st_size for kind in kinds for s in kind for path in files_of(self.recipe, s.file))
            cells = int(np.clip(np.sqrt(size / BYTES_PER_CELL), CELLS / 4, CELLS_MOST))
            self._locator = Locator(self.regions, cells=cells)
        return self._locator

    def read(self) -> None:
        """Read all sources."""
        recipe = self.recipe
        kinds = (recipe.points, recipe.labels, recipe.areas, recipe.embeddings)
        every = [one for kind in kinds for several in kind.values() for one in several]
        self.sources.plan([*every, *recipe.flows, *recipe.images])
        for view, several in recipe.points.items():
            for name, source in _named(f"points.{view}", several):
                self._add(view, self._count(name, source, self.period, "points"))
        for task, several in recipe.labels.items():
            for name, source in _named(f"labels.{task}", several):
                self._label(task, name, source)
        self._read_areas()
        self._read_flows()
        self._read_tables()

    def _read_areas(self) -> None:
        for view, several in self.recipe.areas.items():
            for name, source in _named(f"areas.{view}", several):
                from .areas import measure

                self._add(view, self.sources.make(name, source, Period(since=None, until=None),
                                                  lambda *told, s=source: measure(s, self.regions, *told)))  # fmt: skip

    def _read_flows(self) -> None:
        for name, source in _named("flows", self.recipe.flows):
            from .flows import add_up, count_flows

            made = self.sources.make(name, source, self.period, lambda *told, s=source: count_flows(s, self, *told))
            new = (made.arrays["origin"], made.arrays["dest"], made.arrays["flow"])
            self.flows = new if self.flows is None else add_up([self.flows, new], len(self.regions))

    def _read_tables(self) -> None:
        for view, several in self.recipe.embeddings.items():
            for name, source in _named(f"embeddings.{view}", several):
                from .embeddings import read_embedding

                made = self.sources.make(name, source, Period(since=None, until=None),
                                         lambda *told, s=source: read_embedding(s, self.regions, *told))  # fmt: skip
                self._add(view, made)
        for name, source in _named("images", self.recipe.images):
            from .images import read_images

            made = self.sources.make(name, source, Period(since=None, until=None),
                                     lambda *told, s=source: read_images(s, self, *told))  # fmt: skip
            self.columns["images"] = pa.array(made.names["images"], pa.list_(pa.string()))

    def _count(self, name: str, source: Source, period: Period, role: str) -> Result:
        def make(tally: Tally, files: list[Path], told: Told) -> Made:
            counter = PointCounter(source, self.locator, period, tally, role=role)
            for path in files:
                for share in counter.add(path):
                    told(path, share)
            counts = counter.result()
            arrays = {"values": counts.values} | ({} if counts.before is None else {"before": counts.before})
            return arrays, {"categories": counts.names, "unknown": counts.unknown}

        return self.sources.make(name, source, period, make)

    def _label(self, task: str, name: str, source: Source) -> None:
        period = self.period
        if source.history and period.since is not None and period.until is not None:
            before = period_before(period.since, period.until)
            period = Period(since=period.since, until=period.until, before=before, timezone=period.timezone)
        made = self._count(name, source, period, "labels")
        self.labels[task] = self.labels.get(task, 0) + made.arrays["values"][:, 0]
        if "before" in made.arrays:
            history = self.views.setdefault("history", {})
            history[task] = history.get(task, 0) + made.arrays["before"]

    def _add(self, view: str, made: Result) -> None:
        columns = self.views.setdefault(view, {})
        for place, category in enumerate(made.names["categories"]):
            columns[category] = columns.get(category, 0) + made.arrays["values"][:, place]

    def tables(self, wkb: Array) -> dict[str, pa.Table]:
        """regions.parquet, mobility.parquet where there are flows, rejects.parquet where there are some."""
        ids, city = self.regions.ids, self.recipe.city
        geometry = pa.array(wkb, pa.binary())
        columns: dict[str, Any] = {
            "region_id": pa.array(ids.tolist(), pa.string()), "city_id": pa.array([city] * len(ids), pa.string())
        }  # fmt: skip
        if self.regions.names is not None:
            columns["name"] = pa.array(self.regions.names.tolist(), pa.string())
        lonlat = self.regions.lonlat
        columns |= {"lon": lonlat[:, 0], "lat": lonlat[:, 1], "geometry": geometry} | self.columns
        for view, values in self.views.items():
            columns |= {f"{view}_{category}": whole(values[category]) for category in _ordered(values)}
        columns |= {task: whole(values) for task, values in self.labels.items()}
        metadata = {"source": "topt-deploy build", "geo": geo_metadata(geometry_types(geometry))}
        tables = {REGIONS: pa.table(columns).replace_schema_metadata(metadata)}
        if self.flows is not None:
            origin, dest, flow = self.flows
            named = {"city_id": pa.array([city] * len(origin)), "origin_id": ids[origin].tolist()}
            flows = pa.table({**named, "dest_id": ids[dest].tolist(), "flow": whole(flow)})
            tables[MOBILITY] = flows.replace_schema_metadata({"source": "topt-deploy build"})
        rejects = rejects_table([made.tally for made in self.sources.results.values()])
        return tables | ({REJECTS: rejects} if len(rejects) else {})

    def report(self, seconds: float) -> BuildReport:
        """A summary of what was built."""
        tallies = {name: made.tally for name, made in self.sources.results.items()}
        warnings = [*self.regions.warnings, *(f"{n}: {told}" for n, t in tallies.items() for told in t.warnings)]
        return BuildReport(
            out=self.out,
            city=self.recipe.city,
            regions=len(self.regions),
            views={view: (len(v), float(sum(a.sum() for a in v.values()))) for view, v in self.views.items()},
            tasks={task: float(values.sum()) for task, values in self.labels.items()},
            flows=None if self.flows is None else (len(self.flows[2]), float(self.flows[2].sum())),
            tallies=tallies,
            taken=tuple(self.sources.taken),
            facts=self.regions.facts,
            warnings=warnings,
            seconds=seconds,
        )


def period_before(since: datetime, until: datetime) -> datetime:
    """Where the period of the same length before ``since`` begins; of whole months, as many months."""
    months = (until.year - since.year) * 12 + until.month - since.month
    at_midnight = since == since.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if months and at_midnight and until == until.replace(day=1, hour=0, minute=0, second=0, microsecond=0):
        first = since.year * 12 + since.month - 1 - months
        return datetime(first // 12, first % 12 + 1, 1)
    return since - (until - since)


def whole(values: Array) -> Array:
    """Counts as integers where all are whole."""
    rounded = np.rint(values)
    return rounded.astype(np.int64) if np.array_equal(rounded, values) else values


def _ordered(columns: Mapping[str, Array]) -> list[str]:
    """Categories in an order that no order of rows changes."""
    from topt_deploy.data.vocabulary import load_vocabulary

    for kind in load_vocabulary().named:
        if set(columns) == set(load_vocabulary().names(kind)):
            return list(load_vocabulary().names(kind))
    return sorted(columns)


def _named(name: str, sources: tuple[Source, ...]) -> list[tuple[str, Source]]:
    """Several sources of one view or task are numbered, from 1."""
    return [(name if len(sources) == 1 else f"{name}.{place}", one) for place, one in enumerate(sources, start=1)]


def _region_files(recipe: Recipe) -> list[str]:
    return [recipe.regions.file or recipe.regions.boundary or ""]


def _receipt(out: Path) -> dict[str, Any]:
    """The earlier build's receipt; empty where there is none, or it is none."""
    try:
        record = json.loads((out / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _write(
    out: Path, tables: Mapping[str, pa.Table], report: BuildReport, recipe: Recipe, sources: Sources, started: datetime
) -> None:
    """Write all files, the receipt last; those of an earlier build that this one has none of are removed before it."""
    places = [*(out / name for name in tables), out / RECEIPT]
    for path in files_of(recipe, _region_files(recipe)):
        sources.hashes.of(path)
    with atomic_files(places) as temporaries:
        outputs = {}
        for (name, table), temporary in zip(tables.items(), temporaries, strict=False):
            with writing(out / name):
                save_parquet(temporary, table)
            outputs[name] = {"sha256": sha256_file(temporary), "rows": len(table)}
        unknown = {name: made.names.get("unknown") for name, made in sources.results.items()}
        receipt = {
            "city": report.city,
            "outputs": outputs,
            "regions": dict(report.facts),
            "sources": {name: tally.as_dict() for name, tally in report.tallies.items()},
            "other_categories": {name: counts for name, counts in unknown.items() if counts},
            "views": {name: {"categories": many, "sum": total} for name, (many, total) in report.views.items()},
            "tasks": dict(report.tasks),
            "flows": None if report.flows is None else {"pairs": report.flows[0], "sum": report.flows[1]},
            "period": [None if end is None else end.isoformat() for end in (recipe.since, recipe.until)],
            "timezone": recipe.timezone,
            "on_bad_row": recipe.on_bad_row,
            "files": [facts.as_dict() for facts in sources.hashes.files.values()],
            "not_read_again": list(report.taken),
            "warnings": report.warnings,
            "versions": _versions(),
            "started": started.isoformat(timespec="seconds"),
            "seconds": report.seconds,
        }
        with writing(out / RECEIPT):
            temporaries[-1].write_text(json_text(receipt), encoding="utf-8")
            for name in {MOBILITY, REJECTS} - tables.keys():
                (out / name).unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    modules = {name: geo_library(name) for name in ("shapely", "pyogrio", "pyproj")}
    return {
        "topt-deploy": __version__,
        **{name: str(module.__version__) for name, module in modules.items()},
        "gdal": ".".join(map(str, modules["pyogrio"].__gdal_version__)),
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
        "python": platform.python_version(),
    }
