"""Many small cities on two cores, measured: ``make batch``. Writes its table into docs/background/reliability.md.

A batch against a loop of one process per city, against the model alone, and its memory over the run. The ways are
measured by turns, so that all of them see the same machine; processor time says what is left when others use it too.
"""

import argparse
import gc
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from reliability import BIN, machine, write_section

from topt_deploy.data.parquet import read_parquet, write_parquet

REGIONS = 77
BUNDLES = {  # how long it was trained changes nothing here
    "default": ("--preset", "default", "--set", "ensemble.epochs=20"),
    "srel": ("--preset", "srel", "--set", "srel.epochs=10", "--set", "prompt4re.epochs=5"),
    "paper": ("--preset", "paper", "--set", "srel.epochs=3", "--set", "prompt4re.epochs=3"),
}
PROCESSES = 2
SAMPLE_EVERY_S = 0.2
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Wall and processor seconds of a command and its children, for how many cities.

    Attributes:
        resident_mb: (time, parent, largest worker) over the run, megabytes.
    """

    wall_s: float
    cpu_s: float
    cities: int
    resident_mb: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def wall_ms(self) -> float:
        """Per city."""
        return 1000 * self.wall_s / self.cities

    @property
    def cpu_ms(self) -> float:
        """Per city."""
        return 1000 * self.cpu_s / self.cities


def command(*words: str | Path, cities: int) -> Taken:
    """Run a command to its end."""
    samples: list[tuple[float, float, float]] = []
    began = time.perf_counter()
    process = subprocess.Popen(list(map(str, words)), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_EVERY_S):
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            sizes = [_resident_mb(worker) for worker in workers]
            samples.append((time.perf_counter() - began, _resident_mb(process.pid), max(sizes, default=0.0)))

    watcher = threading.Thread(target=sample)
    watcher.start()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    wall_s = time.perf_counter() - began
    over.set()
    watcher.join()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status  # it is reaped here, and not by Popen
    if status:
        raise SystemExit(f"{words} failed")
    return Taken(wall_s=wall_s, cpu_s=usage.ru_utime + usage.ru_stime, cities=cities, resident_mb=samples)


def _resident_mb(process: int | str) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):  # it has ended
        return 0.0


def make_cities(demo: Path, folder: Path, count: int) -> None:
    """The demo's city ``count`` times over, every one with counts and flows of its own."""
    regions, mobility = (read_parquet(demo / f"{name}.parquet") for name in ("regions", "mobility"))
    rng = np.random.default_rng(0)
    for number in range(count):
        name = f"C{number:04d}"
        place = folder / f"city={name}"
        place.mkdir(parents=True)
        for table, file in ((regions, "regions"), (mobility, "mobility")):
            for position, column in enumerate(table.column_names):
                if column == "flow" or column.startswith(("poi_", "land_use_")):
                    counts = rng.poisson(table.column(column).to_numpy() * rng.uniform(0.8, 1.2))
                    table = table.set_column(position, column, pa.array(counts))
                elif column == "city_id":
                    table = table.set_column(position, column, pa.array([name] * len(table)))
            write_parquet(place / f"{file}.parquet", table)


def alone(part: Callable[[Path, list[Path], Path], list[Callable[[], Any]]], bundle: Path, cities: Path, out: Path,
          count: int) -> Taken:  # fmt: skip
    """One part of what a city takes, and nothing else, in two processes at once.

    Args:
        part: Of :func:`model` and :func:`tables`: makes ready, and gives what is to be called for every city.
        bundle, cities, out: Of :func:`measure`.
        count: How many cities.
    """
    context = multiprocessing.get_context("spawn")
    ready, queue = context.Barrier(PROCESSES), context.Queue()
    places = sorted(cities.iterdir())[:count]
    out.mkdir(exist_ok=True)
    pool = [
        context.Process(target=_alone, args=(part, bundle, places[number::PROCESSES], out, ready, queue))
        for number in range(PROCESSES)
    ]
    for process in pool:
        process.start()
    times = [queue.get() for _ in pool]
    for process in pool:
        process.join()
    began, ended = min(t[0] for t in times), max(t[1] for t in times)
    return Taken(wall_s=ended - began, cpu_s=sum(t[2] for t in times), cities=len(places))


