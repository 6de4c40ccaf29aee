"""Several cities for a batch, and what a batch leaves behind. Imports no torch."""

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from commands import PATIENCE_S, environment

NAMES = "ABCDEF"


def write_cities(folder: Path, demo: Path, names: Sequence[str] = NAMES, *, regions: int = 9) -> None:
    """Parts of the demo as cities of their own, ``city=NAME/``: the first has ``regions``, every other three more."""
    table, flows = (pq.read_table(demo / f"{name}.parquet").drop_columns("city_id") for name in ("regions", "mobility"))
    for number, name in enumerate(names):
        part = table.slice(number, regions + 3 * number % 60)
        ids = set(part.column("region_id").to_pylist())
        ends = zip(flows.column("origin_id").to_pylist(), flows.column("dest_id").to_pylist(), strict=True)
        city = folder / f"city={name}"
        city.mkdir(parents=True)
        pq.write_table(part, city / "regions.parquet")
        pq.write_table(flows.filter(pa.array([{a, b} <= ids for a, b in ends])), city / "mobility.parquet")


def spoil(city: Path) -> None:
    """Make one count of a city negative."""
    table = pq.read_table(city / "regions.parquet")
    column = table.column("poi_food").to_pylist()
    column[2] = -1
    place = table.schema.get_field_index("poi_food")
    pq.write_table(table.set_column(place, "poi_food", pa.array(column)), city / "regions.parquet")


def slow(city: Path, rows: int = 400_000) -> None:
    """Make a city take a second: flows of so many rows, time enough to kill whoever is at work on it."""
    table = pq.read_table(city / "mobility.parquet", partitioning=None)
    pq.write_table(pa.concat_tables([table] * (rows // len(table))), city / "mobility.parquet")


def outputs(folder: Path) -> dict[str, str]:
    """Hashes of all that a batch has written for its cities, but for receipts, which tell the time."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".json"
    }


def done(folder: Path) -> int:
    """How many cities have their receipt, which is written last."""
    return len(list(folder.glob("city=*/*.receipt.json")))


def start(arguments: Sequence[object], folder: Path, **more: str) -> subprocess.Popen[str]:
    """A command in a process group of its own, going on while the test does."""
    return subprocess.Popen(
        [str(argument) for argument in arguments],
        cwd=folder,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are still there."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if alive(child)]


def alive(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(true: Callable[[], bool], what: str) -> None:
    """Wait until something is true."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"{what}: not in {PATIENCE_S} s"
        time.sleep(0.002)


def kill(pid: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that the test has started."""
    os.kill(pid, how)


def ancestor(pid: int, word: str) -> int:
    """The nearest process above one whose command line has a word in it."""
    while word not in Path(f"/proc/{pid}/cmdline").read_text():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


def kill_at_work(
    out: Path,
    times: int = 1,
    still: Callable[[], bool] = lambda: True,
    whom: Callable[[int], int] = lambda pid: pid,
) -> list[int]:
    """Kill whichever process is at work on an output, or ``whom`` that leads to, so many times over; who they were.

    Each time another process has to hold the output's lock, as /proc/locks says.
    """
    lock, killed = out.with_name(f".{out.name}.lock"), []
    while len(killed) < times and still():
        with suppress(OSError):
            file = f":{lock.stat().st_ino} "
            held = [line.split() for line in Path("/proc/locks").read_text().splitlines() if file in line]
            for pid in (int(words[4]) for words in held if words[1] == "FLOCK"):
                if pid > 0 and (victim := whom(pid)) not in killed:
                    kill(victim)
                    killed.append(victim)
        time.sleep(0.001)
    return killed


BLIND = """
import sys
from topt_deploy.pandas_blocker import with_pandas
with_pandas()
from topt_deploy.runtime.batch.plan import plan
from topt_deploy.runtime.batch.city_task import Setting
from topt_deploy.runtime.batch.{engine} import run_{engine}
jobs = plan([sys.argv[1]], sys.argv[2], mobility=True)
for result in run_{engine}(jobs, Setting(bundle="/nowhere/model.topt"), workers=2):
    print(result.error["exit_code"])
    print(result.told, file=sys.stderr)
"""
"""Predicts on a cluster whose nodes do not have the bundle: the codes of its cities, and what is said of them."""
