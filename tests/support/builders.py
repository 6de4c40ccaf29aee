"""Small cities, configurations and the like for tests. Imports no torch: the runtime's tests may use it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from topt_deploy.config.settings import Config, EnsembleConfig, Prompt4ReConfig, SrelConfig, TargetConfig, TaskConfig
from topt_deploy.data.city import City, infer_schema, read_city

POI = ("bar", "café", "school", "shop")
LAND_USE = ("green", "homes", "works")
TASKS = ("crime", "calls")
CENTRE = (-87.65, 41.85)
SREL = SrelConfig(width=8, heads=2, ffn_width=12, memory=4, channels=3, view_width=4, inter_blocks=2, epochs=6, lr=1e-3)
PROMPT4RE = Prompt4ReConfig(heads=2, epochs=6, folds=3, lr=1e-3)
ENSEMBLE = EnsembleConfig(features=8, steps=5, members=2, width=8, epochs=6)


def tiny_city_tables(
    n: int = 12,
    seed: int = 0,
    *,
    tasks: Sequence[str] = TASKS,
    prompts: Sequence[str] = (),
    prompt_width: int = 10,
    lists: bool = False,
) -> tuple[pa.Table, pa.Table]:
    """regions and mobility of a city of ``n`` regions, some 10 km across, rows in no particular order."""
    rng = np.random.default_rng([seed, n])
    ids = np.array([f"{i:03d}" for i in rng.permutation(n)])
    lonlat = np.array(CENTRE) + rng.uniform(-0.05, 0.05, (n, 2))
    columns: dict[str, Any] = {"region_id": ids, "lon": lonlat[:, 0], "lat": lonlat[:, 1]}
    counts = {}
    for view, names in (("poi", POI), ("land_use", LAND_USE)):
        counts[view] = rng.poisson(rng.uniform(1, 20, len(names)), (n, len(names)))
        if lists:
            columns[view] = fixed_lists(counts[view])
        else:
            columns |= {f"{view}_{name}": counts[view][:, i] for i, name in enumerate(names)}
    for number, task in enumerate(tasks):
        columns[task] = rng.poisson(5 + 3 * counts["poi"][:, number % len(POI)]).astype(float)
    for column in prompts:
        columns[column] = fixed_lists(rng.normal(size=(n, prompt_width)))
    regions = pa.table(columns)
    if lists:
        named = {"poi": str(list(POI)), "land_use": str(list(LAND_USE))}
        fields = [
            f.with_metadata({"categories": named[f.name].replace("'", '"')}) if f.name in named else f
            for f in regions.schema
        ]
        regions = regions.cast(pa.schema(fields))
    pairs = rng.choice(n * n, size=min(n * n, 5 * n), replace=False)
    flow = rng.poisson(20, len(pairs)) + 1
    mobility = pa.table({"origin_id": np.sort(ids)[pairs // n], "dest_id": np.sort(ids)[pairs % n], "flow": flow})
    return regions, mobility


def fixed_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    """Rows of (N, W) as fixed-size lists of float32."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32).ravel()), values.shape[1])


def write_tables(folder: Path, regions: pa.Table, mobility: pa.Table) -> Path:
    """Write a city's folder, made where absent."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(regions, folder / "regions.parquet")
    pq.write_table(mobility, folder / "mobility.parquet")
    return folder


def replaced(table: pa.Table, **columns: Any) -> pa.Table:
    """``table`` with these columns replaced or added."""
    for name, values in columns.items():
        array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, array)
        else:
            table = table.append_column(name, array)
    return table


def tiny_city(n: int = 12, seed: int = 0, *, prompts: Sequence[str] = (), **more: Any) -> City:
    """The same city, read."""
    regions, mobility = tiny_city_tables(n, seed, prompts=prompts, **more)
    schema = infer_schema(regions, views=("poi", "land_use"), mobility=True, prompts=prompts)
    return read_city(regions, mobility, schema, labels=more.get("tasks", TASKS))


def task_config(
    srel: Mapping[str, Any] | None = None,
    prompt4re: Mapping[str, Any] | None = None,
    target: Mapping[str, Any] | None = None,
    ensemble: Mapping[str, Any] | None = None,
) -> TaskConfig:
    """A task's settings: tiny ones, and what is given."""
    return TaskConfig(
        srel=replace(SREL, **(srel or {})),
        prompt4re=replace(PROMPT4RE, **(prompt4re or {})),
        ensemble=replace(ENSEMBLE, **(ensemble or {})),
        target=TargetConfig(**(target or {})),
    )


def tiny_config(tasks: Mapping[str, TaskConfig] | None = None, **more: Any) -> Config:
    """A configuration of tiny models; tasks with default tiny settings where none are given."""
    return Config(tasks=tasks or {task: task_config() for task in TASKS}, **more)


def quiet(metrics: Any = None) -> Any:
    """A reporter that shows nothing."""
    from topt_deploy.train.progress import Reporter

    return Reporter(metrics, quiet=True)
