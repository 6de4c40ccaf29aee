"""Progress of long work, on standard error: a bar where there is a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

import click

LINE_EVERY_S = 10.0
BAR_EVERY_S = 0.1


class ProgressBar:
    """Progress of one piece of work; call it with how much is done.

    On a terminal, use it as a context manager, so that the cursor, which a bar hides, comes back whatever happens.

    Args:
        unit: What is counted, in the plural.
        label: What is being done; stands before the bar and before every line.
        start: How much was done before this run began.
        quiet: Say nothing.

    Attributes:
        terminal: Whether a bar is drawn.
    """

    def __init__(self, unit: str = "regions", *, label: str = "", start: int = 0, quiet: bool = False) -> None:
        self._unit, self._label, self._start, self._quiet = unit, label, start, quiet
        self.terminal = not quiet and sys.stderr.isatty()
        self._began = time.monotonic()
        self._said = float("-inf") if self.terminal else self._began
        self._bar: Any = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.render_finish()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._began

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Say how far the work is, how much time is left at this pace, and ``note``, unless that was just said."""
        now = time.monotonic()
        due = now - self._said >= (BAR_EVERY_S if self.terminal else LINE_EVERY_S)
        if self._quiet or not (due or (self.terminal and done == total)):
            return
        self._said = now
        text = f"{done} of {total} {self._unit}"
        if done > self._start:  # before that there is no pace to tell the rest from
            text += f", {(now - self._began) / (done - self._start) * (total - done):.0f} s left"
        text += f", {note}" if note else ""
        if self.terminal:
            self._draw(done, total, text)
        else:
            click.echo(f"{self._label}: {text}" if self._label else text, err=True)

    def say(self, text: str) -> None:
        """One line for people, in the middle of the work."""
        if self._bar is not None:
            click.echo("\r\033[K", err=True, nl=False)  # the bar is drawn again below the line
        click.echo(text, err=True)

    def _draw(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            self._bar = click.progressbar(
                length=total, label=self._label, file=sys.stderr, item_show_func=lambda shown: shown,
                show_eta=False, show_percent=False, update_min_steps=0,
            )  # fmt: skip
        self._bar.update(done - self._bar.pos, text)
