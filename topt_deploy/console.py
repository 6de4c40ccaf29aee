"""Shared by both programs: errors as the user sees them, and exit codes for the batch system."""

import io
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

from .errors import Exit, IOFailure, ToptError, UsageError, printable

SAY_EVERY_S = 10.0
LOG_FORMATS = ("text", "json")


class Log:
    """Writes messages: text for people, or one JSON object per line for machines.

    Results go to standard output, errors to standard error, in both forms.
    """

    def __init__(self, form: str = "text") -> None:
        self.json = form == "json"

    def result(self, text: str, **facts: object) -> None:
        """Say what was done."""
        click.echo(json.dumps(facts) if self.json else printable(text, keep="\n"))

    def error(self, error: ToptError) -> None:
        """Say what went wrong."""
        click.echo(json.dumps(error.as_dict()) if self.json else f"error: {error}", err=True)

    def listen(self) -> None:
        """From now on also say what our modules log, on standard error."""
        import logging

        log = self

        class Said(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                text = record.getMessage()
                click.echo(json.dumps({"event": "log", "message": text}) if log.json else printable(text), err=True)

        ours = logging.getLogger("topt_deploy")
        ours.handlers = [Said()]
        ours.setLevel(logging.INFO)


def decimal(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash where there is none (R² of labels that do not vary)."""
    return "–" if value is None else f"{value:.{digits}f}"


def run(command: click.Command, arguments: Sequence[str] | None = None, *, teardown: bool = True) -> NoReturn:
    """Run a command and exit with its code. A traceback is shown for a bug of ours only.

    Args:
        command: The command.
        arguments: Its arguments; the process's by default.
        teardown: Off leaves without dismantling the interpreter: where every file is closed by then, that only
            costs time, a quarter of ``topt-run predict``.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    log = Log(_log_format(arguments))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal has an R²
    try:
        code = command.main(arguments, standalone_mode=False)
    except ToptError as error:
        log.error(error)
        code = error.exit_code
    except click.UsageError as error:
        if log.json:
            log.error(UsageError(error.format_message(), fix="see --help"))
        else:
            error.show()
        code = Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    except OSError as error:  # every file's own errors are the user's by now: what is left is standard output
        log.error(IOFailure(f"writing failed ({error.strerror or error})", file="standard output"))
        code = Exit.IO_ERROR
    except SystemExit:  # click's answer to a reader that left, as `| head` does
        code = Exit.DONE
    except Exception:
        traceback.print_exc()
        click.echo("This is a bug in topt-deploy. Please report it with the lines above.", err=True)
        code = Exit.BUG
    code = code if isinstance(code, int) else Exit.DONE
    if teardown:
        sys.exit(code)
    with suppress(OSError):  # said above
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _log_format(arguments: Sequence[str]) -> str:
    """``--log-format``, known before parsing, so that parsing's own errors can follow it."""
    for position, argument in enumerate(arguments):
        if argument == "--log-format" and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith("--log-format="):
            return argument.partition("=")[2]
    return "text"


class Lines:
    """Progress as a line now and then, on standard error.

    Args:
        what: The name of the things that are counted.
    """

    def __init__(self, what: str = "regions") -> None:
        self._what = what
        self._began = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Say how far things are, and how much time is left at this pace."""
        now = time.monotonic()
        if now - self._said > SAY_EVERY_S:
            self._said = now
            left = (now - self._began) / done * (total - done)
            print(f"{done} of {total} {self._what}, {left:.0f} s left", file=sys.stderr, flush=True)
