"""Where the output cannot be written, or an input not be read: an exit code of its own, and no partial file."""

import json
import os
import resource
import shutil
import subprocess

import pyarrow.parquet as pq
import pytest
from commands import PATIENCE_S, environment, shell, without_privileges

USAGE, NO_DEVICE, CANNOT_CREATE, IO_ERROR, NO_PERMISSION, BAD_CONFIG = 2, 69, 73, 74, 77, 78
COMMAND = "topt-run predict regions.parquet"


def test_a_missing_folder(desk, refused):
    out = desk.folder / "nowhere" / "predictions.parquet"
    refused(CANNOT_CREATE, str(out), "cannot create", "an existing folder", "--out", arguments=("--out", out))


def test_a_file_in_place_of_the_folder(desk, refused):
    refused(CANNOT_CREATE, "cannot create", arguments=("--out", desk.mobility / "predictions.parquet"))


def test_a_folder_in_place_of_the_output(desk, topt_run):
    desk.out.mkdir()
    before = desk.state()
    said = topt_run("predict", desk.regions)
    assert said.code == CANNOT_CREATE
    assert "predictions.parquet: cannot create this output (it is a folder)" in said.err
    assert desk.state() == before


@pytest.mark.parametrize("place", ["", "/", "/predictions.parquet", "/golden/x", "/new/folder/"])
def test_nothing_is_written_into_the_bundle(place, desk, refused):
    """A file that its manifest does not list would make it unusable."""
    refused(USAGE, "model.topt", "into the bundle", "--out", arguments=("--out", f"{desk.bundle}{place}"))


@pytest.mark.parametrize("place", ["/proc/x.parquet", "/sys/x.parquet", "/dev/null/x", "x" * 300, "loop/x"])
def test_any_impossible_output_is_no_bug(place, desk, refused, monkeypatch):
    monkeypatch.chdir(desk.folder)
    (desk.folder / "loop").symlink_to("loop")
    refused(CANNOT_CREATE, "cannot create", arguments=("--out", place))


@pytest.mark.parametrize("name", ["regions.parquet", "mobility.parquet"])
@pytest.mark.parametrize("spelling", ["{0}", "model.topt/../{0}"])
def test_an_input_is_never_overwritten(name, spelling, desk, refused):
    refused(USAGE, name, arguments=("--out", desk.folder / spelling.format(name)))


def test_a_map_that_cannot_be_written_leaves_no_predictions_either(desk, refused):
    pytest.importorskip("pyogrio", reason="needs the geo extra")
    refused(CANNOT_CREATE, "map.gpkg", arguments=("--geo", desk.folder / "nowhere" / "map.gpkg"))


