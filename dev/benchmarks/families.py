"""The cities that results are measured on, and which of them the default preset was designed on.

The split was written down before the design was chosen (dev/LOG.md). New York and Singapore stood among the reported
cities then. They are design cities since: the fall-back for regions unlike the labelled ones was added after New York's
crime had been seen, and local kernels after Singapore's population had.

A family is the sample city (``topt-deploy sample``) with one property changed that real cities have.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from topt_deploy.train.datasets.sample import make_sample
from topt_deploy.train.datasets.sample_recipe import TASKS

Array = np.ndarray[Any, Any]

DESIGN = (
    "chicago", "philadelphia", "boston", "newyork", "singapore",
    "sample-plain", "sample-sparse-flows", "sample-zero-inflated", "sample-small", "sample-park",
)  # fmt: skip
"""Cities that choices were made on."""
REPORT = (
    "washington", "baltimore", "paris",
    "sample-outlier", "sample-no-flows", "sample-heavy-tailed", "sample-few-labels", "sample-large",
)  # fmt: skip
"""Cities that were looked at once the choices were made."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The sample city with something changed.

    Attributes:
        regions, seed: Of the sample city.
        change: Changes regions and flows; None as they are.
        settings: Lines of topt.toml.
    """

    regions: int = 120
    seed: int = 0
    change: Callable[[pa.Table, pa.Table, np.random.Generator], tuple[pa.Table, pa.Table | None]] | None = None
    settings: str = ""


def _counts(table: pa.Table, prefix: str) -> list[str]:
    return [name for name in table.column_names if name.startswith(prefix)]


def _with(table: pa.Table, columns: Mapping[str, Any]) -> pa.Table:
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, from_pandas=True))
    return table


def _labels(table: pa.Table) -> dict[str, Array]:
    return {task: table[task].to_numpy().astype(float) for task in TASKS}


def _outlier(regions: pa.Table, flows: pa.Table, rng: np.random.Generator) -> tuple[pa.Table, pa.Table]:
    """One region is an airport: flows and transport fifty times anyone's, and few people to count."""
    place = int(rng.integers(len(regions)))
    columns: dict[str, Array] = {}
    for name in ("poi_transit", "poi_parking", "poi_hotel", "land_use_transport"):
        values = regions[name].to_numpy().astype(float)
        values[place] = 50 * values.max()
        columns[name] = values
    labels = _labels(regions)
    for task, values in labels.items():
        values[place] = np.nanquantile(values, 0.25)
        columns[task] = values
    busy = np.array(flows["dest_id"].to_pylist()) == regions["region_id"][place].as_py()
    flow = flows["flow"].to_numpy() * np.where(busy, 50, 1)
    return _with(regions, columns), _with(flows, {"flow": flow})


def _park(regions: pa.Table, flows: pa.Table, rng: np.random.Generator) -> tuple[pa.Table, pa.Table]:
    """Two regions are parks: nothing in them, nobody goes there, and nothing happens."""
    places = rng.choice(len(regions), 2, replace=False)
    columns = {}
    for name in (*_counts(regions, "poi_"), *_counts(regions, "land_use_"), *TASKS):
        values = regions[name].to_numpy().astype(float)
        values[places] = 0
        columns[name] = values
    ids = [regions["region_id"][int(place)].as_py() for place in places]
    gone = [pc.is_in(flows[end], value_set=pa.array(ids)) for end in ("origin_id", "dest_id")]
    return _with(regions, columns), flows.filter(pc.invert(pc.or_(*gone)))


def _sparse_flows(regions: pa.Table, flows: pa.Table, rng: np.random.Generator) -> tuple[pa.Table, pa.Table]:
    """One flow in thirty was counted."""
    return regions, flows.filter(pa.array(rng.random(len(flows)) < 1 / 30))


def _no_flows(regions: pa.Table, flows: pa.Table, rng: np.random.Generator) -> tuple[pa.Table, None]:
    return regions, None


def _zero_inflated(regions: pa.Table, flows: pa.Table, rng: np.random.Generator) -> tuple[pa.Table, pa.Table]:
    """A third of the regions report nothing, whatever happens there; the others a tenth."""
    silent = rng.random(len(regions)) < 1 / 3
    thinned = {task: np.where(silent, 0 * v, np.rint(v / 10)) for task, v in _labels(regions).items()}
    return _with(regions, thinned), flows


def _heavy_tailed(regions: pa.Table, flows: pa.Table, rng: np.random.Generator) -> tuple[pa.Table, pa.Table]:
    """Labels to the power of two: a few regions have most of all."""
    return _with(regions, {task: np.rint(v**2 / 100) for task, v in _labels(regions).items()}), flows


def _few_labels(regions: pa.Table, flows: pa.Table, rng: np.random.Generator) -> tuple[pa.Table, pa.Table]:
    """Twenty regions of three hundred have labels."""
    known = rng.permutation(len(regions)) < 20
    return _with(regions, {task: np.where(known, v, np.nan) for task, v in _labels(regions).items()}), flows


FAMILIES: Mapping[str, Family] = {
    "sample-plain": Family(),
    "sample-sparse-flows": Family(seed=1, change=_sparse_flows),
    "sample-zero-inflated": Family(seed=2, change=_zero_inflated),
    "sample-small": Family(regions=30, seed=3),
    "sample-park": Family(seed=4, change=_park),
    "sample-outlier": Family(seed=5, change=_outlier),
    "sample-no-flows": Family(seed=6, change=_no_flows, settings="mobility = false\n"),
    "sample-heavy-tailed": Family(seed=7, change=_heavy_tailed),
    "sample-few-labels": Family(regions=300, seed=8, change=_few_labels),
    "sample-large": Family(regions=1000, seed=9),
}
"""By name."""


FIRST_DRAW = 20
"""The seed of a family's first further city: no choice was made on any of these."""


def draws(name: str, count: int) -> list[str]:
    """The names of so many further cities of a family, such as ``sample-small@20``."""
    return [f"{name}@{seed}" for seed in range(FIRST_DRAW, FIRST_DRAW + count)]


def undrawn(name: str) -> str:
    """The name of the city that one of :func:`draws` is a further one of; any other name as it is."""
    return name.partition("@")[0]


def family_of(name: str) -> Family | None:
    """The family of a city's name, with the seed that it names; None for a real city."""
    family, seed = FAMILIES.get(undrawn(name)), name.partition("@")[2]
    return replace(family, seed=int(seed)) if family and seed else family


def make_family(family: Family, out: Path) -> None:
    """Write a family's city to ``out``, with its topt.toml."""
    make_sample(out, regions=family.regions, seed=family.seed)
    if family.change is not None:
        regions, flows = pq.read_table(out / "regions.parquet"), pq.read_table(out / "mobility.parquet")
        changed, left = family.change(regions, flows, np.random.default_rng(family.seed))
        pq.write_table(changed, out / "regions.parquet")
        if left is None:
            (out / "mobility.parquet").unlink()
        else:
            pq.write_table(left, out / "mobility.parquet")
    tasks = "".join(f"[tasks.{task}]\n" for task in TASKS)
    (out / "topt.toml").write_text(f"{family.settings}{tasks}", encoding="utf-8")
