"""Results of cities, one or many: their statuses, exit codes, the record of a batch, and metrics."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topt_deploy.errors import Exit, ToptError, TryAgain, exit_code, how_many
from topt_deploy.storage.text_files import write_text

from .addresses import is_uri, joined, shown
from .predict_city import DONE, PARTIAL, SKIPPED, CityJob, CityOutcome

FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class CityResult:
    """The outcome of a city, in plain values.

    Attributes:
        city, file: The city and its output.
        status: A status of :mod:`topt_deploy.runtime.predict_city`, or :data:`FAILED`.
        regions: How many regions there are by status.
        set_aside: How many rows of each table were set aside, by reason code.
        seconds: It took.
        error: The facts of :meth:`topt_deploy.errors.ToptError.as_dict`; None without an error.
        told: The same for people.
    """

    city: str
    file: str
    status: str
    regions: Mapping[str, int] = field(default_factory=dict)
    set_aside: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seconds: float = 0.0
    error: Mapping[str, Any] | None = None
    told: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        facts = {name: value for name, value in vars(self).items() if name != "told"}
        return facts if self.error is not None else {k: v for k, v in facts.items() if k != "error"}


def result_of(job: CityJob, outcome: CityOutcome, seconds: float = 0.0) -> CityResult:
    """The result of a city that was predicted, or had been before."""
    receipt = outcome.receipt
    return CityResult(
        city=job.name,
        file=shown(job.out),
        status=outcome.status,
        regions=receipt["status"],
        set_aside={table: facts["rows"] for table, facts in receipt["set_aside"].items()},
        seconds=round(seconds, 4),
    )


AGAIN = (Exit.IO_ERROR, Exit.TRY_AGAIN, Exit.TERMINATED)
"""Codes of failures that are the machine's and not the data's: the same command with ``--resume`` may succeed."""


class Summary:
    """Counts of a batch; memory grows with the number of failures, not of cities."""

    def __init__(self) -> None:
        self._began = time.time()
        self.cities: Counter[str] = Counter()
        self.regions: Counter[str] = Counter()
        self.set_aside: Counter[tuple[str, str]] = Counter()
        self.failures: list[CityResult] = []
        self._ended: Exit | None = None

    def end(self, error: BaseException) -> None:
        """Note that the run ended before its end."""
        self._ended = exit_code(error)

    @contextmanager
    def recorded(self, out: str) -> Iterator[None]:
        """Have the record tell of a run that is ended before its end."""
        try:
            yield
        except BaseException as error:
            self.end(error)
            if self.cities or not isinstance(error, ToptError):  # else nothing has begun, and an older record stays
                with suppress(ToptError):  # the first error is the one that is told
                    self.write(out)
            raise

    def write(self, out: str) -> None:
        """Write the record into the batch's folder."""
        write_record(out, self)

    def add(self, result: CityResult) -> None:
        """Count a city."""
        self.cities[result.status] += 1
        self.regions.update(result.regions)
        for table, codes in result.set_aside.items():
            self.set_aside.update({(table, code): rows for code, rows in codes.items()})
        if result.status == FAILED:
            self.failures.append(result)

    @property
    def exit_code(self) -> int:
        """That of what ended the run early; else 0 if all is done; 3 if something was set aside or some cities failed;
        a failure's own code if all did.

        Failures that are the machine's, a full disk or a lost worker, come before the data's: trying again helps.
        """
        if self._ended is not None:
            return int(self._ended)
        codes = [int(result.error["exit_code"]) for result in self.failures if result.error]
        if again := [code for code in codes if code in AGAIN]:
            return again[0]
        if codes and len(codes) == self.cities.total():
            return codes[0] if len(set(codes)) == 1 else int(Exit.BAD_DATA)
        return int(Exit.PARTIAL if codes or self.set_aside else Exit.DONE)

    def record(self) -> dict[str, Any]:
        """Everything, in plain values."""
        return {
            "exit_code": self.exit_code,
            "cities": dict(sorted(self.cities.items())),
            "regions": dict(sorted(self.regions.items())),
            "set_aside": {f"{table} {code}": rows for (table, code), rows in sorted(self.set_aside.items())},
            "seconds": round(time.time() - self._began, 3),
            "failed": [{"city": r.city, "output": r.file, **(r.error or {})} for r in self.failures],
        }

    def text(self) -> str:
        """The same for people."""
        known = [status for status in (DONE, PARTIAL, SKIPPED, FAILED) if self.cities[status]]
        told = [f"{self.cities[status]:,} {status}" for status in known]
        rows = self.set_aside.total()
        return f"{how_many(self.cities.total(), 'city', 'cities')}: {', '.join(told)}" + (
            f"; {how_many(rows, 'row')} set aside" if rows else ""
        )

    def metrics(self) -> str:
        """For the textfile collector of Prometheus' node_exporter, in its text format."""
        cities = {status: self.cities[status] for status in (DONE, PARTIAL, SKIPPED, FAILED)}
        aside = {f'{{table="{_label(t)}",code="{_label(c)}"}}': n for (t, c), n in sorted(self.set_aside.items())}
        regions = {f'{{status="{_label(s)}"}}': n for s, n in sorted(self.regions.items())}
        families: list[tuple[str, str, Mapping[str, float]]] = [
            ("exit_code", "Exit code of the last run.", {"": self.exit_code}),
            ("finished_timestamp_seconds", "When it ended, in seconds since 1970.", {"": time.time()}),
            ("duration_seconds", "How long it took.", {"": time.time() - self._began}),
            ("cities", "Cities by what became of them.", {f'{{status="{s}"}}': n for s, n in cities.items()}),
            ("regions", "Predictions by status.", regions),
            ("set_aside_rows", "Rows set aside, by table and reason.", aside),
        ]
        lines = []
        for name, told, values in families:
            lines += [f"# HELP topt_run_{name} {told}", f"# TYPE topt_run_{name} gauge"]
            lines += [f"topt_run_{name}{labels} {value:.15g}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"


def _label(value: str) -> str:
    """A label's value, as the format has it."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def write_metrics(path: Path, text: str) -> None:
    """Write the metrics whole: a collector that comes in between sees the old ones."""
    write_text(path, text)


def too_long(regions: str, seconds: float) -> TryAgain:
    """The error of a city that took longer than it may."""
    return TryAgain(
        f"took longer than {seconds:g} s", file=shown(regions),
        fix="give it more with --timeout, or look what is so large in it",
    )  # fmt: skip


RECORD = "_run.json"
"""Beside the cities' folders; readers of Hive partitions pass over names with an underscore."""


def write_record(out: str, summary: Summary) -> None:
    """Write :data:`RECORD` into the batch's folder."""
    text = json.dumps(summary.record(), indent=2) + "\n"
    place = joined(out, RECORD)
    if is_uri(out):
        from .batch.object_stores import put_text

        put_text(place, text)
    else:
        with suppress(OSError):  # said by the next line, with its code
            Path(out).mkdir(parents=True, exist_ok=True)
        write_text(Path(place), text)
