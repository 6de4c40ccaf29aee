"""Run folders, where training and export meet: finding them, and what ``run.json`` holds."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from topt_deploy.config.load import config_from_dict
from topt_deploy.config.settings import Config
from topt_deploy.storage.os_errors import reading
from topt_deploy.storage.text_files import write_json

from .errors import BadConfig, NoInput

RUN_FILE = "run.json"
MODEL_FILE = "model.safetensors"
INPUTS_FILE = "inputs.safetensors"
"""The training city's features, of several the first's: a finished run is exported without the city being at hand."""
RUNS_DIR = "runs"


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """A city that a run was started with: its folder, and hashes of its tables."""

    city_dir: Path
    regions_sha256: str
    mobility_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run's record.

    Attributes:
        path: The run folder.
        config: Its settings.
        city_dir: The city's folder.
        regions_sha256, mobility_sha256: Hashes of the tables it was started with.
        others: The further cities that it was started with.
        finished: True if the model is complete; set last.
        facts: More to record: reports, training ranges, versions, times.
    """

    path: Path
    config: Config
    city_dir: Path
    regions_sha256: str
    mobility_sha256: str | None
    finished: bool
    others: tuple[TrainedOn, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained_on(self) -> tuple[TrainedOn, ...]:
        """Every city that it was started with."""
        first = TrainedOn(
            city_dir=self.city_dir, regions_sha256=self.regions_sha256, mobility_sha256=self.mobility_sha256
        )
        return first, *self.others

    def of_folds(self, task: str) -> dict[str, Any]:
        """A finished run's ``fold_scores`` and ``size_trend`` of a task whose head has the fits of its folds.

        Raises:
            BadConfig: If an earlier version trained it, which had no trend.
        """
        if "size_trend" not in self.facts:
            raise BadConfig("this run was trained by an earlier version", file=self.path, fix="train again")
        return {name: self.facts[name][task] for name in ("fold_scores", "size_trend")}

    def save(self) -> None:
        """Write ``run.json``."""
        record = {
            "finished": self.finished,
            "city_dir": str(self.city_dir),
            "regions_sha256": self.regions_sha256,
            "mobility_sha256": self.mobility_sha256,
            "config": self.config.as_dict(),
            **self.facts,
        }
        if self.others:
            record["others"] = [asdict(other) | {"city_dir": str(other.city_dir)} for other in self.others]
        write_json(self.path / RUN_FILE, record)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Record that the run is complete."""
        replace(self, finished=True, facts={**self.facts, **facts}).save()


def open_run(path: Path) -> Run:
    """Read a run folder's record.

    Raises:
        NoInput: If the folder holds no run.
        BadConfig: If its record is damaged.
    """
    file = path / RUN_FILE
    if not file.exists():
        raise NoInput(
            "no training run in this folder", file=path, expected=f"a folder with {RUN_FILE}", fix="topt-deploy train"
        )
    try:
        with reading(file):
            record = json.loads(file.read_text(encoding="utf-8"))
        others = [TrainedOn(**other | {"city_dir": Path(other["city_dir"])}) for other in record.pop("others", [])]
        return Run(
            path=path,
            config=config_from_dict(record.pop("config"), str(file)),
            city_dir=Path(record.pop("city_dir")),
            regions_sha256=record.pop("regions_sha256"),
            mobility_sha256=record.pop("mobility_sha256"),
            finished=record.pop("finished"),
            others=tuple(others),
            facts=record,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadConfig(f"damaged run record ({error!r})", file=file, fix="train again") from error


def newest_run(city_dir: Path, *, finished: bool) -> Run:
    """The newest run under ``city_dir/runs`` that is finished, or that can be resumed.

    Raises:
        NoInput: If there is none.
    """
    folder = city_dir / RUNS_DIR
    candidates = sorted(folder.glob(f"*/{RUN_FILE}"), key=lambda file: (file.stat().st_mtime_ns, file), reverse=True)
    for file in candidates:
        run = open_run(file.parent)
        if run.finished == finished:
            return run
    raise NoInput(
        "no finished training run" if finished else "no unfinished training run",
        file=folder,
        found=f"{len(candidates)} runs",
        fix="topt-deploy train" if finished else "start one with topt-deploy train",
    )
