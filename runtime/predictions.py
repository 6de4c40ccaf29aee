"""A city's predictions as tables, in the order of the input's rows."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.city import City
from topt_deploy.data.columns import GEOMETRY

from .bad_rows import BadRowFilter

Array = np.ndarray[Any, Any]
OK = "ok"
EXTRAPOLATED = "extrapolated"
MASKED = "masked"


@dataclass(frozen=True, eq=False)
class TaskPrediction:
    """A task's predictions and the ends of their intervals, if any, each (N,) in canonical order."""

    prediction: Array
    lower: Array | None
    upper: Array | None


_ABOUT, _VALUES, _QUALITY = ("city_id", "region_id"), ("prediction", "lower", "upper"), ("status", "reason")


class Predictions:
    """A city's predictions, in the order of the input's rows.

    Args:
        city: The city.
        results: By task, in canonical order.
        reasons: Per region in canonical order, why it is extrapolated; empty where it is not.
        sieve: The rows that were set aside.
        encoded: What the regions' prompts were made with, where they were made here.

    Attributes:
        lonlat: float64 (N, 2), degrees.
    """

    def __init__(
        self,
        city: City,
        results: dict[str, TaskPrediction],
        reasons: list[str],
        sieve: BadRowFilter,
        encoded: Mapping[str, Any] | None = None,
    ) -> None:
        back = np.argsort(city.input_row)
        masked = sieve.masked
        ordered = [masked.get(row) or reasons[i] or None for row, i in enumerate(back)]
        self._city = city
        self.sieve, self.encoded = sieve, encoded
        self.lonlat = city.lonlat[back]
        self._about: dict[str, list[Any]] = {
            "city_id": [city.city_id] * len(city),
            "region_id": city.region_id[back].tolist(),
            "status": [
                MASKED if row in masked else EXTRAPOLATED if reason else OK for row, reason in enumerate(ordered)
            ],
            "reason": ordered,
        }
        self._values = {
            task: {name: _in_order(getattr(result, name), back, masked) for name in _VALUES}
            for task, result in results.items()
        }

    def long(self) -> pa.Table:
        """One row per task and region, task by task."""
        repeat = len(self._values)
        columns = {name: self._about[name] * repeat for name in _ABOUT}
        columns["task"] = [task for task in self._values for _ in range(len(self._city))]
        columns |= {name: [v for values in self._values.values() for v in values[name]] for name in _VALUES}
        columns |= {name: self._about[name] * repeat for name in _QUALITY}
        return _table(self._city, columns, set(_VALUES), repeat)

    def wide(self) -> pa.Table:
        """One row per region; a task has its prediction under its own name, and the ends beside it."""
        numbers = {
            task if name == "prediction" else f"{task}_{name}": values[name]
            for task, values in self._values.items()
            for name in _VALUES
        }
        about, quality = ({name: self._about[name] for name in names} for names in (_ABOUT, _QUALITY))
        return _table(self._city, about | numbers | quality, set(numbers), 1)


def _in_order(values: Array | None, back: Array, masked: Collection[int]) -> list[float | None]:
    """Numbers in the order of the input's rows; None where there is none, and in masked rows."""
    numbers: list[float | None] = [None] * len(back) if values is None else values[back].astype(np.float64).tolist()
    for row in masked:
        numbers[row] = None
    return numbers


def _table(city: City, columns: dict[str, list[Any]], numbers: set[str], repeat: int) -> pa.Table:
    """The columns as Arrow, with the city's geometry passed through."""
    arrays = {
        name: pa.array(values, pa.float64() if name in numbers else pa.string()) for name, values in columns.items()
    }
    if city.geometry is None:
        return pa.table(arrays)
    shapes, geo = city.geometry
    table = pa.table(arrays | {GEOMETRY: pa.chunked_array(shapes.chunks * repeat, shapes.type)})
    return table.replace_schema_metadata({b"geo": geo}) if geo else table
