"""One city of a batch, wherever it is worked on: every engine calls :func:`work`, and gets a result that travels."""

import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topt_deploy.errors import BadBundle, CannotCreate, Exit, ToptError, user_error
from topt_deploy.storage.os_errors import write_error

from ..addresses import local_path, shown
from ..predict_city import CityJob, predict_city
from ..predictor import Predictor
from ..settings import Setting
from ..summary import FAILED, CityResult, result_of
from . import object_stores

ATTEMPTS = 2
"""The number of attempts for a city whose worker dies."""


def failed(job: CityJob, error: Mapping[str, Any], told: str, seconds: float = 0.0) -> CityResult:
    """The result of a city that was not predicted."""
    return CityResult(
        city=job.name,
        file=shown(job.out),
        status=FAILED,
        error=error,
        told=told,
        seconds=round(seconds, 4),
    )


def lost_result(job: CityJob, how: str) -> CityResult:
    """The result of a city whose worker died, and that of the next try too."""
    facts = {
        "error": "WorkerLost",
        "exit_code": int(Exit.TRY_AGAIN),
        "message": f"the worker died, and that of the next try too ({how})",
        "file": shown(job.regions),
        "to_do": "give it more memory, or fewer --workers, and go on with --resume",
    }
    return failed(job, facts, f"{facts['message']}\n  to do:    {facts['to_do']}")


def crashed_result(job: CityJob, how: str) -> CityResult:
    """The result of a city at which the bundle's graph ended its worker: another try would end like this one."""
    error = BadBundle(
        f"the bundle's graph ended the process that ran it ({how})", file=shown(job.regions),
        fix="do not use this bundle for this city; export it again",
    )  # fmt: skip
    return failed(job, error.as_dict(), str(error))


def unopened(job: CityJob, error: ToptError) -> CityResult:
    """The result of a city on a node of a cluster that cannot open the bundle, which the command itself could."""
    facts = error.as_dict() | {
        "message": f"a node of the cluster cannot open the bundle: {error.message}",
        "to_do": "put the same bundle where every node sees it under this path",
    }
    return failed(job, facts, f"{facts['file']}: {facts['message']}\n  to do:    {facts['to_do']}")


def _check_folder(out: str) -> None:
    """Refuse a city's folder that is a link: a batch makes these folders itself, under names that anyone can foresee.

    Raises:
        CannotCreate: If it is one.
    """
    place = local_path(out)
    if place is not None and (folder := place.parent).is_symlink():
        raise CannotCreate(
            "the city's folder is a link", file=shown(out), expected="a folder, or none",
            found=f"a link to {os.path.realpath(folder)}", fix="remove the link, or let --out be the link",
        )  # fmt: skip


def work(job: CityJob, predictor: Predictor, setting: Setting) -> CityResult:
    """Predict one city; what goes wrong with it is its result and no exception, for the others go on.

    Raises:
        UsageError: If the command itself is wrong, and so every city would be.
    """
    began = time.perf_counter()
    try:
        _check_folder(job.out)
        with object_stores.local(job) as here:
            try:
                Path(here.out).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise write_error(Path(here.out), error) from error
            outcome = predict_city(predictor, here, setting.options, resume=setting.resume, cache=setting.cache)
    except ToptError as error:
        return failed(job, error.as_dict(), str(error), time.perf_counter() - began)
    except Exception as error:
        place = shown(job.regions)
        if (known := user_error(error, place)) is not None:
            return failed(job, known.as_dict(), str(known), time.perf_counter() - began)
        bug = {"error": type(error).__name__, "exit_code": int(Exit.BUG), "message": str(error), "file": place}
        told = f"{traceback.format_exc()}This is a bug in topt-deploy. Please report it with the lines above."
        return failed(job, bug, told, time.perf_counter() - began)
    return result_of(job, outcome, time.perf_counter() - began)
