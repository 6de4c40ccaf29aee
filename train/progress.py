"""Progress of a training: a bar with loss, rate and time left; plain lines without a terminal."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from topt_deploy.storage.os_errors import writing
from topt_deploy.storage.text_files import write_text

PLAIN_EVERY_S = 10.0
"""Without a terminal, one line at least this many seconds apart."""


class Reporter:
    """Progress for people and metrics as JSON lines for machines.

    Args:
        metrics: The file that lines are appended to; None keeps none.
        console: Where progress is shown; a quiet console shows nothing.
    """

    def __init__(self, metrics: Path | None = None, console: Console | None = None) -> None:
        self.metrics = metrics
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>9}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def quiet(self) -> "Reporter":
        """One that shows nothing and keeps nothing, for work that this one reports as a whole."""
        return Reporter(console=Console(quiet=True))

    def say(self, text: str) -> None:
        """One line for people."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def record(self, **facts: Any) -> None:
        """One line for machines."""
        if self.metrics is not None:
            with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")

    def rewind(self, stage: str, epoch: int) -> None:
        """Forget the lines of ``stage`` after ``epoch``, which will be written again, and a line that was cut off."""
        if self.metrics is None or not self.metrics.exists():
            return

        def stays(line: str) -> bool:
            try:
                facts = json.loads(line)
                return bool(facts["stage"] != stage or facts["epoch"] <= epoch)
            except (ValueError, KeyError):
                return False

        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        write_text(self.metrics, "".join(f"{line}\n" for line in lines if stays(line)))

    @contextmanager
    def stage(self, name: str, *, epochs: int, start: int = 0) -> Iterator["Stage"]:
        """Show one stage of training."""
        task = self._progress.add_task(name, total=epochs, completed=start, rate="", loss="")
        stage = Stage(self, name, task, epochs=epochs, start=start)
        yield stage
        if not self.console.is_terminal:
            self.say(f"{name}: {epochs} epochs done in {stage.elapsed_s:.1f} s")


class Stage:
    """One stage's progress."""

    def __init__(self, reporter: Reporter, name: str, task: TaskID, *, epochs: int, start: int) -> None:
        self._reporter, self.name, self._task = reporter, name, task
        self._epochs, self._start = epochs, start
        self._began = self._said = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._began

    def update(self, epoch: int, loss: float) -> None:
        """Show that ``epoch`` epochs are done."""
        rate = (epoch - self._start) / max(self.elapsed_s, 1e-9)
        speed, value = f"{rate:,.0f} ep/s", f"loss {loss:,.4g}"
        self._reporter._progress.update(self._task, completed=epoch, rate=speed, loss=value)
        if not self._reporter.console.is_terminal and time.monotonic() - self._said > PLAIN_EVERY_S:
            self._said = time.monotonic()
            left = (self._epochs - epoch) / max(rate, 1e-9)
            self._reporter.say(f"{self.name}: epoch {epoch} of {self._epochs}, {speed}, {left:.0f} s left, {value}")
