"""A batch from its command line to its summary: plan, engine, results as they come."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import overload

from topt_deploy.errors import UsageError
from topt_deploy.pandas_blocker import with_pandas
from topt_deploy.storage.outputs import check_outside

from ..addresses import is_uri
from ..device_choice import CPU
from ..predict_city import CityJob
from ..settings import Setting
from ..summary import CityResult, Summary
from .city_task import work
from .local_workers import run_local, workers_for
from .plan import plan
from .separate_process import apart

ENGINES = LOCAL, RAY, SPARK = "local", "ray", "spark"


def run_batch(
    inputs: Sequence[str],
    out: str,
    setting: Setting,
    summary: Summary,
    *,
    engine: str = LOCAL,
    workers: int | None = None,
    timeout: float | None = None,
    told: Callable[[CityResult, int, int], None] = lambda result, done, total: None,
) -> None:
    """Predict many cities.

    Args:
        inputs, out: Of :func:`.plan.plan`.
        setting: The settings that they have in common.
        summary: Where results are counted.
        engine: One of :data:`ENGINES`.
        workers: How many cities at once; by default :func:`.local.workers_for`, or the cluster's choice; on a GPU one.
        timeout: Seconds that one city may take, on the local engine's CPU.
        told: Each result as it comes, how many there are by now, and of how many.

    Raises:
        ToptError: If nothing can begin: no bundle, no input, no engine.
    """
    # Where a cluster's workers predict, this machine needs no GPU.
    predictor = (setting if engine == LOCAL else replace(setting, device=CPU)).open()
    if timeout is not None and (engine != LOCAL or predictor.device != CPU):
        raise UsageError("--timeout is for --engine local on the CPU", fix="leave --timeout out")
    for task in setting.options.tasks:
        if task not in predictor.tasks:
            raise UsageError(
                f"the bundle does not predict {task!r}", file=setting.bundle,
                expected=f"one of {', '.join(predictor.tasks)}", fix="choose one of these, or train the task",
            )  # fmt: skip
    if not is_uri(out):
        check_outside(Path(out), [Path(setting.bundle)])
    search = partial(plan, inputs, out, mobility=predictor.bundle.manifest.mobility)
    jobs = apart(search) if any(map(is_uri, inputs)) else search()
    results: Generator[CityResult]
    if engine == LOCAL and predictor.device != CPU:
        # What CUDA has made in a process does not survive a fork, and one process keeps a GPU busy.
        if (workers or 1) > 1:
            raise UsageError(
                "one process has the GPU", expected="--workers 1", found=workers, fix="leave --workers out"
            )
        results = (work(job, predictor=predictor, setting=setting) for job in jobs)
    elif engine == LOCAL:
        _ = predictor.parts  # read and checked once, here, for all workers
        todo = partial(work, predictor=predictor, setting=setting)
        results = run_local(jobs, todo, workers=workers or workers_for(jobs), timeout=timeout)
    else:
        everywhere = replace(
            setting, bundle=_absolute(setting.bundle), encoder_bundle=_absolute(setting.encoder_bundle)
        )
        results = _cluster(engine)([_anywhere(job) for job in jobs], everywhere, workers=workers)
    with closing(results):
        for done, result in enumerate(results, start=1):
            summary.add(result)
            told(result, done, len(jobs))


def _anywhere(job: CityJob) -> CityJob:
    """The job for a process in whatever folder."""
    return replace(job, regions=_absolute(job.regions), mobility=_absolute(job.mobility), out=_absolute(job.out))


@overload
def _absolute(place: str) -> str: ...
@overload
def _absolute(place: str | None) -> str | None: ...
def _absolute(place: str | None) -> str | None:
    return place if place is None or is_uri(place) else os.path.abspath(place)


def _cluster(engine: str) -> Callable[..., Generator[CityResult]]:
    with_pandas()
    if engine == RAY:
        from .ray import run_ray

        return run_ray
    from .spark import run_spark

    return run_spark
