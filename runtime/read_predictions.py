"""Reads a file of predictions, long or wide, as arrays by task."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.columns import CITY_ID, GEOMETRY, REGION_ID, TableReader, floats, strings
from topt_deploy.data.parquet import ParquetFile
from topt_deploy.errors import BadData, BadRows

from .receipt import read_receipt

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicted:
    """One task's predictions. N regions.

    Attributes:
        value, lower, upper: float64 (N,); NaN where there is none.
        status: str (N,): ok, extrapolated or masked.
    """

    value: Array
    lower: Array
    upper: Array
    status: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class PredictionFile:
    """A file of predictions.

    Attributes:
        path: The file.
        city: Its city's name; None where it has none.
        region_id: str (N,), in the file's order.
        tasks: Predictions by task.
        geometry: The shapes as the input had them, with GeoParquet's metadata; None where it had none.
        receipt: What the run wrote beside it; empty where that is gone.
    """

    path: Path
    city: str | None
    region_id: Array
    tasks: Mapping[str, Predicted]
    geometry: pa.Table | None
    receipt: Mapping[str, Any]


def read_predictions(path: Path) -> PredictionFile:
    """Read predictions.parquet.

    Raises:
        NoInput, NoPermission: If it cannot be read.
        BadData: If it is no such file.
    """
    path = Path(path)
    table = ParquetFile(path).read()
    source = TableReader(table, BadRows.REGIONS)
    source.name = str(path)
    if not source.has(REGION_ID):
        raise BadData(
            "not a file of predictions", file=path, expected="region_id, task, prediction, …",
            found=", ".join(table.column_names),
        )  # fmt: skip
    ids = np.array([str(value) for value in strings(source, REGION_ID, "predict again")])
    if source.has("task"):
        region_id, tasks, rows = _long(source, ids)
    else:
        region_id, tasks, rows = ids, _wide(source, ids), np.arange(len(ids))
    if not tasks or not len(region_id):
        raise BadData("not a file of predictions", file=path, expected="at least one task and region")
    city = (
        next((str(value) for value in table.column(CITY_ID).to_pylist() if value), None)
        if source.has(CITY_ID)
        else None
    )
    geometry = table.select([GEOMETRY]).take(pa.array(rows)) if GEOMETRY in table.column_names else None
    return PredictionFile(
        path=path, city=city, region_id=region_id, tasks=tasks, geometry=geometry, receipt=read_receipt(path) or {}
    )


def _long(source: TableReader, ids: Array) -> tuple[Array, dict[str, Predicted], Array]:
    """Predictions of a table with one row per region and task."""
    names = np.array([str(value) for value in strings(source, "task", "predict again")])
    first = np.sort(np.unique(names, return_index=True)[1])
    region_id = ids[names == names[first[0]]] if len(first) else ids
    tasks = {}
    for name in names[first].tolist():
        rows = np.flatnonzero(names == name)
        if not np.array_equal(ids[rows], region_id):
            raise BadData("its tasks have different regions", file=source.name, column="task", found=name)
        columns = {key: _numbers(source, ids, key)[rows] for key in ("prediction", "lower", "upper")}
        status = _status(source)[rows]
        tasks[name] = Predicted(
            value=columns["prediction"], lower=columns["lower"], upper=columns["upper"], status=status
        )
    return region_id, tasks, np.flatnonzero(names == names[first[0]])


def _wide(source: TableReader, ids: Array) -> dict[str, Predicted]:
    """Predictions of a table with one row per region."""
    tasks = [name.removesuffix("_lower") for name in source.names if name.endswith("_lower")]
    kept = {name: name.removesuffix("_upper") for name in source.names if name.endswith("_upper")}
    return {
        task: Predicted(
            value=_numbers(source, ids, task),
            lower=_numbers(source, ids, f"{task}_lower"),
            upper=_numbers(source, ids, f"{task}_upper"),
            status=_status(source),
        )
        for task in tasks
        if task in kept.values() and source.has(task)
    }


def _numbers(source: TableReader, ids: Array, column: str) -> Array:
    if not source.has(column):
        raise BadData("not a file of predictions", file=source.name, column=column, expected="a column of numbers")
    return floats(source, ids, column, nulls=True)


def _status(source: TableReader) -> Array:
    if not source.has("status"):
        return np.full(len(source.table), "ok")
    return np.array([str(value) for value in strings(source, "status", "predict again")])
