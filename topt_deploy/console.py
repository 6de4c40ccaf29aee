"""Shared by both programs: errors as the user sees them, and exit codes for the batch system."""

import importlib
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from .errors import Exit, IOFailure, Terminated, ToptError, UsageError, exit_code, printable, user_error

LOG_FORMATS = ("text", "json")


class Log:
    """Writes messages: text for people, or one JSON object per line for machines.

    Results go to standard output, errors to standard error, in both forms.
    """

    def __init__(self, form: str = "text") -> None:
        self.json = form == "json"

    def result(self, text: str, **facts: object) -> None:
        """Say what was done."""
        say(json.dumps(facts) if self.json else text)

    def error(self, error: ToptError) -> None:
        """Say what went wrong."""
        say(json.dumps(error.as_dict()) if self.json else f"error: {error}", err=True)

    def listen(self) -> None:
        """From now on also say what our modules log, on standard error."""
        import logging

        log = self

        class Said(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                text = record.getMessage()
                say(json.dumps({"event": "log", "message": text}) if log.json else printable(text), err=True)

        ours = logging.getLogger("topt_deploy")
        ours.handlers = [Said()]
        ours.setLevel(logging.INFO)


class LazyGroup(click.Group):
    """Commands that are imported when they are called, or listed.

    Args:
        places: ``module:attribute`` of every command, by its name, in order.
    """

    def __init__(self, *arguments: Any, places: Mapping[str, str], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.places = places

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of the commands."""
        return list(self.places)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """A command; None where there is none of the name."""
        if name not in self.places:
            return None
        module, attribute = self.places[name].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


def say(text: str, *, err: bool = False) -> None:
    """Print for people: what files are called or say cannot steer the terminal, but for the ends of lines.

    Raises:
        IOFailure: If nobody reads it any more, or it cannot be written.
    """
    try:
        click.echo(printable(text, keep="\n"), err=err)
    except OSError as error:
        raise IOFailure(
            f"writing failed ({error.strerror or error})", file="standard error" if err else "standard output"
        ) from error


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
    _open_streams()
    with _terminating():
        code = _code(command, arguments, log)
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except OSError:
            code = code or Exit.IO_ERROR
    if teardown:
        sys.exit(code)
    os._exit(code)


def _code(command: click.Command, arguments: list[str], log: Log) -> int:
    """Run a command, say what goes wrong, and give its exit code."""
    try:
        code = command.main(arguments, standalone_mode=False)
        return code if isinstance(code, int) else Exit.DONE
    except click.UsageError as error:
        with suppress(OSError):
            if log.json:
                log.error(UsageError(error.format_message(), fix="see --help"))
            else:
                usage = error.ctx.get_usage() + "\n\n" if error.ctx else ""
                say(f"{usage}Error: {error.format_message()}", err=True)
        return Exit.USAGE
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) and error.__cause__ else error
        with suppress(ToptError):
            say("terminated" if isinstance(cause, Terminated) else "interrupted", err=True)
        return exit_code(cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt())
    except SystemExit:  # click's answer to a reader that left, as `| head` does
        return Exit.IO_ERROR
    except Exception as error:
        known = user_error(error)
        with suppress(OSError, ToptError):  # there may be nobody to tell
            if known is not None:
                if not isinstance(error.__cause__, BrokenPipeError):  # who has left reads nothing more
                    log.error(known)
            else:
                say(
                    traceback.format_exc() + "This is a bug in topt-deploy. Please report it with the lines above.",
                    err=True,
                )
        return exit_code(error)


def _open_streams() -> None:
    """Have standard streams that a shell has closed (``>&-``) lead nowhere: the next file would get their number, and
    whatever prints would write into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal has an R²


@contextmanager
def _terminating() -> Iterator[None]:
    """Have SIGTERM end a command as SIGINT does."""

    def end(*_: object) -> NoReturn:
        raise Terminated

    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def _log_format(arguments: Sequence[str]) -> str:
    """``--log-format``, known before parsing, so that parsing's own errors can follow it."""
    for position, argument in enumerate(arguments):
        if argument == "--log-format" and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith("--log-format="):
            return argument.partition("=")[2]
    return "text"
