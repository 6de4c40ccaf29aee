"""`topt-deploy encode --processes`: really several processes, on the CPU."""

import signal
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from commands import environment
from encode_city import write_city
from encoders_text import tiny_text

from topt_deploy.data.parquet import read_parquet
from topt_deploy.errors import NoDevice, TryAgain, UsageError
from topt_deploy.prompts.cache import Cache
from topt_deploy.train.cli.encode import arguments_of, encode
from topt_deploy.train.encode import processes

needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_text(folder)
    return folder


@pytest.fixture
def city(tmp_path: Path) -> Path:
    write_city(tmp_path / "city", images=False)
    return tmp_path / "city"


@pytest.mark.slow
@needs_accelerate
class TestEncode:
    def test_two_processes_write_the_bytes_of_one_and_go_on_where_they_were(self, topt_deploy, model, city):
        command = ("encode", city, "--model", model, "--batch", 2)
        assert topt_deploy(*command, "--no-cache").code == 0
        alone = (city / "prompts.parquet").read_bytes()
        (city / "prompts.parquet").unlink()
        said = topt_deploy(*command, "--processes", 2, "--update-regions")
        assert said.code == 0, said
        assert (city / "prompts.parquet").read_bytes() == alone
        assert "prompt_crime" in read_parquet(city / "regions.parquet").column_names
        assert not (city / ".topt").joinpath("prompts.sqlite-journal").exists()
        # One process now finds everything that the two have computed, each its own part.
        again = topt_deploy(*command, "--resume")
        assert "0 regions encoded, 5 as they were, 0 skipped" in again.out

    def test_without_a_cache_nothing_is_left_behind(self, topt_deploy, model, city):
        before = set(city.iterdir())
        said = topt_deploy("encode", city, "--model", model, "--processes", 2, "--no-cache")
        assert said.code == 0, said
        assert set(city.iterdir()) - before == {city / "prompts.parquet"}
        assert "5 regions encoded, 0 as they were, 0 skipped" in said.out

    def test_what_one_process_fails_of_is_the_end_and_the_code_of_all(self, topt_deploy, tmp_path):
        """Region 01 is the second of five blocks: the second process's."""
        from encoders_qwen import tiny_qwen

        write_city(tmp_path)
        tiny_qwen(tmp_path / "model")
        (tmp_path / "images/01_0.jpg").write_bytes(b"<html>404</html>")
        said = topt_deploy("encode", tmp_path, "--model", tmp_path / "model", "--processes", 2)
        assert said.code == 65
        assert said.err.count("error: ") == 1
        assert "01_0.jpg: not an image" in said.err
        assert "Traceback" not in said.err
        assert not (tmp_path / "prompts.parquet").exists()


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        processes.check_team(2, "cpu")
    assert "multi-gpu" in caught.value.fix


@needs_accelerate
def test_more_processes_than_devices_are_refused():
    with pytest.raises(NoDevice, match="a CUDA device of its own"):
        processes.check_team(1000, "cuda")


def run(monkeypatch, script, size=2):
    """A team whose every member runs this Python."""
    start = subprocess.Popen

    def popen(command, **more):
        return start([sys.executable, "-c", script], **more)

    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    processes.run_team(["encode"], size, threads=1)


@pytest.mark.slow
class TestRunTeam:
    def test_every_process_knows_its_number(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        run(monkeypatch, "import os; open(os.environ['RANK'] + os.environ['WORLD_SIZE'], 'w')", size=3)
        assert {path.name for path in tmp_path.iterdir()} == {"03", "13", "23"}

    def test_the_first_that_fails_ends_the_others(self, monkeypatch, capfd):
        script = (
            "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit(print('told', file=sys.stderr) or 66)"
        )
        with pytest.raises(click.exceptions.Exit) as caught:
            run(monkeypatch, script + "\ntime.sleep(36_000)")
        assert caught.value.exit_code == 66
        assert "told" in capfd.readouterr().err

    def test_one_that_only_noticed_is_not_the_one_that_failed(self, monkeypatch):
        with pytest.raises(click.exceptions.Exit) as caught:
            run(
                monkeypatch,
                "import os, sys, time; time.sleep(int(os.environ['RANK'])); sys.exit(75 - int(os.environ['RANK']))",
            )
        assert caught.value.exit_code == 74

    def test_a_killed_process_is_worth_another_try(self, monkeypatch):
        script = f"import os, time\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), {int(signal.SIGKILL)})"
        with pytest.raises(TryAgain, match="killed") as caught:
            run(monkeypatch, script + "\ntime.sleep(36_000)")
        assert caught.value.found == "process 1, signal 9"


def test_arguments_are_those_that_were_given():
    given = ["city", "--model", "m", "--task", "a", "--task", "b", "--update-regions", "--batch", "3", "--no-cache"]
    context = encode.make_context("encode", [*given, "--processes", "2"])
    again = arguments_of(context, leave_out=("processes", "no_cache"))
    assert again[0] == "encode"
    found = encode.make_context("encode", again[1:]).params
    assert found == context.params | {"processes": 1, "no_cache": False}


def test_several_writers_share_a_cache(tmp_path):
    import numpy as np

    path, faults = tmp_path / "cache", []

    def write(number: int) -> None:
        try:
            with Cache(path) as cache:
                for k in range(20):
                    cache.put({f"{number}-{k}": np.full(8, number, np.float32)})
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    with Cache(path) as cache:
        assert len(cache.get(f"{number}-{k}" for number in range(4) for k in range(20))) == 80


def test_the_package_is_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "topt_deploy", "--version"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("topt-deploy")
