"""``topt-deploy build``, killed at random instants, and on a disk that is full at any write: the old city, or none."""

from pathlib import Path
from random import Random

import pytest
from build_again import IMPORTED, build
from figures import FULL, record
from killing import Forked, Target, Trials
from small_disk import BLOCK, SmallDisk, small_disk

from topt_deploy.train.datasets.sample_raw import make_raw

pytest.importorskip("shapely", reason="needs the geo extra")
pytest.importorskip("pyogrio", reason="needs the geo extra")

POINTS = 60
COMMAND = "raw/city.toml --out city"
OLD = "--city Elsewhere"
"""What makes an earlier city differ."""
RESULTS = ("regions.parquet", "mobility.parquet", "rejects.parquet", "topt.toml")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with the raw files of a small city."""
    make_raw(tmp_path / "inputs" / "raw", regions=20, seed=1)
    return tmp_path / "inputs"


@pytest.mark.parametrize("earlier", [False, True], ids=["first", "again"])
def test_killed_and_built_again(tmp_path, raw, earlier):
    target = Target(command=COMMAND, resume=COMMAND, results=RESULTS, earlier=f"{COMMAND} {OLD}" if earlier else None)
    trials = Trials(target, raw, tmp_path / "scratch", Forked.starter(build, IMPORTED))
    rng = Random(5 + earlier)
    while trials.kills < (POINTS if FULL else 2):
        trials(rng)
    assert trials.left() == []
    record(
        "kill", command="topt-deploy build", again=earlier, seconds=trials.seconds, idle_s=trials.idle_s,
        kills=trials.kills, begun=trials.begun,
    )  # fmt: skip


def outputs(disk: SmallDisk) -> dict[str, bytes]:
    """Every file but those that are kept for the next build, which may be new when something else finds no room."""
    return {name: data for name, data in disk.state().items() if ".build/" not in name}


@pytest.mark.parametrize("older", [False, True], ids=["first", "again"])
def test_a_full_disk(tmp_path, raw, topt_deploy, older):
    with small_disk(tmp_path / "small", 4) as disk:
        command = ("build", raw / "raw" / "city.toml", "--out", disk.folder / "city")
        if older:
            assert topt_deploy(*command, *OLD.split()).code == 0
        before, failures = outputs(disk), 0
        while True:
            disk.leave(failures * (1 if FULL else 3) * BLOCK)
            said = topt_deploy(*command)
            if said.code == 0:
                break
            failures += 1
            assert said.code == 74, said
            assert "Traceback" not in said.err
            assert "free space" in said.err
            assert outputs(disk) == before
        assert failures >= 3
        assert set(outputs(disk)) == {f"city/{name}" for name in (*RESULTS, "build.receipt.json")}
        assert outputs(disk) != before
        record("disk full", command="topt-deploy build", again=older, failures=failures)
