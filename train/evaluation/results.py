"""A folder of results: one file pair per method and task, written as soon as known, so that a run can go on."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.parquet import read_parquet, write_parquet
from topt_deploy.errors import BadConfig, ToptError
from topt_deploy.storage.os_errors import reading, writing
from topt_deploy.storage.text_files import write_json

from .coverage import Coverage, Stratum
from .registry import Entry, Group
from .splits import HeldOut

Array = np.ndarray[Any, Any]

FACTS_FILE = "evaluation.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class MethodResult:
    """The result of a method for a task.

    Attributes:
        group: The method's group.
        held_out: Its predictions; None where it could not run.
        reason: Why it could not.
        coverage: Of its intervals, where that was measured.
        seconds: How long predicting took; None where it could not run.
    """

    method: str
    group: Group
    task: str
    held_out: HeldOut | None
    reason: str | None
    coverage: Coverage | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Store:
    """The folder.

    Attributes:
        folder: ``evaluation.json`` says what its results depend on; ``TASK/METHOD.parquet`` holds predictions, one
            row per repetition and region, and the ``.json`` beside it, written last, the figures.
        region_id: str (N,).
    """

    folder: Path
    region_id: Array

    @classmethod
    def open(cls, folder: Path, region_id: Array, facts: Mapping[str, Any]) -> "Store":
        """Start a folder of results, or go on with one.

        Args:
            facts: Everything that the results depend on beside method and task, as JSON has it.

        Raises:
            BadConfig: If the folder's results depend on other facts.
            CannotCreate, IOFailure: If the operating system refuses.
        """
        file = folder / FACTS_FILE
        if not file.exists():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_json(file, facts)
        expected, found = json.dumps(facts), json.dumps(_read(file))
        if any(differing(expected, found)):
            message = "this folder's results are of another evaluation"
            raise of_others(message, file, expected, found, remove="this folder")
        return cls(folder=folder, region_id=region_id)

    def held_out(self, method: str, task: str, settings: str) -> HeldOut | None:
        """The predictions that are already there; None where there are none, or the method could not run.

        Raises:
            BadConfig: If they are of other settings.
        """
        file = self._file(method, task)
        if not file.exists() or (record := _read(file))["reason"] is not None:
            return None
        if record["settings"] != settings:
            message = f"these results of {method!r} are of other settings"
            raise of_others(message, file, settings, record["settings"])
        return self._read_held_out(method, task)

    def save(self, method: str, task: str, settings: str, held_out: HeldOut, seconds: float) -> None:
        """Write a method's predictions and figures for a task."""
        repetitions, regions = held_out.fold.shape
        self._make_room(task)
        write_parquet(
            self._file(method, task).with_suffix(".parquet"),
            pa.table(
                {
                    "region_id": np.tile(self.region_id, repetitions).tolist(),
                    "repetition": np.repeat(np.arange(repetitions), regions),
                    "fold": held_out.fold.ravel(),
                    "label": pa.array(np.tile(held_out.labels, repetitions), from_pandas=True),
                    "prediction": pa.array(held_out.prediction.ravel(), from_pandas=True),
                }
            ),
        )
        figures = {"seconds": round(seconds, 2), "metrics": [asdict(m) for m in held_out.metrics()]}
        self._write(method, task, {"settings": settings, "reason": None, **figures, "coverage": None})

    def save_reason(self, method: str, task: str, settings: str, error: ToptError) -> None:
        """Write why a method could not run for a task."""
        self._make_room(task)
        self._write(method, task, {"settings": settings, "reason": str(error)})

    def has_coverage(self, method: str, task: str, nominal: float) -> bool:
        """True if the coverage of the method's intervals at this level was measured."""
        coverage = _read(self._file(method, task))["coverage"]
        return coverage is not None and coverage["nominal"] == nominal

    def save_coverage(self, method: str, task: str, coverage: Coverage) -> None:
        """Add the coverage of a method's intervals to its figures."""
        self._write(method, task, _read(self._file(method, task)) | {"coverage": asdict(coverage)})

    def load(self, methods: Mapping[str, Entry]) -> Iterator[MethodResult]:
        """Everything that is there of these methods, task by task, methods in their order."""
        for task in sorted(path.name for path in self.folder.iterdir() if path.is_dir()):
            for method, entry in methods.items():
                if (file := self._file(method, task)).exists():
                    record = _read(file)
                    ran = record["reason"] is None
                    yield MethodResult(
                        method=method,
                        group=entry.group,
                        task=task,
                        held_out=self._read_held_out(method, task) if ran else None,
                        reason=record["reason"],
                        coverage=_coverage(record["coverage"]) if ran and record["coverage"] else None,
                        seconds=record["seconds"] if ran else None,
                    )

    def _file(self, method: str, task: str) -> Path:
        return self.folder / task / f"{method}.json"

    def _make_room(self, task: str) -> None:
        with writing(self.folder / task):
            (self.folder / task).mkdir(exist_ok=True)

    def _write(self, method: str, task: str, record: Mapping[str, Any]) -> None:
        write_json(self._file(method, task), {"method": method, "task": task, **record})

    def _read_held_out(self, method: str, task: str) -> HeldOut:
        table = read_parquet(self._file(method, task).with_suffix(".parquet"))
        shape = (-1, len(self.region_id))
        fold, label, prediction = (table[name].to_numpy().reshape(shape) for name in ("fold", "label", "prediction"))
        return HeldOut(labels=label[0], fold=fold, prediction=prediction)


def of_others(message: str, file: Path, expected: str, found: str, *, remove: str = "this file") -> BadConfig:
    """The error about results that depend on something else, with the settings that differ.

    Args:
        expected, found: What they should depend on and what they do, as JSON or another text.
        remove: What to remove to have them made anew.
    """
    should, do = differing(expected, found)
    fix = f"name another folder with --out, or remove {remove}"
    return BadConfig(message, file=file, expected=should, found=do, fix=fix)


def differing(*settings: str) -> tuple[str, ...]:
    """Of several settings as JSON, those that are not the same in all, each as ``ensemble.trees 64, seed 1``; other
    texts as they are."""
    try:
        flat = [dict(_leaves(json.loads(text))) for text in settings]
    except json.JSONDecodeError:
        return settings
    names = [name for name in {**flat[0], **flat[-1]} if len({json.dumps(one.get(name)) for one in flat}) > 1]
    return tuple(", ".join(f"{name} {json.dumps(one.get(name))}" for name in names) for one in flat)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that has no settings within, by its full name."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else key)


def _read(file: Path) -> dict[str, Any]:
    with reading(file):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _coverage(record: Mapping[str, Any]) -> Coverage:
    return Coverage(
        nominal=record["nominal"],
        all=Stratum(**record["all"]),
        by_size={name: Stratum(**stratum) for name, stratum in record["by_size"].items()},
        by_block=[Stratum(**stratum) for stratum in record["by_block"]],
    )
