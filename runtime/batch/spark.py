"""Many cities on Spark: one city per task, and a bundle that every Python worker opens once."""

import os
from collections.abc import Generator, Iterable, Sequence
from functools import cache

from topt_deploy.errors import NoDevice

from ..city import Job
from ..predictor import Predictor
from .work import Result, Setting, work


@cache
def _opened(setting: Setting) -> Predictor:
    """The bundle of a Python worker, which Spark gives task after task."""
    return setting.open()


def run_spark(jobs: Sequence[Job], setting: Setting, *, workers: int | None) -> Generator[Result]:
    """Do every job on the session that there is, on ``spark-submit``'s, or else on a local one.

    Args:
        jobs: One task each.
        setting: What they have in common; every node must see the same paths.
        workers: Processors of a local session, where no other is set.

    Raises:
        NoDevice: If Spark or its Java is not installed.
    """
    try:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise NoDevice(
            f"Spark cannot be imported ({error})", expected="pyspark ≥ 4", fix="pip install 'topt-deploy[spark]'"
        ) from error
    there = SparkSession.getActiveSession()
    builder = SparkSession.builder.appName("topt-run predict")
    if there is None and "PYSPARK_GATEWAY_PORT" not in os.environ:  # spark-submit has its own settings
        builder = builder.master(f"local[{workers or '*'}]").config("spark.ui.enabled", "false")
    try:
        session = there or builder.getOrCreate()
    except (PySparkException, OSError) as error:
        raise NoDevice(
            f"Spark does not start ({error})", expected="Java 17 or later", fix="install it; set JAVA_HOME"
        ) from error

    def task(items: Iterable[Job]) -> Iterable[Result]:
        return (work(job, _opened(setting), setting) for job in items)

    try:
        yield from session.sparkContext.parallelize(jobs, len(jobs)).mapPartitions(task).collect()
    finally:
        if there is None:
            session.stop()
