"""A disk that is full at any write of ``topt-run predict``: exit 74, what to do, and every old file as it was."""

import json
import shutil
from pathlib import Path

import pytest
from cities_folder import write_cities
from commands import shell
from figures import FULL, record
from small_disk import BLOCK, SmallDisk, small_disk

OLD = "--coverage 0.8"
"""What makes an earlier output differ."""


@pytest.fixture
def disk(tmp_path: Path):
    with small_disk(tmp_path / "small", 4) as disk:
        yield disk


@pytest.fixture
def cities(tmp_path: Path, demo_bundle: Path) -> Path:
    """Two cities, one of them with a row to be set aside; the bundle is beside them."""
    write_cities(tmp_path / "cities", demo_bundle.parent, {"bad": 77, "good": 77}, bad="bad")
    shutil.copytree(demo_bundle, tmp_path / "model.topt")
    return tmp_path


def fails_until_it_fits(disk: SmallDisk, call, *, step: int) -> int:
    """Call with ever more space: 74 and nothing changed, then success; how often it failed."""
    before, failures = disk.state(), 0
    while True:
        disk.leave(failures * step)
        said = call()
        if said.code in (0, 3):
            assert disk.state() != before
            return failures
        failures += 1
        assert said.code == 74, said
        assert "Traceback" not in said.err
        assert "No space left on device" in said.err or "full" in said.err, said.err
        assert "free space" in said.err
        assert disk.state() == before


@pytest.mark.parametrize("older", [False, True], ids=["first", "again"])
def test_one_city(topt_run, cities, disk, older):
    out = disk.folder / "predictions.parquet"
    command = ("predict", cities / "cities" / "city=bad", "--bundle", cities / "model.topt", "--out", out)
    command += ("--on-bad-row", "quarantine")
    if older:
        assert topt_run(*command, *OLD.split()).code == 3
    failures = fails_until_it_fits(disk, lambda: topt_run(*command), step=BLOCK)
    assert failures >= 5  # predictions, two files of what was set aside, receipt
    assert len(disk.state()) == 4
    record("disk full", command="predict, one city, rows set aside", again=older, failures=failures)


@pytest.mark.parametrize("older", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("suffix", ["gpkg", "geojson"])
def test_a_map(topt_run, cities, disk, older, suffix):
    pytest.importorskip("pyogrio", reason="no pyogrio here (extra geo)")
    out, geo = disk.folder / "predictions.parquet", disk.folder / f"map.{suffix}"
    command = ("predict", cities / "cities" / "city=good", "--bundle", cities / "model.topt", "--out", out)
    command += ("--geo", geo)
    if older:
        assert topt_run(*command, *OLD.split()).code == 0
    failures = fails_until_it_fits(disk, lambda: topt_run(*command), step=BLOCK if FULL else 4 * BLOCK)
    assert failures >= 3
    assert len(disk.state()) == 3
    record("disk full", command=f"predict --geo map.{suffix}", again=older, failures=failures)


def test_metrics(topt_run, cities, disk, tmp_path):
    """The predictions are elsewhere, and done; that they could not be told of is an error all the same."""
    metrics = disk.folder / "topt.prom"
    command = ("predict", cities / "cities" / "city=good", "--bundle", cities / "model.topt")
    command += ("--out", tmp_path / "p.parquet", "--metrics-file", metrics)
    assert fails_until_it_fits(disk, lambda: topt_run(*command), step=BLOCK) >= 1
    assert "topt_run_exit_code 0" in metrics.read_text()


@pytest.mark.parametrize("older", [False, True], ids=["first", "again"])
def test_many_cities(cities, disk, older):
    command = (
        f"topt-run predict cities --bundle model.topt --out {disk.folder}/out --on-bad-row quarantine --workers 2"
        f" --metrics-file {disk.folder}/topt.prom"
    )
    if older:
        assert shell(f"{command} {OLD}", cities).code == 3
    old = disk.state()
    free = failures = 0
    while True:
        disk.leave(free)
        said = shell(command, cities)
        after = disk.state()
        if said.code == 3:
            break
        failures += 1
        assert said.code == 74, said
        assert "No space left on device" in said.err
        assert "free space" in said.err
        for name in set(old) | set(after):
            folder, _, file = name.rpartition("/")
            assert not file.startswith("."), f"{name} was left"
            if file.endswith(".receipt.json"):  # where it is new, so is all it speaks of
                receipt = json.loads(after[name])
                assert f"{folder}/{receipt['output']['file']}" in after
            elif folder.rpartition("/")[2].startswith("city=") and after.get(name) != old.get(name):
                assert f"{folder}/predictions.receipt.json" in after
        free += BLOCK if FULL else 3 * BLOCK
    assert failures >= 2
    assert len(disk.state()) == 8
    record("disk full", command="predict, many cities, --metrics-file", again=older, failures=failures)


def test_the_folder_for_temporary_files(cities, disk):
    command = "topt-run predict cities/city=good --bundle model.topt --out predictions.parquet"
    disk.leave(0)
    (disk.folder / "sub").mkdir()
    said = shell(command, cities, TMPDIR=str(disk.folder))
    assert said.code in (0, 74), said  # an empty file may fit
    assert (cities / "predictions.parquet").exists() == (said.code == 0)
    assert set(disk.state()) == set()
