"""Time and peak memory from 100 to 100,000 regions: writes docs/background/large-n.md and docs/background/large-n.png.

    python dev/benchmarks/large_n.py           # 5 minutes on a quiet machine; goes on where it was stopped
    python dev/benchmarks/large_n.py --all     # two hours: preset `srel` to 100,000 regions, its training to 30,000

Every figure is of a process of its own on one thread: peak memory is all that it ever held (VmHWM), Python, libraries
and the input's tables among it. The cities are synthetic: the model's own ranges of counts, 20 flows a region, prompts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from topt_deploy.runtime.processor import processor_name

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "large-n"
PAGE = ROOT / "docs/background/large-n.md"
BIN = Path(sys.executable).parent
SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
FLOWS_PER_REGION = 20
SHORT = ("srel.epochs=30", "prompt4re.epochs=10", "prompt4re.folds=3", "ensemble.epochs=20", "ensemble.steps=10")
"""Training that is soon over: what a prediction takes does not depend on it."""
TRAIN = "train, `srel`"
WAYS = {"predict, `default`": "default", "predict, `srel`": "srel", TRAIN: "srel"}
"""The measurements, each with its preset."""
LIMITS = dict(zip(WAYS, (100_000, 10_000, 3_000), strict=True))
"""Up to which size."""
ALL_LIMITS = dict(zip(WAYS, (100_000, 100_000, 30_000), strict=True))
"""With ``--all``. An epoch at 100,000 regions would take five hours, and 13 GB."""
Found = dict[str, dict[str, dict[str, float]]]
"""Seconds and peak memory by way and size."""


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
    """Seconds of one prediction, from the files to the table."""
    from topt_deploy.runtime import load

    predictor = load(bundle, threads=1)
    began = time.perf_counter()
    predictor.predict(city / "regions.parquet", city / "mobility.parquet")
    return time.perf_counter() - began


def train(city: Path) -> float:
    """Seconds of stage 1 with a single epoch, from features in memory to trained weights."""
    import torch

    from topt_deploy.config.load import load_config
    from topt_deploy.data.city import infer_schema, read_city
    from topt_deploy.data.features import features
    from topt_deploy.train.loop import TrainingDevice, Workplace
    from topt_deploy.train.progress import Reporter
    from topt_deploy.train.srel import train_embedding

    torch.set_num_threads(1)
    files = city / "regions.parquet", city / "mobility.parquet"
    config = load_config(preset="srel", tasks=("crime",), overrides=["srel.epochs=1"])
    schema = infer_schema(files[0], views=config.views, mobility=True, prompts=())
    read = read_city(*files, schema)
    inputs = {name: torch.tensor(array) for name, array in features(read).items()}
    place = Workplace(engine=TrainingDevice(device=torch.device("cpu")), reporter=Reporter(quiet=True))
    began = time.perf_counter()
    train_embedding(read, inputs, schema, config, "crime", place)
    return time.perf_counter() - began


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
    "train": lambda city: train(Path(city)),
}


def command(*words: object) -> None:
    """Run one of the project's commands."""
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)


def make_bundles() -> None:
    """Train and export both presets on the demo city, once."""
    source = WORK / "source"
    if not source.exists():
        command(BIN / "topt-deploy", "sample", "--out", source)
    for preset in ("default", "srel"):
        if not (WORK / f"{preset}.topt").exists():
            settings = [word for setting in SHORT for word in ("--set", setting)]
            command(BIN / "topt-deploy", "train", source, "--preset", preset, "--out", WORK / preset, *settings)
            command(BIN / "topt-deploy", "export", WORK / preset, "--out", WORK / f"{preset}.topt")


def measure(limits: dict[str, int]) -> Found:
    """Seconds and peak memory of every way and size; what has been measured before is not measured again."""
    make_bundles()
    file = WORK / "found.json"
    found: Found = json.loads(file.read_text()) if file.exists() else {way: {} for way in WAYS}
    for size in SIZES:
        missing = [way for way in WAYS if size <= limits[way] and str(size) not in found[way]]
        if not missing:
            continue
        with tempfile.TemporaryDirectory(dir=WORK) as city:
            apart("make_city", WORK / "srel", size, city)
            for way in missing:
                call = ("train", city) if way == TRAIN else ("predict", WORK / f"{WAYS[way]}.topt", city)
                found[way][str(size)] = apart(*call)
                file.write_text(json.dumps(found, indent=1))
                print(way, size, found[way][str(size)], flush=True)
    return found


def picture(found: Found, out: Path) -> None:
    """Seconds and peak memory against the number of regions, both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, (seconds, memory) = plt.subplots(1, 2, figsize=(10, 4))
    for way, by_size in found.items():
        for axes, key in ((seconds, "seconds"), (memory, "peak_mb")):
            axes.plot(
                [int(size) for size in by_size],
                [one[key] for one in by_size.values()],
                marker="o",
                label=way.replace("`", ""),
            )
    memory.axhline(8192, color="grey", lw=1, ls="--")
    memory.plot(SIZES, [4 * n * n / 2**20 for n in SIZES], color="grey", lw=1, ls=":", label="one N × N matrix")
    memory.set_ylim(50, 60_000)
    for axes, label in ((seconds, "seconds"), (memory, "peak memory, MB")):
        axes.set(xscale="log", yscale="log", xlabel="regions", ylabel=label)
    memory.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def page(found: Found, command: str) -> str:
    """The page's text."""

    def cell(way: str, size: int) -> str:
        one = found[way].get(str(size))
        return "not run" if one is None else f"{one['seconds']:.2f} s, {one['peak_mb']:,.0f} MB"

    rows = [f"| {size:,} | {' | '.join(cell(way, size) for way in WAYS)} |" for size in SIZES]
    return f"""# Large cities

`{command}`, {date.today()}, {processor_name()}, one thread, one process per figure. The machine is shared with other
work, and seconds vary by a factor of two. The cities are synthetic: counts within the model's ranges,
{FLOWS_PER_REGION} flows a region, and prompts of 576 numbers for each of three tasks. Peak memory is the most that
the process ever held, with Python and its libraries.

- *predict*: from the Parquet files to the table of predictions of three tasks, with an exported bundle. Preset
  `default` sees only a region's own features. Preset `srel` runs attention over all pairs of regions, five times and
  once per task: its time grows with N², its memory with N.
- *train*: one epoch of stage 1 of preset `srel`, forward and backward. Preset `default` has no such stage.

| regions | {" | ".join(WAYS)} |
|---|{"---|" * len(WAYS)}
{chr(10).join(rows)}

![Seconds and peak memory against the number of regions](large-n.png)

The dotted line is what a single N × N matrix of float32 would take. The dashed line is 8 GB. Attention, distances,
similarities and flows are computed one tile of rows at a time: in training, in prediction with PyTorch, and, as an ONNX
Scan, in the exported graph. Up to {_one_tile():,} regions are one tile.

Two things still hold N × N numbers in memory: the other methods of `topt-deploy evaluate`, which reproduce published
code, and the attention and Moran's I in `topt-deploy report`, which are about pairs of regions.
"""


def _one_tile() -> int:
    from topt_deploy.model.row_tiles import ENTRIES

    return int(ENTRIES**0.5)


def main() -> None:
    """Measure, then write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also what takes longer")
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        name, *arguments = options.call
        seconds = CALLS[name](*arguments)
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))
        return
    found = measure(ALL_LIMITS if options.all else LIMITS)
    picture(found, PAGE.with_suffix(".png"))
    PAGE.write_text(page(found, "python dev/benchmarks/large_n.py" + " --all" * options.all), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