def test_without_the_geo_extra_a_map_leaves_no_predictions_either(desk, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyogrio", None)
    refused(BAD_CONFIG, "pyogrio", "topt-deploy[geo]", arguments=("--geo", desk.folder / "map.gpkg"))


def test_a_receipt_that_cannot_be_written_leaves_no_predictions_either(desk, topt_run):
    desk.receipt.mkdir()
    before = desk.state()
    said = topt_run("predict", desk.regions)
    assert said.code == CANNOT_CREATE
    assert "predictions.receipt.json" in said.err
    assert desk.state() == before


def test_an_absent_device(desk, refused):
    """This machine's ONNX Runtime is built for the CPU; it never predicts there instead."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    facts = refused(NO_DEVICE, "device 'cuda'", "CUDAExecutionProvider", "--device cpu", arguments=("--device", "cuda"))
    assert onnxruntime.__version__ in facts["found"]


def test_a_failing_rename_leaves_nothing(desk, refused, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    refused(IO_ERROR, "writing failed", "Input/output error")


@pytest.mark.parametrize("older", [False, True])
class TestProcess:
    """The command as a process, under an operating system that refuses."""

    @pytest.fixture(autouse=True)
    def _older_output(self, older, desk):
        if older:
            desk.out.write_bytes(b"an older output")
            desk.receipt.write_bytes(b"and its receipt")

    def ends(self, desk, code, *parts, command=COMMAND, **more):
        before = desk.state()
        said = shell(command, desk.folder, **more)
        for restored in (desk.folder, desk.bundle):
            restored.chmod(0o755)
        assert said.code == code, said.err
        assert said.err.startswith("error: ")
        assert "Traceback" not in said.err
        for part in parts:
            assert part in said.err
        assert said.out == ""
        assert desk.state() == before

    def test_a_folder_that_may_not_be_written_to(self, desk):
        desk.folder.chmod(0o555)
        self.ends(desk, CANNOT_CREATE, "predictions.parquet", "Permission denied", "--out", before=without_privileges)

    @pytest.mark.parametrize("name", ["regions.parquet", "mobility.parquet"])
    def test_an_input_that_may_not_be_read(self, name, desk):
        (desk.folder / name).chmod(0)
        self.ends(desk, NO_PERMISSION, name, "may not read", before=without_privileges)

    @pytest.mark.parametrize("name", ["manifest.json", "models/topt.weights", "MODEL_CARD.md"])
    def test_a_bundle_that_may_not_be_read(self, name, desk):
        (desk.bundle / name).chmod(0)
        self.ends(desk, NO_PERMISSION, name, "may not read", before=without_privileges)

    def test_a_bundle_folder_that_may_not_be_listed(self, desk):
        desk.bundle.chmod(0)
        self.ends(desk, NO_PERMISSION, "model.topt", "may not read", before=without_privileges)

    def test_a_limit_on_the_size_of_files(self, desk):
        limit = 4096
        self.ends(
            desk,
            IO_ERROR,
            "predictions.parquet",
            "writing failed",
            "File too large",
            before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            PYTHONDONTWRITEBYTECODE="1",
        )

    def test_no_folder_for_temporary_files(self, desk):
        """The model needs none worth mentioning; the error must not blame the bundle."""
        said = shell(COMMAND, desk.folder, TMPDIR="/nonexistent")
        assert said.code in (0, CANNOT_CREATE), said.err
        if said.code:
            assert "/nonexistent" in said.err
            assert "TMPDIR" in said.err


def on_a_full_disk(desk, kilobytes, then=""):
    """Run the command in a namespace of its own, with the output's folder on a tiny file system."""
    room = desk.folder / "room"
    room.mkdir()
    script = f"""\
mount -t tmpfs -o size={kilobytes}k none room || exit 99
printf older > room/predictions.parquet
topt-run predict regions.parquet --out room/predictions.parquet {then}
code=$?
echo "$(ls -A room)" > left
cat room/predictions.parquet > kept
exit $code
"""
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=desk.folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_full_disk(desk):
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to mount a small file system with")
    done = on_a_full_disk(desk, 8)
    if done.returncode == 99 or "unshare:" in done.stderr:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == IO_ERROR, done.stderr
    assert "No space left on device" in done.stderr
    assert (desk.folder / "left").read_text().split() == ["predictions.parquet"]
    assert (desk.folder / "kept").read_text() == "older"
    assert not desk.out.exists()


def test_a_killed_run_leaves_the_older_output_whole(desk, demo_bundle):
    """SIGKILL while it writes: the older output stands, or the new one, and never a part."""
    desk.out.write_bytes(b"older")
    script = (
        "import os, signal, sys\n"
        "from topt_deploy.runtime.cli import main\n"
        "def killed(path):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "import topt_deploy.storage.atomic\n"
        "topt_deploy.storage.atomic._sync = killed\n"
        f"sys.argv = ['topt-run', 'predict', {str(desk.regions)!r}]\n"
        "main()\n"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True)
    assert done.returncode == -9
    assert desk.out.read_bytes() == b"older"
    assert shell(COMMAND, desk.folder).code == 0
    assert pq.read_table(desk.out).num_rows == 231


def test_success_leaves_the_output_and_its_receipt_alone(desk, topt_run):
    before = set(desk.state())
    assert topt_run("predict", desk.regions).code == 0
    assert set(desk.state()) - before == {"predictions.parquet", "predictions.receipt.json"}
    assert json.loads(desk.receipt.read_text())["output"]["file"] == "predictions.parquet"
    mode = desk.out.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask
