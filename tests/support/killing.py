"""Kill -9: a command and all its processes at an instant of its run, what stands then, and whether it goes on."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

import pyarrow.parquet as pq
from commands import environment


class Running(Protocol):
    """A command's process, the first of a process group of its own."""

    @property
    def pid(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; :class:`subprocess.TimeoutExpired` if it has none in time."""


Start = Callable[[str, Path, Path, Mapping[str, str]], Running]
"""Starts a command in a folder; what it prints goes into a file."""


def in_a_shell(command: str, place: Path, said: Path, more: Mapping[str, str]) -> Running:
    """Start a command line."""
    with said.open("w") as file:
        return subprocess.Popen(
            command, shell=True, cwd=place, start_new_session=True, env=environment(**more), stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


class Forked:
    """A function of a module in a process that is forked from one which has imported everything: what has a second to
    run need not have five to start."""

    def __init__(self, function: Callable[[str], None], command: str, place: Path, said: Path, more: Mapping[str, str]):
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_forked, args=(function, command, str(place), str(said), dict(more)))
        self._process.start()

    @classmethod
    def starter(cls, function: Callable[[str], None], preload: Sequence[str]) -> Start:
        """Starts that function, given the command, where modules are imported already."""
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
        return lambda *arguments: cls(function, *arguments)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0.0)
        return code


def _forked(function: Callable[[str], None], command: str, place: str, said: str, more: dict[str, str]) -> None:
    os.setsid()
    os.chdir(place)
    os.environ.update(more)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(command)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A command to be killed.

    Attributes:
        command: What is run in a folder of inputs.
        resume: What goes on with it.
        results: How names of files end that must be those of an uninterrupted run, byte for byte.
        earlier: A command that has made older results, which must stand, whole, until new ones do.
    """

    command: str
    resume: str
    results: tuple[str, ...]
    earlier: str | None = None


class Trials:
    """Trials of one target.

    Args:
        inputs: The folder to run it in; it is copied for every trial.
        scratch: Where copies go, and TMPDIR lies.
        start: How its commands are started.

    Attributes:
        seconds: What an uninterrupted run takes.
        idle_s: How much of it is over before anything is written; until then there is nothing to be torn.
        kills: How many there were so far.
        begun: How many of them left more than there was before, be it a temporary file.
    """

    def __init__(self, target: Target, inputs: Path, scratch: Path, start: Start = in_a_shell) -> None:
        self.target, self._scratch, self._start = target, scratch, start
        self.kills = self.begun = 0
        (scratch / "tmp").mkdir(parents=True)
        self._before = scratch / "before"
        shutil.copytree(inputs, self._before)
        if target.earlier is not None:
            self._run(target.earlier, self._before)
        done = scratch / "done"
        for _ in range(2):  # the first time for the system's caches
            shutil.rmtree(done, ignore_errors=True)
            shutil.copytree(self._before, done)
            self.idle_s, self.seconds = self._timed(target.command, done)
        self._old, self._new = self._results(self._before), self._results(done)
        self._names = names(done)
        assert self._new
        assert set(self._old) <= set(self._new)
        assert not self._old or self._old != self._new

    def __call__(self, rng: Random) -> None:
        """Kill a run, or a run and those that go on with it a few times over, and then let it end.

        Raises:
            AssertionError: If something is torn, is left over, or differs from the uninterrupted run's.
        """
        place = self._scratch / "trial"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self._before, place)
        command = self.target.command
        for _ in range(rng.choice((1, 1, 1, 3))):
            if self._killed(command, place, rng.uniform(self.idle_s, self.seconds)):
                self.kills += 1
                self.begun += names(place) != names(self._before)
            self._check_whole(place)
            command = self.target.resume
        self._run(command, place)
        assert self._results(place) == self._new
        assert set(names(place)) == set(self._names), f"other files: {set(names(place)) ^ set(self._names)}"

    def left(self) -> list[str]:
        """What killed processes left in TMPDIR: a day later, and after one more run."""
        for entry in (self._scratch / "tmp").iterdir():
            os.utime(entry, (0, 0))
        place = self._scratch / "trial"
        shutil.rmtree(place)
        shutil.copytree(self._before, place)
        self._run(self.target.command, place)
        return names(self._scratch / "tmp")

    def _environment(self) -> dict[str, str]:
        return {"TMPDIR": str(self._scratch / "tmp"), "OMP_NUM_THREADS": "1"}

    def _started(self, command: str, place: Path) -> Running:
        return self._start(command, place, self._scratch / "said.txt", self._environment())

    def _run(self, command: str, place: Path) -> None:
        assert self._started(command, place).wait() == 0, (self._scratch / "said.txt").read_text()

    def _timed(self, command: str, place: Path) -> tuple[float, float]:
        """Seconds until something is there that was not before, and until the end."""
        before = names(place)
        began = time.perf_counter()
        process = self._started(command, place)
        idle_s = None
        while True:
            try:
                code = process.wait(0.005)
                break
            except subprocess.TimeoutExpired:
                if idle_s is None and names(place) != before:
                    idle_s = time.perf_counter() - began
        assert code == 0, (self._scratch / "said.txt").read_text()
        return idle_s or 0.0, time.perf_counter() - began

    def _killed(self, command: str, place: Path, after_s: float) -> bool:
        """Whether it was still running by then."""
        began = time.perf_counter()
        process = self._started(command, place)
        try:
            process.wait(max(0.0, began + after_s - time.perf_counter()))
            if command == self.target.command and (taken := time.perf_counter() - began) < self.seconds:
                self.idle_s, self.seconds = self.idle_s * taken / self.seconds, taken  # the machine has less else to do
            return False
        except subprocess.TimeoutExpired:
            assert process.pid is not None
            with suppress(ProcessLookupError):  # a forked one that has no group of its own yet
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True

    def _results(self, place: Path) -> dict[str, str]:
        return {name: _hash(place / name) for name in names(place) if name.endswith(self.target.results)}

    def _check_whole(self, place: Path) -> None:
        """What has its final name is whole, the old or the new, and a receipt vouches for nothing that is not there."""
        found = self._results(place)
        for name, hashed in found.items():
            assert hashed in (self._old.get(name), self._new[name]), f"{name} is neither the old one nor the new one"
        assert set(self._old) <= set(found)
        for name in names(place):
            file = place / name
            if file.name.startswith("."):
                continue
            if file.suffix == ".parquet":
                pq.read_table(file)
            if file.suffix == ".safetensors":
                from safetensors.numpy import load_file

                load_file(file)
            if file.suffix == ".json":
                said = json.loads(file.read_text())
                if file.name.endswith(".receipt.json"):
                    one = said.get("output")
                    outputs = said["outputs"] if one is None else {one["file"]: one}
                    if all(output["sha256"] in self._new.values() for output in outputs.values()):
                        for output, facts in outputs.items():
                            assert facts["sha256"] == _hash(file.with_name(output))


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def names(place: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))
