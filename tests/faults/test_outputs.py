"""What is written replaces an older output, and nothing else."""

import json
import os
import shutil

import pyarrow.parquet as pq
import pytest
from builders import tiny_city_tables
from commands import shell

from topt_deploy.errors import UsageError
from topt_deploy.train.datasets.city_files import check_city

USAGE, CANNOT_CREATE = 2, 73


@pytest.mark.parametrize("place", ["/dev/null", "/dev/full"])
def test_a_device_is_no_place(place, desk, topt_run):
    before = os.lstat(place)
    said = topt_run("predict", desk.regions, "--out", place)
    assert said.code == USAGE or (said.code, "a pipe or a device" in said.err) == (CANNOT_CREATE, True)
    assert os.lstat(place).st_rdev == before.st_rdev


def test_a_pipe_is_no_place(desk, topt_run):
    os.mkfifo(desk.folder / "pipe.parquet")
    assert topt_run("predict", desk.regions, "--out", desk.folder / "pipe.parquet").code == CANNOT_CREATE


@pytest.mark.parametrize("name", ["predictions.parquet", "predictions.receipt.json"])
def test_a_link_is_not_replaced(name, desk, topt_run):
    target = desk.folder / "elsewhere"
    target.write_bytes(b"old")
    (desk.folder / name).symlink_to(target)
    said = topt_run("predict", desk.regions)
    assert said.code == CANNOT_CREATE
    assert str(target) in said.err
    assert (desk.folder / name).is_symlink()
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("out", ["x.csv", "x.json", "x.gpkg", "-", "predictions.parquet.gz"])
def test_a_name_says_what_is_in_it(out, desk, topt_run, monkeypatch):
    monkeypatch.chdir(desk.folder)
    before = desk.state()
    assert topt_run("predict", desk.regions, "--out", out).code == USAGE
    assert topt_run("predict", desk.regions, desk.folder, "--out", "-").code == USAGE
    assert desk.state() == before


@pytest.mark.parametrize("name", ["mobility.parquet", "regions.parquet", "x.csv", "model.topt/x.prom"])
def test_metrics_replace_metrics_alone(name, desk, topt_run):
    before = desk.state()
    assert topt_run("predict", desk.regions, "--metrics-file", desk.folder / name).code == USAGE
    assert desk.state() == before


def test_another_citys_tables_are_not_replaced(desk, topt_run):
    other = desk.folder / "other"
    other.mkdir()
    for name in ("regions.parquet", "mobility.parquet"):
        shutil.copy(desk.folder / name, other)
        assert topt_run("predict", desk.regions, "--out", other / name).code == USAGE
    os.link(desk.regions, desk.folder / "hard.parquet")
    assert topt_run("predict", desk.regions, "--out", desk.folder / "hard.parquet").code == USAGE
    assert pq.read_table(other / "mobility.parquet").equals(pq.read_table(desk.mobility))


def test_no_map_goes_into_a_bundle(desk, topt_run):
    pytest.importorskip("pyogrio", reason="needs the geo extra")
    other = shutil.copytree(desk.bundle, desk.folder / "another")
    for place in (desk.bundle, other):
        assert topt_run("predict", desk.regions, "--geo", place / "map.geojson").code == USAGE
        assert topt_run("predict", desk.regions, "--out", place / "golden" / "x.parquet").code == USAGE


@pytest.mark.parametrize("name", ["mobility.parquet", "regions.parquet", "encoder.topt/x.parquet", "x.csv", "-"])
def test_prompts_replace_prompts_alone(name, prompted, tmp_path, topt_run, monkeypatch):
    for file in ("regions.parquet", "mobility.parquet"):
        shutil.copy(prompted / file, tmp_path)
    shutil.copytree(prompted / "encoder.topt", tmp_path / "encoder.topt")
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert topt_run("encode", "regions.parquet", "--bundle", "encoder.topt", "--no-cache", "--out", name).code == USAGE
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}


