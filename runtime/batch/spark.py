"""Many cities on Spark: one city per task, and a bundle that every Python worker opens once."""

import os
import sys
import warnings
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from functools import cache

from topt_deploy.errors import NoDevice, ToptError

from ..predict_city import CityJob
from ..predictor import Predictor
from ..settings import Setting
from ..summary import CityResult
from .city_task import ATTEMPTS, lost_result, unopened, work
from .silenced_output import quiet


@cache
def _opened(setting: Setting) -> Predictor:
    """The bundle of a Python worker, which Spark gives task after task."""
    return setting.open()


def run_spark(jobs: Sequence[CityJob], setting: Setting, *, workers: int | None) -> Generator[CityResult]:
    """Do every job on the session that there is, on ``spark-submit``'s, or else on a local one; results come as they
    are made.

    Every city is a Spark job of its own, of one task: one that takes its workers down with it, time and again, fails
    alone.

    Args:
        jobs: In the order that they are begun in.
        setting: The settings that they have in common; every node must see the same paths.
        workers: Processors of a local session, where no other is set.

    Raises:
        NoDevice: If Spark or its Java is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of pandas, which is not used
        try:
            from py4j.protocol import Py4JError  # type: ignore[import-untyped]
            from pyspark.errors import PySparkException
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise NoDevice(
                f"Spark cannot be imported ({error})", expected="pyspark ≥ 4", fix="pip install 'topt-deploy[spark]'"
            ) from error
        there = SparkSession.getActiveSession()
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else whatever python3 is, which may lack all of this
        builder = SparkSession.builder.appName("topt-run predict")
        ours = there is None and "PYSPARK_GATEWAY_PORT" not in os.environ  # spark-submit has its own settings
        if ours:
            builder = builder.master(f"local[{workers or '*'},{ATTEMPTS}]")
            builder = builder.config("spark.ui.enabled", "false").config("spark.ui.showConsoleProgress", "false")
        try:
            with quiet() if ours else nullcontext():
                session = there or builder.getOrCreate()
        except (PySparkException, Py4JError, OSError) as error:
            raise NoDevice(
                f"Spark does not start ({error})", expected="Java 17 or later", fix="install it; set JAVA_HOME"
            ) from error
    context = session.sparkContext

    def task(items: Iterable[CityJob]) -> Iterable[CityResult]:
        for job in items:
            try:
                predictor = _opened(setting)
            except ToptError as error:
                yield unopened(job, error)
            else:
                yield work(job, predictor, setting)

    def run(job: CityJob) -> CityResult:
        try:
            (result,) = context.parallelize([job], 1).mapPartitions(task).collect()
        except (PySparkException, Py4JError) as error:
            return lost_result(
                job, next((line for line in str(error).splitlines() if "failed" in line), "see Spark's logs")
            )
        return result

    pool = ThreadPoolExecutor(context.defaultParallelism)
    try:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if there is None:
            session.stop()
