"""Both commands: everything has help, help costs no import, and every ending has its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from commands import environment, shell

from topt_deploy.cli import cli as topt_deploy
from topt_deploy.console import run
from topt_deploy.errors import BadData, Exit
from topt_deploy.runtime.cli.group import cli as topt_run


def commands(command, path):
    """Every command below, with the words that call it."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, (*path, name))


ALL = {
    " ".join(path): c
    for tree, name in ((topt_deploy, "topt-deploy"), (topt_run, "topt-run"))
    for path, c in commands(tree, (name,))
}
OPTIONS = [
    (path, option) for path, command in ALL.items() for option in command.params if isinstance(option, click.Option)
]


def test_the_commands_are_these():
    assert set(ALL) >= {
        "topt-deploy", "topt-deploy sample", "topt-deploy import", "topt-deploy import hafusion", "topt-deploy train",
        "topt-deploy evaluate", "topt-deploy report", "topt-deploy export",
        "topt-run", "topt-run predict", "topt-run info", "topt-run selftest",
    }  # fmt: skip


@pytest.mark.parametrize("path", ALL)
def test_every_command_has_help_that_names_its_arguments(path):
    command = ALL[path]
    assert command.help
    assert command.help.rstrip().endswith(".")
    for argument in command.params:
        if isinstance(argument, click.Argument):
            name = argument.human_readable_name.removesuffix("...").strip("[]")
            assert name in command.help, f"{path}: {name} is not explained"


@pytest.mark.parametrize(("path", "option"), OPTIONS, ids=[f"{p} {o.opts[-1]}" for p, o in OPTIONS])
def test_every_option_has_help(path, option):
    assert option.help, f"{path} {option.opts[-1]} has no help"


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_shown(path, flag, capsys):
    name, *words = path.split()
    with pytest.raises(SystemExit) as left:
        run({"topt-deploy": topt_deploy, "topt-run": topt_run}[name], [*words, flag])
    assert left.value.code == 0
    assert "Usage:" in capsys.readouterr().out


def test_the_list_of_commands_agrees_with_the_commands(capsys):
    """topt-deploy lists them without importing them, from a table of its own."""
    with pytest.raises(SystemExit):
        run(topt_deploy, ["--help"])
    text = capsys.readouterr().out
    for name in topt_deploy.list_commands(click.Context(topt_deploy)):
        assert f"  {name} " in text


def modules_after(command, *arguments):
    """What is loaded when the command has ended."""
    code = (
        "import os, sys\n"
        "def leave(code):\n"
        "    sys.stdout.write('\\nLOADED ' + ' '.join(sys.modules)); sys.stdout.flush()\n"
        "os._exit = sys.exit = leave\n"
        f"from {command} import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, check=True
    )
    said, *_, loaded = done.stdout.split("\nLOADED ")
    return said, set(loaded.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_topt_deploys_help_imports_no_torch(arguments):
    said, loaded = modules_after("topt_deploy.cli", *arguments)
    assert "topt-deploy" in said or "Usage" in said
    assert not loaded & {"torch", "onnx", "onnxruntime", "pyarrow", "numpy", "sklearn", "shapely", "rich"}


@pytest.mark.parametrize("command", ["train", "export", "sample", "import"])
def test_a_commands_own_help_imports_no_torch_either(command):
    said, loaded = modules_after("topt_deploy.cli", command, "--help")
    assert "Usage" in said
    assert not loaded & {"torch", "onnx", "onnxruntime", "sklearn"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["predict", "--help"], ["info", "-h"]])
def test_topt_runs_help_imports_neither_arrow_nor_the_runtime(arguments):
    said, loaded = modules_after("topt_deploy.runtime.cli", *arguments)
    assert "topt-run" in said or "Usage" in said
    assert not loaded & {"pyarrow", "onnxruntime", "numpy", "pandas", "torch"}


