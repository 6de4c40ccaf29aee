"""Worker processes on this machine: one city at a time each, and none of them takes another one's work down with it.

Workers are forked from a process that has opened the bundle and checked its bytes, and so share them. A worker that
dies, killed for its memory perhaps, is replaced, and its city tried once more; then it counts as failed.
"""

import gc
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from topt_deploy.errors import Terminated
from topt_deploy.no_memory import end_without_memory

from ..predict_city import CityJob
from ..summary import CityResult, too_long
from .city_task import ATTEMPTS, crashed_result, failed, lost_result

PR_SET_PDEATHSIG = 1
"""Of Linux' prctl.h."""
SENT = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""By which a process is ended from outside: for its memory, or by whoever stops the batch."""
LOOK_EVERY_S = 0.2
"""How often workers' time is looked at, where it has a limit."""
GRACE_S = 3.0
"""How long workers that are ended may take to remove their temporary files and locks."""
SMALL_BYTES = 4 << 20
"""Size of the largest city's tables, as files, up to which a second worker per processor takes little memory."""


def run_local(
    jobs: Sequence[CityJob], work: Callable[[CityJob], CityResult], *, workers: int, timeout: float | None = None
) -> Generator[CityResult]:
    """Do every job in one of ``workers`` processes; results come as they are made.

    Args:
        jobs: In the order that they are begun in.
        work: Runs in a forked process, so it need not be picklable; its result must be.
        workers: How many at once.
        timeout: Seconds that one city may take.
    """
    waiting = deque((job, 1) for job in jobs)
    pool: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, CityJob, int]] = {}
    try:
        for _ in range(min(workers, len(jobs))):
            pool.append(_Worker(work, pool))
        idle = list(pool)
        while waiting or busy:
            while waiting and idle:
                worker, (job, attempt) = idle.pop(), waiting.popleft()
                busy[worker.connection] = (worker, job, attempt)
                worker.send(job)
            if timeout is not None:
                for worker, job, _ in list(busy.values()):
                    if worker.busy_s() > timeout:
                        del busy[worker.connection]
                        pool.remove(worker)
                        worker.kill()
                        yield failed(job, (late := too_long(job.regions, timeout)).as_dict(), str(late), timeout)
                        pool.append(_Worker(work, pool))
                        idle.append(pool[-1])
            for ready in wait(list(busy), None if timeout is None else LOOK_EVERY_S):
                assert isinstance(ready, Connection)
                worker, job, attempt = busy.pop(ready)
                try:
                    yield ready.recv()
                    idle.append(worker)
                except (EOFError, OSError):
                    pool.remove(worker)
                    how, crashed = worker.died()
                    if crashed:
                        yield crashed_result(job, how)
                    elif attempt < ATTEMPTS:
                        waiting.appendleft((job, attempt + 1))
                    else:
                        yield lost_result(job, how)
                    worker = _Worker(work, pool)
                    pool.append(worker)
                    idle.append(worker)
    except BaseException:  # nobody waits for the results of those that are at work
        left = [worker for worker, *_ in busy.values()]
        for worker in left:
            worker.terminate()
        until = time.monotonic() + GRACE_S
        for worker in left:
            worker.kill(until - time.monotonic())
        raise
    finally:
        for worker in pool:
            worker.stop()


def workers_for(jobs: Sequence[CityJob]) -> int:
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
    def __init__(self, work: Callable[[CityJob], CityResult], others: Sequence["_Worker"]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._since = 0.0
        # A forked process holds the ends of its older siblings' pipes, and has to let go of them: while anyone holds
        # the parent's end, a worker does not see that the parent is gone.
        inherited = [self.connection, *(other.connection for other in others)]
        self._process = context.Process(target=_serve, args=(theirs, inherited, work, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, job: CityJob) -> None:
        """Give it work."""
        self._since = time.monotonic()
        with suppress(OSError):  # it is dead already, which is found out when its result is read
            self.connection.send(job)

    def busy_s(self) -> float:
        """How long it has been at work on its city."""
        return time.monotonic() - self._since

    def terminate(self) -> None:
        """Have it end as soon as it is not within a computation, its temporary files and its lock removed."""
        self._process.terminate()

    def kill(self, grace: float = 0.0) -> None:
        """End it whatever it is in, after so many seconds; the next run removes the files that it then leaves."""
        self._process.join(max(grace, 0.0))
        self._process.kill()
        self.connection.close()
        self._process.join()

    def died(self) -> tuple[str, bool]:
        """A description of how its process ended, and True if it was by a signal that nobody sends to end a process."""
        self.connection.close()
        self._process.join()
        code = self._process.exitcode or 0
        if code >= 0:
            return f"exit code {code}", False
        return f"killed by {signal.Signals(-code).name}", -code not in SENT

    def stop(self) -> None:
        self.connection.close()
        self._process.join()


def _serve(
    connection: Connection, inherited: Sequence[Connection], work: Callable[[CityJob], CityResult], parent: int
) -> None:
    """Do jobs until the parent closes its end, or is gone; a result that nobody waits for any more is lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle: a terminal sends it to all
    signal.signal(signal.SIGTERM, _leave)
    end_without_memory(lambda error: None)  # the parent tells of it
    _die_with(parent)
    gc.freeze()  # what the parent has made stays, and need not be looked through, nor copied, time and again
    for other in inherited:
        other.close()
    try:
        with suppress(EOFError, OSError):
            while True:
                job: Any = connection.recv()
                connection.send(work(job))
    except Terminated:  # the parent sees by what
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def _leave(*_: object) -> NoReturn:
    raise Terminated


def _die_with(parent: int) -> None:
    """Have this process end with its parent, whatever it is in, where the system can do that (Linux).

    A worker that waits for ever would keep its city's lock, and nobody would know of it.
    """
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
