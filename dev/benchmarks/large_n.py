"""Processor time and peak memory from 100 to 100,000 regions: writes docs/background/large-n.md and large-n.png.

    python dev/benchmarks/large_n.py           # 10 minutes on a quiet machine; goes on where it was stopped
    python dev/benchmarks/large_n.py --all     # two hours: also training on 5,000 regions, and 100,000 predicted
    python dev/benchmarks/large_n.py --page    # measures nothing: the page of what has been measured so far

Every figure is of a process of its own on one thread: peak memory is all that it ever held (VmHWM), Python, libraries
and the input's tables among it. The cities are synthetic: to predict, the model's own ranges of counts, 20 flows a
region, prompts; to train on, those of ``topt-deploy sample``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from topt_deploy.runtime.processor import processor_name

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "large-n"
FOUND = WORK / "found.json"
PAGE = ROOT / "docs/background/large-n.md"
BIN = Path(sys.executable).parent
SIZES = (100, 300, 1_000, 3_000, 5_000, 10_000, 30_000, 100_000)
FLOWS_PER_REGION = 20
TRAINED_ON = 400
"""Regions of the city that bundles are trained on: enough for its prompts' basis to have all of its directions."""
DIRECTIONS = 39
"""Of its prompts."""
SHORT = ("srel.epochs=5", "prompt4re.epochs=5", "ensemble.epochs=5", "ensemble.steps=5")
"""Training that is soon over: what a prediction takes does not depend on it. It does on the number of folds, whose fits
are in the bundle."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One of the measurements.

    Attributes:
        preset: Settings.
        trains: True to train on a city, else to predict it.
        sizes: Numbers of regions.
        more: Those that ``--all`` adds.
    """

    preset: str
    trains: bool = False
    sizes: tuple[int, ...]
    more: tuple[int, ...] = ()


PREDICTED = tuple(size for size in SIZES if size != 5_000)
WAYS = {
    "predict, `kernels`": Way(preset="kernels", sizes=PREDICTED),
    "predict, `default`": Way(preset="default", sizes=PREDICTED[:-2], more=PREDICTED[-2:]),
    "train, `default`": Way(preset="default", trains=True, sizes=(100, 300, 1_000), more=(5_000,)),
}
Found = dict[str, dict[str, dict[str, Any]]]
"""Processor seconds, peak memory and the day, by way and size."""


