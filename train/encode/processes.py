"""Several processes that encode one city, each its share; regions are independent, so they meet only at the end."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from topt_deploy.errors import Exit, NoDevice, TryAgain, UsageError

LONGEST = timedelta(days=30)
"""The time that a finished process waits for the slowest one."""
POLL_S = 0.05
GRACE_S = 10.0
"""The seconds that a process has to end after it is told to."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """This process among those that encode a city (:class:`topt_deploy.prompts.encode_job.Team`).

    Attributes:
        rank: Its number; 0 merges and reports.
        size: How many there are.
    """

    rank: int
    size: int

    def total(self, count: int) -> int:
        """The sum of every process's count, once all have come this far."""
        import torch.distributed

        counts = [0] * self.size
        try:
            torch.distributed.all_gather_object(counts, count)
        except RuntimeError:  # another one has failed, and says why
            raise click.exceptions.Exit(Exit.TRY_AGAIN) from None
        return sum(counts)


def launched() -> bool:
    """True if ``accelerate launch``, or :func:`run_team`, started this process as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str) -> Iterator[Member]:
    """Join the other processes; on CUDA each takes the device of its own number.

    Raises:
        UsageError: If accelerate is not installed.
        NoDevice: If there are more processes than devices.
    """
    check_team(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device)
    from accelerate import PartialState

    # gloo, on CUDA too: a number is all that is exchanged, and NCCL takes memory of every device.
    state = PartialState(cpu=device == "cpu", timeout=LONGEST, **({"backend": "gloo"} if device == "cuda" else {}))
    try:
        yield Member(rank=state.process_index, size=state.num_processes)
    finally:
        state.destroy_process_group()


def check_team(size: int, device: str) -> None:
    """Refuse what cannot be started.

    Raises:
        UsageError: If accelerate is not installed.
        NoDevice: If there are more processes than devices.
    """
    if find_spec("accelerate") is None:
        raise UsageError(
            "several processes need accelerate, which is not installed", fix="pip install 'topt-deploy[multi-gpu]'"
        )
    if device == "cuda":
        import torch

        if torch.cuda.device_count() < size:
            raise NoDevice(
                "each process takes a CUDA device of its own",
                expected=f"{size} devices",
                found=torch.cuda.device_count(),
                fix="ask for fewer --processes, or use --device cpu",
            )


def run_team(arguments: Sequence[str], size: int, *, threads: int) -> None:
    """Run ``topt-deploy`` with these arguments in so many processes of this machine, and wait for all of them.

    The first one that fails ends the others. What the first process says is shown as it comes; what another one says
    is shown if it is the one that failed.

    Raises:
        click.exceptions.Exit: With the code of the process that failed, whose message is shown.
        TryAgain: If a process was killed.
    """
    shared = {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": str(threads),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
    }  # fmt: skip
    command = [sys.executable, "-m", "topt_deploy", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, str(rank)) for rank in range(size)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(size):
                environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with said[rank].open("wb") as file:
                    streams: dict[str, Any] = {} if rank == 0 else {"stdout": file, "stderr": file}
                    processes.append(subprocess.Popen(command, env=environment, **streams))
            failed = _first_failure(processes)
        finally:
            _end(processes)
        if failed is None:
            return
        code = processes[failed].returncode
        if failed:
            click.echo(said[failed].read_text(errors="replace"), err=True, nl=False)
    if code < 0:
        raise TryAgain(
            "a process of this run was killed", found=f"process {failed}, signal {-code}",
            fix="the same command goes on where it was; where memory ran out, with fewer --processes",
        )  # fmt: skip
    raise click.exceptions.Exit(code)


def _first_failure(processes: Sequence["subprocess.Popen[bytes]"]) -> int | None:
    """Wait; the number of the first process that failed, or None once all are done."""
    while True:
        codes = [process.poll() for process in processes]
        # A process that only noticed another one's end says "try again", and nothing else.
        failed = sorted((code == Exit.TRY_AGAIN, rank) for rank, code in enumerate(codes) if code)
        if failed and (not failed[0][0] or None not in codes):
            return failed[0][1]
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_S)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End those that still run."""
    for process in processes:
        process.terminate()
    last = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
