"""Messages of a training: progress for people, and every epoch's figures as JSON lines for machines."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from topt_deploy.progress import ProgressBar
from topt_deploy.storage.os_errors import writing
from topt_deploy.storage.text_files import write_text


class Reporter:
    """Progress for people and metrics as JSON lines for machines.

    Args:
        metrics: The file that lines are appended to; None keeps none.
        quiet: Show nothing.
    """

    def __init__(self, metrics: Path | None = None, *, quiet: bool = False) -> None:
        self.metrics, self._quiet = metrics, quiet

    def quiet(self) -> "Reporter":
        """One that shows nothing and keeps nothing, for work that this one reports as a whole."""
        return Reporter(quiet=True)

    def say(self, text: str) -> None:
        """One line for people."""
        if not self._quiet:
            click.echo(text, err=True)

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
        with ProgressBar("epochs", label=name, start=start, quiet=self._quiet) as progress:
            yield Stage(progress, epochs=epochs, start=start)
            if not progress.terminal:
                self.say(f"{name}: {epochs} epochs done in {progress.elapsed_s:.1f} s")


class Stage:
    """One stage's progress."""

    def __init__(self, progress: ProgressBar, *, epochs: int, start: int) -> None:
        self._progress, self._epochs, self._start = progress, epochs, start

    def update(self, epoch: int, loss: float) -> None:
        """Show that ``epoch`` epochs are done."""
        rate = (epoch - self._start) / max(self._progress.elapsed_s, 1e-9)
        self._progress(epoch, self._epochs, f"{rate:,.0f} per second, loss {loss:,.4g}")