def make_city(run: Path, regions: int, folder: Path) -> None:
    """A city that the run's model could serve."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from topt_deploy.data.features import POSITION
    from topt_deploy.export.golden_cities import synthetic_city
    from topt_deploy.model.checkpoint import load_model, load_tensors
    from topt_deploy.run_folder import INPUTS_FILE, MODEL_FILE, open_run

    position_m = load_tensors(run / INPUTS_FILE)[0][POSITION].numpy()
    city = synthetic_city(
        load_model(run / MODEL_FILE), open_run(run).facts["ranges"], position_m, regions=regions, seed=regions
    )
    rng = np.random.default_rng(regions)
    ids = city.regions["region_id"].to_numpy()
    origin = np.repeat(np.arange(regions), FLOWS_PER_REGION)
    dest = rng.integers(regions, size=len(origin))
    pairs = np.unique(origin * regions + dest)
    flows = {
        "origin_id": ids[pairs // regions],
        "dest_id": ids[pairs % regions],
        "flow": rng.integers(1, 50, len(pairs)),
    }
    pq.write_table(city.regions, folder / "regions.parquet")
    pq.write_table(pa.table(flows), folder / "mobility.parquet")


def predict(bundle: Path, city: Path) -> float:
    """Processor seconds of one prediction, from the files to the table."""
    from topt_deploy.runtime import load

    predictor = load(bundle, threads=1)
    began = time.process_time()
    predictor.predict(city / "regions.parquet", city / "mobility.parquet")
    return time.process_time() - began


def train(preset: str, city: Path) -> float:
    """Processor seconds of a whole training of one task, in the shipped settings."""
    from topt_deploy.train.trained_run import train

    began = time.process_time()
    train(city, out=city / "run", preset=preset, tasks="crime", threads=1)
    return time.process_time() - began


def peak_mb() -> float:
    """The most that this process has held (ru_maxrss would begin with what its parent had)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def apart(*call: object) -> dict[str, Any]:
    """Call this script's function of that name in a process of its own."""
    command = [sys.executable, __file__, "--call", *map(str, call)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


CALLS: dict[str, Callable[..., Any]] = {
    "make_city": lambda run, regions, folder: make_city(Path(run), int(regions), Path(folder)),
    "predict": lambda bundle, city: predict(Path(bundle), Path(city)),
    "train": lambda preset, city: train(preset, Path(city)),
}


def command(*words: object) -> None:
    """Run one of the project's commands."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in words], env=environment, check=True, stdout=subprocess.DEVNULL)


def make_bundles() -> None:
    """Train and export both presets on a synthetic city, once."""
    source = WORK / "source"
    if not source.exists():
        command(BIN / "topt-deploy", "sample", "--regions", TRAINED_ON, "--out", source)
    for preset in dict.fromkeys(way.preset for way in WAYS.values()):
        if not (WORK / f"{preset}.topt").exists():
            settings = [word for setting in SHORT for word in ("--set", setting)]
            command(BIN / "topt-deploy", "train", source, "--preset", preset, "--out", WORK / preset, *settings)
            command(BIN / "topt-deploy", "export", WORK / preset, "--out", WORK / f"{preset}.topt")


def measured() -> Found:
    """The figures measured so far."""
    found: Found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    return found


def measure(everything: bool) -> Found:
    """Every way and size; what has been measured before is not measured again."""
    make_bundles()
    found = measured()
    for size in SIZES:
        for name, way in WAYS.items():
            by_size = found.setdefault(name, {})
            if str(size) in by_size or size not in way.sizes + way.more * everything:
                continue
            with tempfile.TemporaryDirectory(dir=WORK) as folder:
                city = Path(folder) / "city"
                if way.trains:
                    command(BIN / "topt-deploy", "sample", "--regions", size, "--out", city)
                    figures = apart("train", way.preset, city)
                else:
                    city.mkdir()
                    apart("make_city", WORK / "default", size, city)
                    figures = apart("predict", WORK / f"{way.preset}.topt", city)
            by_size[str(size)] = figures | {"day": str(date.today())}
            FOUND.write_text(json.dumps(found, indent=1))
            print(name, size, by_size[str(size)], flush=True)
    return found


def picture(found: Found, out: Path) -> None:
    """Processor seconds and peak memory against the number of regions, both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, (seconds, memory) = plt.subplots(1, 2, figsize=(10, 4))
    for way in WAYS:
        by_size = {int(size): one for size, one in found.get(way, {}).items()}
        for axes, key in ((seconds, "seconds"), (memory, "peak_mb")):
            heights = [by_size[size][key] for size in sorted(by_size)]
            axes.plot(sorted(by_size), heights, marker="o", label=way.replace("`", ""))
    memory.axhline(8192, color="grey", lw=1, ls="--")
    memory.plot(SIZES, [4 * n * n / 2**20 for n in SIZES], color="grey", lw=1, ls=":", label="one N × N matrix")
    memory.set_ylim(50, 60_000)
    for axes, label in ((seconds, "processor seconds"), (memory, "peak memory, MB")):
        axes.set(xscale="log", yscale="log", xlabel="regions", ylabel=label)
    memory.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def page(found: Found) -> str:
    """The page's text."""

    def cell(way: str, size: int) -> str:
        one = found.get(way, {}).get(str(size))
        if one is None:
            return "not run" if size in WAYS[way].sizes + WAYS[way].more else "–"
        return f"{one['seconds']:,.{int(one['seconds'] < 10)}f} s, {one['peak_mb']:,.0f} MB"

    rows = [f"| {size:,} | {' | '.join(cell(way, size) for way in WAYS)} |" for size in SIZES]
    days = sorted({one["day"] for by_size in found.values() for one in by_size.values()})
    return f"""# Large cities

`python dev/benchmarks/large_n.py --all`, {" to ".join(dict.fromkeys((days[0], days[-1])))},
{processor_name()}, one thread, one process per figure. Seconds are the
processor's: the machine is shared with other work. Peak memory is the most that the process ever held, with Python and
its libraries.

- *predict*: from the Parquet files to the table of predictions of three tasks, with an exported bundle. The cities are
  synthetic: counts within the model's ranges, {FLOWS_PER_REGION} flows a region, and prompts of 256 numbers for each
  task, which lie in {DIRECTIONS} directions; those of a language model lie in more, and take more memory. Preset
  `kernels` sees a region's own features and what flows lead to. Preset `default` also runs attention over all pairs of
  regions: SREL's once, and Prompt4RE's for each of three tasks and eleven fits (ten folds and the final one). So its
  time grows with N², its memory with N.
- *train*: `topt-deploy train --task crime` from beginning to end, in the shipped settings, on a city of
  `topt-deploy sample`. The attention is trained on 400 regions an epoch (`srel.regions`, `prompt4re.regions`), so that
  its time does not grow; that of the networks and of the Gaussian processes grows with N.

| regions | {" | ".join(WAYS)} |
|---|{"---|" * len(WAYS)}
{chr(10).join(rows)}

![Processor seconds and peak memory against the number of regions](large-n.png)

The dotted line is what a single N × N matrix of float32 would take. The dashed line is 8 GB. Attention, distances,
similarities and flows are computed one tile of rows at a time: in training, in prediction with PyTorch, and, as an ONNX
Scan, in the exported graph. Up to {_one_tile():,} regions are one tile. The features of the Gaussian processes, 6,000
numbers a region, and the trees' nodes are computed in tiles as well. Most of what is left of a large prediction's
memory are the prompts and, with `default`, what the attention of eleven fits reads and gives.

{_not_run(rows)}With `default` the time of attention grows with N².

Presets `srel` and `paper` train the attention on all regions in every epoch. An epoch of `srel` took 3.3 s at 1,000
regions, 22 s at 3,000 and 247 s at 10,000 (2026-11-27, AMD EPYC). `srel.regions=400` ends that.

Two things still hold N × N numbers in memory: the other methods of `topt-deploy evaluate`, which reproduce published
code, and the attention and Moran's I in `topt-deploy report`, which are about pairs of regions.
"""


def _not_run(rows: list[str]) -> str:
    return "*Not run* are sizes that the machine had no time for. " if any("not run" in row for row in rows) else ""


def _one_tile() -> int:
    from topt_deploy.model.row_tiles import ENTRIES

    return int(ENTRIES**0.5)


def main() -> None:
    """Measure, then write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also what takes longer")
    parser.add_argument("--page", action="store_true", help="write the page of what has been measured so far")
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        name, *arguments = options.call
        seconds = CALLS[name](*arguments)
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))
        return
    found = measured() if options.page else measure(options.all)
    picture(found, PAGE.with_suffix(".png"))
    PAGE.write_text(page(found), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