class TestEndings:
    @pytest.mark.parametrize(
        ("command", "arguments", "part"),
        [
            (topt_run, ["predict", "x", "--bogus"], "--bogus"),
            (topt_run, ["bogus"], "bogus"),
            (topt_run, ["predict"], "INPUT"),
            (topt_run, ["predict", "x", "--device", "tpu"], "'cpu', 'cuda'"),
            (topt_run, ["predict", "x", "--threads", "0"], "--threads"),
            (topt_run, ["predict", "x", "--log-format", "xml"], "--log-format"),
            (topt_deploy, ["bogus"], "bogus"),
            (topt_deploy, ["train", "--bogus"], "--bogus"),
            (topt_deploy, ["export", "--format", "pickle"], "--format"),
            (topt_deploy, ["sample"], "--out"),
            (topt_deploy, ["train", ".", "--preset", "none"], "--preset"),
        ],
    )
    def test_a_wrong_command_line(self, command, arguments, part, capsys):
        with pytest.raises(SystemExit) as left:
            run(command, arguments)
        out, err = capsys.readouterr()
        assert left.value.code == Exit.USAGE
        assert part in err
        assert out == ""
        assert "Traceback" not in err

    @pytest.mark.parametrize(
        "arguments", [["predict", "x", "--bogus"], ["predict"], ["predict", "x", "--threads", "0"]]
    )
    def test_a_wrong_command_line_is_json_to_machines(self, arguments, capsys):
        with pytest.raises(SystemExit) as left:
            run(topt_run, [*arguments, "--log-format", "json"])
        assert left.value.code == Exit.USAGE
        (line,) = capsys.readouterr().err.splitlines()
        facts = json.loads(line)
        assert facts["exit_code"] == 2
        assert facts["message"]

    @pytest.mark.parametrize("form", ["--log-format=json", "--log-format json"])
    def test_errors_are_json_in_either_spelling(self, form, tmp_path, capsys):
        with pytest.raises(SystemExit):
            run(topt_run, ["info", str(tmp_path / "none.topt"), *form.split()])
        assert json.loads(capsys.readouterr().err)["exit_code"] == Exit.NO_INPUT

    def test_a_bug_is_shown_as_one(self, capsys):
        @click.command()
        def broken() -> None:
            raise ZeroDivisionError("of ours")

        with pytest.raises(SystemExit) as left:
            run(broken, [])
        err = capsys.readouterr().err
        assert left.value.code == Exit.BUG == 70
        assert "ZeroDivisionError: of ours" in err
        assert "Please report it" in err

    def test_a_users_error_is_none(self, capsys):
        @click.command()
        def refusing() -> None:
            raise BadData("is wrong", file="x")

        with pytest.raises(SystemExit) as left:
            run(refusing, [])
        assert left.value.code == Exit.BAD_DATA
        assert capsys.readouterr().err == "error: x: is wrong\n"

    def test_an_interruption(self, capsys):
        @click.command()
        def interrupted() -> None:
            raise KeyboardInterrupt

        with pytest.raises(SystemExit) as left:
            run(interrupted, [])
        assert left.value.code == 130
        assert capsys.readouterr().err.strip() == "interrupted"

    def test_success_and_a_code_of_the_commands_own(self):
        @click.command()
        @click.argument("code", type=int)
        def leaving(code: int) -> int:
            return code

        for code in (0, 3):
            with pytest.raises(SystemExit) as left:
                run(leaving, [str(code)])
            assert left.value.code == code

    COMMANDS = ("topt-run info model.topt", "topt-run predict regions.parquet", "topt-run --help", "topt-deploy --help")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_reader_that_left_is_told_of_by_the_code_alone(self, command, desk):
        """As `topt-run info model.topt | head -1` does."""
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            command.split(), cwd=desk.folder, env=environment(), stdout=writer, stderr=subprocess.PIPE
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (74, b"")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_full_disk_under_standard_output_is_no_bug(self, command, desk):
        said = shell(f"{command} > /dev/full", desk.folder)
        assert said.code == Exit.IO_ERROR
        assert "No space left on device" in said.err
        assert "Traceback" not in said.err

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
    def test_a_terminal_that_lacks_a_character_is_no_bug(self, encoding, desk):
        for command in ("topt-run info model.topt", "topt-run predict regions.parquet", "topt-run predict ü.parquet"):
            said = shell(command, desk.folder, PYTHONIOENCODING=encoding)
            assert said.code == (66 if "ü" in command else 0), said.err
            assert "Traceback" not in said.err

    def test_without_teardown_everything_is_still_written(self, desk):
        """topt-run leaves without dismantling the interpreter; what it printed must have left it before."""
        said = shell("topt-run info model.topt > info.txt", desk.folder)
        assert said.code == 0
        assert "protocol" in (desk.folder / "info.txt").read_text()

    def test_versions(self, capsys):
        from topt_deploy import __version__

        for command, name in ((topt_deploy, "topt-deploy"), (topt_run, "topt-run")):
            with pytest.raises(SystemExit):
                run(command, ["--version"])
            assert capsys.readouterr().out == f"{name}, version {__version__}\n"


