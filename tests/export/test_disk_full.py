"""A disk that is full at a write of ``topt-deploy train`` or ``export``: exit 74, nothing half done, and it goes on."""

import shutil
from pathlib import Path

import pytest
from figures import FULL, record
from small_disk import SmallDisk, small_disk

pytestmark = pytest.mark.slow

PARTS = 12 if FULL else 2
"""How finely free space is varied, from none to what is needed."""


@pytest.fixture
def disk(tmp_path: Path):
    with small_disk(tmp_path / "small", 64) as disk:
        yield disk


def needed(disk: SmallDisk, call) -> int:
    """Bytes that a command's outputs take; they are removed again."""
    assert call().code == 0
    size = disk.used()
    for entry in disk.folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return size


@pytest.mark.parametrize("older", [False, True], ids=["first", "again"])
@pytest.mark.usefixtures("demo_traced")
def test_export(topt_deploy, demo_run, demo_bundle, disk, older):
    out = disk.folder / "model.topt"

    def export():
        return topt_deploy("export", demo_run, "--out", out)

    size = needed(disk, export)
    if older:
        shutil.copytree(demo_bundle, out)
        (out / "MODEL_CARD.md").write_text("old")
    before = disk.state()
    for part in range(PARTS):
        disk.leave(size * part // PARTS)
        said = export()
        assert said.code == 74, said
        assert "free space" in said.err
        assert "Traceback" not in said.err
        assert disk.state() == before
        assert [entry.name for entry in disk.folder.iterdir()] == (["model.topt"] if older else [])
    disk.leave(3 * size)
    assert export().code == 0
    assert (out / "MODEL_CARD.md").read_text() != "old"
    record("disk full", command="export", again=older, failures=PARTS)


def test_train(topt_deploy, demo_city, disk):
    out = disk.folder / "run"
    command = ("train", demo_city, "--out", out, "--set", "srel.epochs=4", "--set", "prompt4re.epochs=4")
    command += ("--task", "check_in", "--set", "checkpoint_every=2")
    assert topt_deploy(*command).code == 0
    size, whole = disk.used(), (out / "model.safetensors").read_bytes()
    shutil.rmtree(out)
    failures = 0
    for part in range(PARTS):
        disk.leave(size * part // PARTS)
        said = topt_deploy(*command)
        assert said.code == 74, said
        assert "free space" in said.err
        assert "Traceback" not in said.err
        failures += 1
        assert not [name for name in disk.state() if name.rpartition("/")[2].startswith(".")]
        begun = (out / "run.json").exists()
        disk.leave(3 * size)
        said = topt_deploy("train", demo_city, "--out", out, "--resume") if begun else topt_deploy(*command)
        assert said.code == 0, said
        assert (out / "model.safetensors").read_bytes() == whole
        shutil.rmtree(out)
    record("disk full", command="train, then --resume with free space", again=False, failures=failures)
