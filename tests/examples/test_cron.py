"""examples/cron: the script is run with sh and the real topt-run, and the crontab is one."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import PATIENCE_S, environment, shell

from topt_deploy.storage.locks import locked


@pytest.fixture
def nightly(examples, home):
    def call(wait_s=0):
        return shell(f"sh {examples / 'cron/topt-nightly.sh'}", home, TOPT_HOME=str(home), TOPT_WAIT_S=str(wait_s))

    return call


def logged(home):
    (log,) = (home / "log").iterdir()
    return [json.loads(line) for line in log.read_text().splitlines()]


def metric(home, name):
    return float(re.search(rf"^{name} (\S+)$", (home / "metrics/topt.prom").read_text(), re.M)[1])


def test_a_good_night_says_nothing(nightly, home):
    said = nightly()
    assert (said.code, said.out, said.err) == (0, "", "")
    assert [line["event"] for line in logged(home)] == ["city", "city", "batch"]
    assert metric(home, "topt_run_exit_code") == 0
    outputs = sorted((home / "out").glob("city=*/predictions.parquet"))
    assert len(outputs) == 2
    before = [path.stat().st_mtime_ns for path in outputs]
    assert nightly().code == 0
    assert [path.stat().st_mtime_ns for path in outputs] == before, "the next night goes on where this one ended"
    assert logged(home)[-1]["cities"] == {"skipped": 2}


def test_done_in_part_is_told_and_counts_as_done(nightly, home, spoil):
    spoil()
    said = nightly()
    assert said.code == 0
    assert said.out == f"topt-run: done in part, see {home}/out/_run.json\n"
    assert json.loads((home / "out/_run.json").read_text())["set_aside"]["regions bad_count"] == 1
    assert metric(home, "topt_run_exit_code") == 3


def test_what_needs_a_person_is_told_and_passed_on(nightly, home):
    shutil.rmtree(home / "cities")
    said = nightly(wait_s=600)
    assert said.code == 66
    assert said.out.startswith(f"topt-run: exit code 66, see {home}/log/")
    assert "no regions table found" in said.out
    assert len(logged(home)) == 1, "it was not tried again"


def test_a_lock_that_is_held_is_tried_once_more(nightly, home):
    (home / "out/city=A").mkdir(parents=True)
    with locked(home / "out/city=A/predictions.parquet"):
        said = nightly()
    assert said.code == 75
    assert "exit code 75" in said.out
    runs = [line for line in logged(home) if line.get("event") == "batch"]
    assert [run["cities"] for run in runs] == [{"done": 1, "failed": 1}, {"failed": 1, "skipped": 1}]


def test_a_lock_that_is_let_go_meanwhile_does_no_harm(examples, home):
    (home / "out/city=A").mkdir(parents=True)
    variables = environment(TOPT_HOME=str(home), TOPT_WAIT_S="2")
    with locked(home / "out/city=A/predictions.parquet"):
        script = subprocess.Popen(["sh", examples / "cron/topt-nightly.sh"], env=variables)
        ends = time.monotonic() + PATIENCE_S
        while not (home / "out/_run.json").exists():
            assert time.monotonic() < ends
            time.sleep(0.05)
    assert script.wait(timeout=PATIENCE_S) == 0
    assert logged(home)[-1]["cities"] == {"done": 1, "skipped": 1}


def test_the_crontab_names_the_script(examples):
    lines = (examples / "cron/crontab").read_text().splitlines()
    entries = [line for line in lines if line and not line.startswith("#") and not re.match(r"[A-Z_]+=\S+$", line)]
    (entry,) = entries
    assert re.fullmatch(r"(\d+|\*) (\d+|\*) (\d+|\*) (\d+|\*) (\d+|\*) /opt/topt/bin/topt-nightly\.sh", entry)
    assert "%" not in entry, "cron would take it for the end of the line"
    assert (examples / "cron/topt-nightly.sh").stat().st_mode & 0o111


def test_shellcheck_has_nothing_to_say(examples):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, examples / "cron/topt-nightly.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
