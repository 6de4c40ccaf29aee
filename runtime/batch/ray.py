"""Many cities on a Ray cluster: one item per city, and actors that open the bundle once."""

import json
import logging
import os
import warnings
from collections.abc import Generator, Sequence
from dataclasses import asdict
from typing import Any

from topt_deploy.errors import NoDevice, ToptError

from ..predict_city import CityJob
from ..predictor import Predictor
from ..settings import Setting
from ..summary import CityResult
from .city_task import ATTEMPTS, lost_result, unopened, work
from .silenced_output import only_this_thread, quiet


class _Worker:
    """An actor of Ray Data: a bundle, opened once for all the cities that it gets. Jobs and results travel as text:
    in Arrow's columns every result would have the keys of all."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._opened: Predictor | ToptError
        try:
            self._opened = setting.open()
        except ToptError as error:
            self._opened = error

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        job = CityJob(**json.loads(item["job"]))
        if isinstance(self._opened, ToptError):
            return {"result": json.dumps(asdict(unopened(job, self._opened)))}
        return {"result": json.dumps(asdict(work(job, self._opened, self._setting)))}


def run_ray(jobs: Sequence[CityJob], setting: Setting, *, workers: int | None) -> Generator[CityResult]:
    """Do every job on the cluster that ``RAY_ADDRESS`` names, or on a local one; results come as they are made.

    Ray starts an actor anew that was lost, and tries its city :data:`.city_task.ATTEMPTS` times: to the same bytes.

    Args:
        jobs: In the order that they are begun in.
        setting: The settings that they have in common; every node must see the same paths.
        workers: How many actors; by default as many as the cluster has processors.

    Raises:
        NoDevice: If Ray is not installed, or its cluster does not answer.
    """
    with only_this_thread():
        yield from _run(jobs, setting, workers)


def _run(jobs: Sequence[CityJob], setting: Setting, workers: int | None) -> Generator[CityResult]:
    # Read when it is imported: its own errors reach us as exceptions, and users see our lines alone.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")
    os.environ["RAY_DEDUP_LOGS"] = "0"  # else it keeps lines back, and this very thread prints them in the end
    try:
        import ray
        import ray.data
        from ray.util.annotations import RayDeprecationWarning
    except ImportError as error:
        raise NoDevice(
            f"Ray cannot be imported ({error})", expected="ray", fix="pip install 'topt-deploy[ray]'"
        ) from error
    started = not ray.is_initialized()
    if started:
        try:
            with quiet():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (OSError, RuntimeError, ValueError) as error:
            place = os.environ.get("RAY_ADDRESS", "a local one")
            raise NoDevice(
                f"Ray's cluster does not answer ({error})",
                expected=place,
                fix="see RAY_ADDRESS, RAY_AUTH_TOKEN",
            ) from error
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.max_errored_blocks = -1  # a city that is lost does not end the others
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        lost = {job.name: job for job in jobs}
        cities = ray.data.from_items([{"job": json.dumps(asdict(job))} for job in jobs], override_num_blocks=len(jobs))
        with warnings.catch_warnings():  # the ways to say how often are to go in 2.64: then no end of trying is left
            warnings.simplefilter("ignore", RayDeprecationWarning)
            done = cities.map(
                _Worker,  # type: ignore[arg-type]  # a class is what the documentation says
                fn_constructor_args=(setting,),
                compute=ray.data.ActorPoolStrategy(size=min(count, len(jobs)), max_tasks_in_flight_per_actor=1),
                max_restarts=-1,
                max_task_retries=ATTEMPTS - 1,
            )
        for row in done.iter_rows():
            result = CityResult(**json.loads(row["result"]))
            del lost[result.city]
            yield result
        for job in lost.values():
            yield lost_result(job, "see Ray's logs")
    finally:
        if started:
            ray.shutdown()
