"""Worker processes on this machine: one city at a time each, and none of them takes another one's work down with it.

Workers are forked from a process that has opened the bundle and checked its bytes, and so share them. A worker that
dies, killed for its memory perhaps, is replaced, and its city tried once more; then it counts as failed.
"""

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..predict_city import Job
from .city_task import ATTEMPTS, Result, lost_result

SMALL_BYTES = 4 << 20
"""Size of the largest city's tables, as files, up to which a second worker per processor takes little memory."""


def run_local(jobs: Sequence[Job], work: Callable[[Job], Result], *, workers: int) -> Generator[Result]:
    """Do every job in one of ``workers`` processes; results come as they are made.

    Args:
        jobs: In the order that they are begun in.
        work: Runs in a forked process, so it need not be picklable; its result must be.
        workers: How many at once.
    """
    waiting = deque((job, 1) for job in jobs)
    pool: list[_Worker] = []
    try:
        for _ in range(min(workers, len(jobs))):
            pool.append(_Worker(work, pool))
        busy: dict[Connection, tuple[_Worker, Job, int]] = {}
        idle = list(pool)
        while waiting or busy:
            while waiting and idle:
                worker, (job, attempt) = idle.pop(), waiting.popleft()
                busy[worker.connection] = (worker, job, attempt)
                worker.send(job)
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                worker, job, attempt = busy.pop(ready)
                try:
                    yield ready.recv()
                    idle.append(worker)
                except (EOFError, OSError):
                    pool.remove(worker)
                    how = worker.died()
                    if attempt < ATTEMPTS:
                        waiting.appendleft((job, attempt + 1))
                    else:
                        yield lost_result(job, how)
                    worker = _Worker(work, pool)
                    pool.append(worker)
                    idle.append(worker)
    finally:
        for worker in pool:
            worker.stop()


def workers_for(jobs: Sequence[Job]) -> int:
    """The default number of workers: one per processor; two if cities are small, because those wait for the disk as
    long as they compute."""
    return usable_cpus() * (2 if max((job.size for job in jobs), default=0) <= SMALL_BYTES else 1)


def usable_cpus() -> int:
    """The number of processors that this process may use by the limits of its container or batch system."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # a container's share of time, where it has a limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


class _Worker:
    def __init__(self, work: Callable[[Job], Result], others: Sequence["_Worker"]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        # A forked process holds the ends of its older siblings' pipes, and has to let go of them: while anyone holds
        # the parent's end, a worker does not see that the parent is gone.
        inherited = [self.connection, *(other.connection for other in others)]
        self._process = context.Process(target=_serve, args=(theirs, inherited, work), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, job: Job) -> None:
        with suppress(OSError):  # it is dead already, which is found out when its result is read
            self.connection.send(job)

    def died(self) -> str:
        """A description of how its process ended."""
        self.connection.close()
        self._process.join()
        code = self._process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        self.connection.close()
        self._process.join()


def _serve(connection: Connection, inherited: Sequence[Connection], work: Callable[[Job], Result]) -> None:
    """Do jobs until the parent closes its end, or is gone; a result that nobody waits for any more is lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle: a terminal sends it to all
    gc.freeze()  # what the parent has made stays, and need not be looked through, nor copied, time and again
    for other in inherited:
        other.close()
    with suppress(EOFError, OSError):
        while True:
            job: Any = connection.recv()
            connection.send(work(job))