def _alone(part: Any, bundle: Path, places: list[Path], out: Path, ready: Any, queue: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    calls = part(bundle, places, out)
    calls[0]()
    gc.collect()
    ready.wait()
    began, cpu = time.time(), time.process_time()
    for call in calls:
        call()
    queue.put((began, time.time(), time.process_time() - cpu))


def model(bundle: Path, places: list[Path], out: Path) -> list[Callable[[], Any]]:
    """``Session.run`` on the cities' arrays, which lie in memory."""
    predictor, arrays = _in_memory(bundle, places)
    return [partial(predictor.session.run, city, predictor.tasks) for city in arrays]


def tables(bundle: Path, places: list[Path], out: Path) -> list[Callable[[], Any]]:
    """Measure Arrow alone: the tables that the model reads are read, one of predictions is written.

    Nothing is hashed or checked, no features are made, no receipt is written; the file is flushed and renamed, or it
    could be torn.
    """
    from topt_deploy.runtime.predictor import open_predictor

    predictor = open_predictor(bundle, threads=1)
    schema, first = predictor.bundle.manifest.schema, places[0]
    views = tuple(f"{view}_" for view in schema.views)
    columns = [
        name
        for name in pq.read_schema(first / "regions.parquet").names
        if name in ("region_id", "city_id", "lon", "lat", *schema.prompts) or name.startswith(views)
    ]
    predicted = predictor.predict(first / "regions.parquet", first / "mobility.parquet")

    def city(place: Path) -> None:
        pq.read_table(place / "regions.parquet", columns=columns, use_threads=False, partitioning=None)
        if schema.mobility:
            pq.read_table(place / "mobility.parquet", use_threads=False, partitioning=None)
        written, final = out / f".{place.name}", out / f"{place.name}.parquet"
        pq.write_table(predicted, written)
        with written.open("rb") as file:
            os.fsync(file.fileno())
        written.replace(final)

    return [partial(city, place) for place in places]


def _in_memory(bundle: Path, places: list[Path]) -> tuple[Any, list[Any]]:
    from topt_deploy.data.city import read_city
    from topt_deploy.data.features import features
    from topt_deploy.runtime.predictor import open_predictor

    predictor = open_predictor(bundle, threads=1)
    manifest = predictor.bundle.manifest
    cities = (read_city(p / "regions.parquet", p / "mobility.parquet", manifest.schema) for p in places)
    return predictor, [features(city, manifest.inputs) for city in cities]


def steps(bundle: Path, cities: Path, out: Path, count: int) -> dict[str, float]:
    """Processor milliseconds per city of one worker's steps, the model's among them."""
    from topt_deploy.runtime import bad_rows, predictor
    from topt_deploy.runtime import predict_city as city
    from topt_deploy.runtime.backends import onnxruntime
    from topt_deploy.runtime.batch.city_task import work
    from topt_deploy.runtime.batch.plan import plan
    from topt_deploy.runtime.settings import Setting

    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # as topt-run has it
    setting = Setting(bundle=str(bundle))
    opened = setting.open()
    jobs = plan([str(cities)], str(out), mobility=True)[:count]
    work(jobs[0], opened, setting)
    spent: dict[str, float] = {}

    @contextmanager
    def timed(owner: Any, name: str, label: str) -> Iterator[None]:
        plain: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return plain(*args, **kwargs)
            finally:
                spent[label] = spent.get(label, 0.0) + time.process_time() - began

        setattr(owner, name, call)
        yield
        setattr(owner, name, plain)

    with (
        timed(onnxruntime.Session, "run", "model"),
        timed(bad_rows, "read_city", "read and check the tables"),
        timed(predictor, "features", "features"),
        timed(city, "save_parquet", "write the predictions"),
        timed(city, "make_receipt", "make the receipt"),
        timed(city, "sha256_file", "hash the output"),
    ):
        began = time.process_time()
        for job in jobs:
            work(job, opened, setting)
        total = time.process_time() - began
    spent["everything else"] = total - sum(spent.values())
    return {label: 1000 * seconds / count for label, seconds in spent.items()}


def quarters(taken: Taken) -> str:
    """Largest resident size in the first and in the last quarter of a run."""
    told = []
    for position, name in ((1, "parent"), (2, "worker")):
        end = taken.resident_mb[-1][0]
        first = max(s[position] for s in taken.resident_mb if s[0] <= end / 4)
        last = max(s[position] for s in taken.resident_mb if s[0] >= 3 * end / 4)
        told.append(f"{name} {first:.0f} → {last:.0f} MB")
    return ", ".join(told)


def main() -> None:
    """Measure, then write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cities", type=int, default=2000)
    parser.add_argument("--loop", type=int, default=40, help="Cities of the loop of one process each.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bundle", choices=BUNDLES, action="append")
    parser.add_argument("--folder", type=Path, help="Where to work; kept, and used again [default: a temporary one].")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        measure(options.folder, options)
    else:
        with tempfile.TemporaryDirectory() as name:
            measure(Path(name), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """All bundles, by turns."""
    demo, cities, out = folder / "demo", folder / "cities", folder / "out"
    if not demo.exists():
        command(BIN / "topt-deploy", "sample", "--out", demo, "--regions", str(REGIONS), cities=1)
    if not cities.exists():
        make_cities(demo, cities, options.cities)
    rows, verdicts, parts, memory = [], [], {}, []
    for name in options.bundle or BUNDLES:
        bundle = folder / f"{name}.topt"
        if not bundle.exists():
            command(BIN / "topt-deploy", "train", demo, "--out", demo / "runs" / name, *BUNDLES[name], cities=1)
            command(BIN / "topt-deploy", "export", demo / "runs" / name, "--out", bundle, cities=1)

        def predict(*what: str | Path, count: int, bundle: Path = bundle) -> Taken:
            shutil.rmtree(out, ignore_errors=True)
            return command(BIN / "topt-run", "predict", *what, "--bundle", bundle, cities=count)

        ways: dict[str, Callable[[], Taken]] = {
            "model": lambda bundle=bundle: alone(model, bundle, cities, out, options.cities),
            "tables": lambda bundle=bundle: alone(tables, bundle, cities, out, options.cities),
            "2 workers": lambda: predict(cities, "--out", out, "--workers", "2", count=options.cities),
            "4 workers": lambda: predict(cities, "--out", out, "--workers", "4", count=options.cities),
            "loop": lambda: loop(predict, cities, out, options.loop),
        }
        taken: dict[str, list[Taken]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, run in ways.items():
                taken[way].append(run())
                print(f"{name}, {way}: {taken[way][-1].wall_ms:.2f} ms, cpu {taken[way][-1].cpu_ms:.2f}", flush=True)
        middle = {
            way: {clock: statistics.median(getattr(t, clock) for t in runs) for clock in ("wall_ms", "cpu_ms")}
            for way, runs in taken.items()
        }
        base, one_by_one = middle["model"], middle["loop"]
        for way, m in middle.items():
            rows.append(
                f"| {name} | {way} | {1000 / m['wall_ms']:.0f} | {one_by_one['wall_ms'] / m['wall_ms']:.1f} |"
                f" {m['wall_ms']:.2f} | {m['wall_ms'] / base['wall_ms']:.2f} |"
                f" {m['cpu_ms']:.2f} | {m['cpu_ms'] / base['cpu_ms']:.2f} |"
            )
        batches = [middle[way] for way in ("2 workers", "4 workers")]
        of_loop = max(one_by_one["wall_ms"] / m["wall_ms"] for m in batches)
        of_model = min(m["cpu_ms"] / base["cpu_ms"] for m in batches)
        least = 1 + middle["tables"]["cpu_ms"] / base["cpu_ms"]
        verdicts.append(f"| {name} | {of_loop:.1f} | {of_model:.2f} | {least:.2f} |")
        memory += [f"| {name} | {way} | {quarters(taken[way][-1])} |" for way in ("2 workers", "4 workers")]
        shutil.rmtree(out, ignore_errors=True)
        parts[name] = steps(bundle, cities, out, min(options.cities, 300))
    write_section("batch", page(rows, verdicts, parts, memory, options))


def loop(predict: Callable[..., Taken], cities: Path, out: Path, count: int) -> Taken:
    """One process per city, one after the other."""
    several = []
    for place in sorted(cities.iterdir())[:count]:
        several.append(predict(place / "regions.parquet", "--out", out.with_suffix(".parquet"), count=1))
    return Taken(wall_s=sum(t.wall_s for t in several), cpu_s=sum(t.cpu_s for t in several), cities=count)


def page(
    rows: list[str],
    verdicts: list[str],
    parts: dict[str, dict[str, float]],
    memory: list[str],
    options: argparse.Namespace,
) -> str:
    """The section's text."""
    labels = sorted(next(iter(parts.values())), key=lambda label: -next(iter(parts.values()))[label])
    split = [f"| {label} | {' | '.join(f'{part.get(label, 0):.2f}' for part in parts.values())} |" for label in labels]
    rounds = "one round" if options.rounds == 1 else f"medians of {options.rounds} rounds"
    return f"""`make batch` ({Path(__file__).name}); {machine()}. {options.cities} cities of {REGIONS}
regions, which are the sample city with other counts and flows; {rounds}, the ways take turns.

- *model*: nothing but `Session.run` on arrays in memory, two processes at once.
- *tables*: Arrow alone, two processes at once. It reads what the model reads, and writes, flushes and renames a table
  of predictions. Nothing is hashed, checked or computed, and there is no receipt.
- *loop*: one `topt-run predict` per city, one after the other, over {options.loop} cities.
- The other ways are one `topt-run predict`, with everything: start, reading, checking, features, model, tables, hashes,
  receipts and flushing to the disk. Processor time is that of all processes.

| bundle | way | cities per second | × loop | wall ms per city | × model | processor ms per city | × model |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

The aim was 20 times the speed of the loop, and 1.3 times the model's time. *At least* is the processor time of model
and tables, divided by the model's: no program that reads and writes these files with Arrow can be below it.

| bundle | × loop, the better | × model, the better | at least |
|---|---|---|---|
{chr(10).join(verdicts)}

Where the processor time of a worker goes, in milliseconds per city (one process, {min(options.cities, 300)} cities):

| step | {" | ".join(parts)} |
|---|{"---|" * len(parts)}
{chr(10).join(split)}

Memory: the largest resident size in the first quarter of the run → in the last quarter.

| bundle | way | resident |
|---|---|---|
{chr(10).join(memory)}
"""


if __name__ == "__main__":
    sys.exit(main())