class TestCities:
    """Commands that make a city replace an older one of their own, and no table of the user's."""

    def test_sample(self, tmp_path, topt_deploy):
        sample = ("sample", "--regions", "20", "--out", tmp_path)
        for _ in range(2):
            assert topt_deploy(*sample).code == 0
        own = pq.read_table(tmp_path / "regions.parquet").replace_schema_metadata(None)
        for name in ("regions.parquet", "mobility.parquet"):
            before = (tmp_path / name).read_bytes()
            pq.write_table(own, tmp_path / name)
            state = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
            said = topt_deploy(*sample)
            assert said.code == USAGE
            assert f"{name}: a file that this command did not write" in said.err
            assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == state
            (tmp_path / name).write_bytes(before)
        (tmp_path / "mobility.parquet").unlink()
        (tmp_path / "mobility.parquet").symlink_to(tmp_path / "elsewhere")
        assert topt_deploy(*sample).code == CANNOT_CREATE

    def test_raw_files(self, tmp_path, topt_deploy):
        pytest.importorskip("shapely", reason="needs the build extra")
        sample = ("sample", "--raw", "--regions", "20", "--out", tmp_path)
        for _ in range(2):
            assert topt_deploy(*sample).code == 0
        for name in ("city.toml", "pois.csv"):
            other = tmp_path / "other"
            other.mkdir()
            (other / name).write_text("mine")
            assert topt_deploy(*sample[:-1], other).code == USAGE
            assert [(file.name, file.read_text()) for file in other.iterdir()] == [(name, "mine")]
            shutil.rmtree(other)

    def test_an_import_of_another_city(self, tmp_path):
        check_city(tmp_path, "HAFusion data_NY")
        regions, _ = tiny_city_tables()
        pq.write_table(regions.replace_schema_metadata({"source": "HAFusion data_Chi"}), tmp_path / "regions.parquet")
        check_city(tmp_path, "HAFusion data_Chi")
        with pytest.raises(UsageError, match="did not write"):
            check_city(tmp_path, "HAFusion data_NY")
        assert pq.read_table(tmp_path / "regions.parquet").num_rows == len(regions)

    def test_build(self, tmp_path, topt_deploy):
        pytest.importorskip("shapely", reason="needs the build extra")
        raw, city = tmp_path / "raw", tmp_path / "city"
        assert topt_deploy("sample", "--raw", "--regions", "20", "--out", raw).code == 0
        city.mkdir()
        (city / "regions.parquet").write_bytes(b"mine")
        assert topt_deploy("build", raw / "city.toml", "--out", city).code == USAGE
        assert [file.name for file in city.iterdir()] == ["regions.parquet"]
        assert (city / "regions.parquet").read_bytes() == b"mine"
        (city / "regions.parquet").unlink()
        for _ in range(2):
            assert topt_deploy("build", raw / "city.toml", "--out", city).code in (0, 3)


class TestResume:
    def test_a_city_by_another_name_is_predicted_again(self, desk, topt_run):
        """Its name is in the output, and may stand in its folder alone."""
        for name in ("regions", "mobility"):
            (desk.folder / "city=C").mkdir(exist_ok=True)
            table = pq.read_table(desk.folder / f"{name}.parquet").drop_columns("city_id")
            pq.write_table(table, desk.folder / "city=C" / f"{name}.parquet")
        out = desk.folder / "out.parquet"
        for name in ("C", "D"):
            place = desk.folder / f"city={name}"
            done = topt_run("predict", place, "--bundle", desk.bundle, "--out", out, "--resume")
            assert done.code == 0, done.err
            assert set(pq.read_table(out).column("city_id").to_pylist()) == {name}
            place.rename(desk.folder / "city=D")

    def test_a_table_that_is_swapped_after_it_was_hashed(self, desk, topt_run, monkeypatch):
        """Of equal size and time stamp, and too large to be held."""
        monkeypatch.setattr("topt_deploy.storage.hashed_file.HELD_BYTES", 100)
        from topt_deploy.runtime import predict_city as city

        hashed = city._key

        def swap(*given):
            facts = desk.regions.stat()
            data = desk.regions.read_bytes()
            desk.regions.write_bytes(data)
            os.utime(desk.regions, ns=(facts.st_atime_ns, facts.st_mtime_ns))
            return hashed(*given)

        monkeypatch.setattr(city, "_key", swap)
        said = topt_run("predict", desk.regions)
        assert (said.code, "changed while it was read" in said.err) == (65, True), said


def test_the_receipts_key_has_the_citys_name(desk):
    assert shell("topt-run predict regions.parquet", desk.folder).code == 0
    first = json.loads(desk.receipt.read_text())["key"]
    moved = shutil.copytree(desk.folder, desk.folder.parent / "city=Z")
    assert shell("topt-run predict regions.parquet", moved).code == 0
    assert json.loads((moved / "predictions.receipt.json").read_text())["key"] != first