class TestTopTDeploy:
    """Mistakes with `topt-deploy`; the commands' work is tested elsewhere."""

    def ends(self, capsys, code, *arguments):
        with pytest.raises(SystemExit) as left:
            run(topt_deploy, [str(a) for a in arguments])
        err = capsys.readouterr().err
        assert left.value.code == code, err
        assert err.startswith("error: ")
        assert "Traceback" not in err
        return err

    def test_train_where_no_city_is(self, tmp_path, capsys):
        assert "topt-deploy sample" in self.ends(capsys, 66, "train", tmp_path)

    def test_train_with_an_unknown_setting(self, demo_city, capsys):
        err = self.ends(capsys, 78, "train", demo_city, "--set", "srel.layer=3")
        assert "'layer'" in err
        assert "layers" in err

    @pytest.mark.parametrize(
        "task", ["region_id", "city_id", "status", "reason", "geometry", "poi", "mobility", "position", "prompt_crime"]
    )
    def test_train_on_a_task_named_like_something_else(self, task, demo_city, tmp_path, capsys):
        """It would share its name with a column of the output, or with an input of the graph."""
        err = self.ends(capsys, 78, "train", demo_city, "--task", task, "--out", tmp_path / "run")
        assert repr(task) in err

    def test_train_on_tasks_whose_columns_would_clash(self, demo_city, tmp_path, capsys):
        """--wide writes crime_lower beside crime."""
        tasks = ("--task", "crime", "--task", "crime_lower")
        err = self.ends(capsys, 78, "train", demo_city, *tasks, "--out", tmp_path / "run")
        assert "'crime_lower'" in err

    def test_train_on_a_device_that_is_absent(self, demo_city, tmp_path, capsys):
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
        assert "CUDA" in self.ends(capsys, 69, "train", demo_city, "--device", "cuda", "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists(), "nothing was started"

    def test_a_run_keeps_its_settings(self, demo_city, capsys):
        err = self.ends(capsys, 2, "train", demo_city, "--resume", "--seed", "1")
        assert "--seed cannot change with --resume" in err

    def test_a_finished_run_is_not_resumed(self, demo_city, demo_run, capsys):
        assert "finished" in self.ends(capsys, 2, "train", demo_city, "--resume", "--out", demo_run)
        assert "no unfinished training run" in self.ends(capsys, 66, "train", demo_city, "--resume")

    def test_an_existing_run_folder_is_not_overwritten(self, demo_city, demo_run, capsys):
        assert "the run folder exists" in self.ends(capsys, 2, "train", demo_city, "--out", demo_run)

    def test_export_without_a_run(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert "no finished training run" in self.ends(capsys, 66, "export")
        assert "no training run in this folder" in self.ends(capsys, 66, "export", tmp_path)

    def test_training_into_a_folder_that_cannot_be(self, demo_city, capsys):
        self.ends(capsys, 73, "train", demo_city, "--out", "/proc/run")

    def test_training_on_a_damaged_table(self, tmp_path, capsys):
        (tmp_path / "regions.parquet").write_text("no")
        (tmp_path / "mobility.parquet").write_text("no")
        self.ends(capsys, 65, "train", tmp_path)
        assert not (tmp_path / "runs").exists(), "nothing was started"

    def test_training_without_flows(self, demo_city, tmp_path, capsys):
        (tmp_path / "regions.parquet").write_bytes((demo_city / "regions.parquet").read_bytes())
        settings = ["--task", "crime", "--preset", "quick", "--set", "srel.epochs=2", "--set", "prompt4re.epochs=2"]
        with pytest.raises(SystemExit) as left:
            run(topt_deploy, ["train", str(tmp_path), *settings, "--set", "ensemble.epochs=2"])
        said = capsys.readouterr().err
        assert left.value.code == 0, said
        assert "there is no mobility.parquet: trained without flows" in said
