"""Progress: a bar on a terminal, lines now and then elsewhere."""

import os
import pty
import subprocess
import sys

import pytest
from commands import PATIENCE_S, environment

from topt_deploy import progress
from topt_deploy.progress import ProgressBar

SHOWN, HIDDEN = "\x1b[?25h", "\x1b[?25l"
"""What shows and hides a terminal's cursor."""


def on_a_terminal(code: str) -> str:
    """What a script writes to standard error, where that is a terminal."""
    ours, its = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stderr=its, env=environment(TERM="xterm", COLUMNS="100"))
    os.close(its)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # Linux' end of a terminal
        pass
    process.wait(PATIENCE_S)
    os.close(ours)
    return said.decode()


SCRIPT = """
from topt_deploy.progress import ProgressBar
with ProgressBar("regions", label="encoding") as bar:
    for done in range(11):
        bar(done, 10, "well")
        {more}
"""


def test_a_terminal_gets_a_bar_that_reaches_the_end():
    said = on_a_terminal(SCRIPT.format(more=""))
    assert "10 of 10 regions, 0 s left, well" in said
    assert "encoding" in said
    assert "####" in said
    assert said.rindex(SHOWN) > said.rindex(HIDDEN)


def test_before_anything_is_done_no_time_is_told():
    assert "0 of 10 regions, well" in on_a_terminal(SCRIPT.format(more=""))


def test_an_error_gives_the_cursor_back():
    said = on_a_terminal(SCRIPT.format(more="1 / (done - 5)"))
    assert "ZeroDivisionError" in said
    assert said.rindex(SHOWN) > said.rindex(HIDDEN)


def test_a_line_in_the_middle_stands_alone():
    said = on_a_terminal(SCRIPT.format(more="bar.say('c3: error') if done == 3 else None"))
    assert "\r\x1b[Kc3: error\r\n" in said


def test_without_a_terminal_there_are_lines_now_and_then(capsys, monkeypatch):
    with ProgressBar() as bar:
        bar(1, 4)
        assert capsys.readouterr().err == "", "nothing before ten seconds"
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
        bar(2, 4)
        bar(2, 4, "half")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "2 of 4 regions, 0 s left"
    assert second == "2 of 4 regions, 0 s left, half"


@pytest.mark.parametrize("start", [0, 90])
def test_time_left_is_reckoned_from_what_this_run_did(start, capsys, monkeypatch):
    now = iter([1000.0, 1020.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    ProgressBar("epochs", label="srel", start=start)(start + 2, start + 6)
    assert capsys.readouterr().err == f"srel: {start + 2} of {start + 6} epochs, 40 s left\n"


def test_quiet_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    ProgressBar(quiet=True)(1, 2)
    assert capsys.readouterr().err == ""
