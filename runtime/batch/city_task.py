"""One city of a batch, wherever it is worked on: every engine calls :func:`work`, and gets a result that travels."""

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topt_deploy.errors import BadBundle, Exit, ToptError, TryAgain, user_error
from topt_deploy.storage.os_errors import write_error

from ..predict_city import Job, Options, Outcome, predict_city
from ..predictor import Predictor, open_predictor
from . import object_stores

FAILED = "failed"
ATTEMPTS = 2
"""The number of attempts for a city whose worker dies."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings that all cities of a batch have in common.

    Attributes:
        bundle: The bundle's path, which every worker must see.
        device, threads, encoder, engine, key: Of :func:`topt_deploy.runtime.predictor.load`.
        options: The options that shape the output.
        resume: True if cities that are done are left as they are.
        cache: True if prompts are kept beside the regions.
    """

    bundle: str
    device: str = "cpu"
    threads: int = 1
    encoder: str | None = None
    engine: str = "onnxruntime"
    key: str | None = None
    options: Options = field(default_factory=Options)
    resume: bool = False
    cache: bool = True

    def open(self) -> Predictor:
        """The bundle, opened and checked."""
        place, public = (None if path is None else Path(path) for path in (self.encoder, self.key))
        return open_predictor(
            Path(self.bundle), device=self.device, threads=self.threads, encoder=place, engine=self.engine, key=public
        )


@dataclass(frozen=True, kw_only=True)
class Result:
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


def failed(job: Job, error: Mapping[str, Any], told: str, seconds: float = 0.0) -> Result:
    """The result of a city that was not predicted."""
    return Result(
        city=job.name,
        file=object_stores.shown(job.out),
        status=FAILED,
        error=error,
        told=told,
        seconds=round(seconds, 4),
    )


def lost_result(job: Job, how: str) -> Result:
    """The result of a city whose worker died, and that of the next try too."""
    facts = {
        "error": "WorkerLost",
        "exit_code": int(Exit.TRY_AGAIN),
        "message": f"the worker died, and that of the next try too ({how})",
        "file": object_stores.shown(job.regions),
        "to_do": "give it more memory, or fewer --workers, and go on with --resume",
    }
    return failed(job, facts, f"{facts['message']}\n  to do:    {facts['to_do']}")


def crashed_result(job: Job, how: str) -> Result:
    """The result of a city at which the bundle's graph ended its worker: another try would end like this one."""
    error = BadBundle(
        f"the bundle's graph ended the process that ran it ({how})", file=object_stores.shown(job.regions),
        fix="do not use this bundle for this city; export it again",
    )  # fmt: skip
    return failed(job, error.as_dict(), str(error))


def too_long(regions: str, seconds: float) -> TryAgain:
    """The error of a city that took longer than it may."""
    return TryAgain(
        f"took longer than {seconds:g} s", file=object_stores.shown(regions),
        fix="give it more with --timeout, or look what is so large in it",
    )  # fmt: skip


def unopened(job: Job, error: ToptError) -> Result:
    """The result of a city on a node of a cluster that cannot open the bundle, which the command itself could."""
    facts = error.as_dict() | {
        "message": f"a node of the cluster cannot open the bundle: {error.message}",
        "to_do": "put the same bundle where every node sees it under this path",
    }
    return failed(job, facts, f"{facts['file']}: {facts['message']}\n  to do:    {facts['to_do']}")


def result_of(job: Job, outcome: Outcome, seconds: float = 0.0) -> Result:
    """The result of a city that was predicted, or had been before."""
    receipt = outcome.receipt
    return Result(
        city=job.name,
        file=object_stores.shown(job.out),
        status=outcome.status,
        regions=receipt["status"],
        set_aside={table: facts["rows"] for table, facts in receipt["set_aside"].items()},
        seconds=round(seconds, 4),
    )


def work(job: Job, predictor: Predictor, setting: Setting) -> Result:
    """Predict one city; what goes wrong with it is its result and no exception, for the others go on.

    Raises:
        UsageError: If the command itself is wrong, and so every city would be.
    """
    began = time.perf_counter()
    try:
        with object_stores.local(job) as here:
            try:
                Path(here.out).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise write_error(Path(here.out), error) from error
            outcome = predict_city(predictor, here, setting.options, resume=setting.resume, cache=setting.cache)
    except ToptError as error:
        return failed(job, error.as_dict(), str(error), time.perf_counter() - began)
    except (OSError, MemoryError) as error:
        known = user_error(error, object_stores.shown(job.regions))
        assert known is not None
        return failed(job, known.as_dict(), str(known), time.perf_counter() - began)
    except Exception as error:
        place = object_stores.shown(job.regions)
        bug = {"error": type(error).__name__, "exit_code": int(Exit.BUG), "message": str(error), "file": place}
        told = f"{traceback.format_exc()}This is a bug in topt-deploy. Please report it with the lines above."
        return failed(job, bug, told, time.perf_counter() - began)
    return result_of(job, outcome, time.perf_counter() - began)
