"""The demo from raw files: what build counts in them is the city that was drawn."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from topt_deploy.train.cli.build import build as build_command
from topt_deploy.train.cli.datasets import sample
from topt_deploy.train.datasets.build import build, read_recipe
from topt_deploy.train.datasets.build.init import write_recipe
from topt_deploy.train.datasets.sample import draw_city
from topt_deploy.train.datasets.sample_raw import make_raw
from topt_deploy.train.datasets.sample_recipe import LAND_USE, POI

pytest.importorskip("shapely", reason="needs the geo extra")
pytest.importorskip("pyogrio", reason="needs the geo extra")
SIZE = 30


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    return make_raw(folder / "raw", regions=SIZE, seed=3).out


@pytest.fixture(scope="module")
def built(raw):
    return build(read_recipe(raw / "city.toml"), raw.parent / "city")


def test_what_is_counted_is_what_was_drawn(built):
    drawn = draw_city(SIZE, 3)
    table = pq.read_table(built.out / "regions.parquet").to_pydict()
    assert table["region_id"] == drawn.ids.tolist()
    assert table["name"][0] == "District 1"
    for place, name in enumerate(POI):
        assert table[f"poi_{name}"] == drawn.poi[:, place].tolist()
    for task, counts in drawn.labels.items():
        assert table[task] == counts.tolist()
    share = drawn.land_use / drawn.land_use.sum(axis=1, keepdims=True)
    found = np.array([table[f"land_use_{name}"] for name in LAND_USE]).T
    np.testing.assert_allclose(found / found.sum(axis=1, keepdims=True), share, atol=2e-3)
    flows = pq.read_table(built.out / "mobility.parquet").to_pylist()
    origin, dest, flow = drawn.flows
    expected = {(drawn.ids[o], drawn.ids[d]): n for o, d, n in zip(origin, dest, flow.tolist(), strict=True)}
    assert {(row["origin_id"], row["dest_id"]): row["flow"] for row in flows} == expected


def test_every_row_is_accounted_for(built):
    for name, tally in built.tallies.items():
        if name != "areas.land_use":
            assert tally.read == tally.assigned + tally.reasons.total(), name
    reasons = built.tallies["labels.crime"].reasons
    assert min(reasons[reason] for reason in ("blank", "null_island", "outside", "duplicate")) > 10
    assert built.tallies["flows"].reasons["unknown_region"] > 100
    receipt = json.loads((built.out / "build.receipt.json").read_text())
    assert receipt["sources"]["labels.crime"] == built.tallies["labels.crime"].as_dict()
    assert {facts["file"].rsplit("/", 1)[1] for facts in receipt["files"]} >= {
        "areas.geojson",
        "pois.csv",
        "trips.parquet",
    }


def test_what_has_not_changed_is_not_read_again(raw, built):
    before = (built.out / "regions.parquet").read_bytes()
    again = build(read_recipe(raw / "city.toml"), built.out)
    assert set(again.taken) == set(again.tallies)
    assert (built.out / "regions.parquet").read_bytes() == before
    (raw / "crime.csv").write_bytes((raw / "crime.csv").read_bytes() + b"X,2025-01-02 00:00:00,,\n")
    changed = build(read_recipe(raw / "city.toml"), built.out)
    assert set(changed.tallies) - set(changed.taken) == {"labels.crime"}
    assert changed.tallies["labels.crime"].read == built.tallies["labels.crime"].read + 1


def test_the_command_by_recipe_and_by_options(raw, tmp_path):
    run = CliRunner().invoke(
        build_command, [str(raw / "city.toml"), "--out", str(tmp_path / "a"), "--city", "Elsewhere"]
    )
    assert run.exit_code == 0, run.output
    assert "Elsewhere: 30 regions" in run.output
    assert "topt-deploy train" in run.output
    direct = [
        "--regions", str(raw / "areas.geojson"), "--id-col", "area_id", "--points", f"poi={raw / 'pois.csv'}",
        "--labels", f"crime={raw / 'crime.csv'}", "--out", str(tmp_path / "b"), "--log-format", "json",
    ]  # fmt: skip
    run = CliRunner().invoke(build_command, direct)
    assert run.exit_code == 0, run.output
    assert json.loads(run.output.splitlines()[-1])["regions"] == SIZE
    for wrong in ([], ["--out", "x"], ["a.toml", "--points", "x=y", "--out", "x"], ["--grid", "h3:8", "--out", "x"]):
        assert CliRunner().invoke(build_command, wrong).exit_code != 0


def test_rows_set_aside_have_an_exit_code(raw, tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("longitude,latitude\nwest,40\n-30.0,40.0\n")
    direct = ["--regions", str(raw / "areas.geojson"), "--id-col", "area_id", "--labels", f"crime={bad}"]
    options = [*direct, "--out", str(tmp_path / "c"), "--on-bad-row", "quarantine"]
    assert build_command.main(options, standalone_mode=False) == 3
    assert pq.read_table(tmp_path / "c" / "rejects.parquet").to_pylist()[0]["reason"] == "bad_number"


def test_a_recipe_is_written_from_the_files_alone(raw, tmp_path):
    for file in raw.iterdir():
        if file.name != "city.toml":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    text = write_recipe(tmp_path)
    (tmp_path / "found.toml").write_text(text)
    recipe = read_recipe(tmp_path / "found.toml")
    assert recipe.regions.file.endswith("areas.geojson")
    assert recipe.regions.name == "area_name"
    assert set(recipe.points) == {"poi"}
    assert set(recipe.labels) == {"crime", "check_in", "service_call"}
    assert set(recipe.areas) == {"land_use"}
    assert "trips.parquet" in text
    assert "columns: case, " in text


def test_a_recipe_says_which_rows_of_a_publisher_count(tmp_path):
    (tmp_path / "311.csv").write_text("SR_NUMBER,SR_TYPE,CREATED_DATE,DUPLICATE,LATITUDE,LONGITUDE\n")
    (tmp_path / "crimes.csv").write_text("ID,Case Number,Date,IUCR,Primary Type,Latitude,Longitude\n")
    calls, crimes = write_recipe(tmp_path).split("# Chicago 311 service requests")[1].split("# Chicago crimes")
    assert "only rows count where SR_TYPE not in ('311 INFORMATION ONLY CALL'" in calls
    assert "every row counts" not in calls
    assert "every row counts" in crimes


def test_the_sample_command_writes_either(tmp_path):
    run = CliRunner().invoke(sample, ["--raw", "--out", str(tmp_path / "raw"), "--regions", "20"])
    assert run.exit_code == 0, run.output
    assert "topt-deploy build" in run.output
    again = make_raw(tmp_path / "again", regions=20).out
    for file in again.iterdir():
        assert file.read_bytes() == (tmp_path / "raw" / file.name).read_bytes()


def test_what_is_killed_or_finds_the_disk_full_leaves_the_old_city(raw, tmp_path, monkeypatch):
    from topt_deploy.errors import IOFailure
    from topt_deploy.train.datasets.build import city

    out = tmp_path / "city"
    build(read_recipe(raw / "city.toml"), out)
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}

    def full(path, table):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(city, "save_parquet", full)
    with pytest.raises(IOFailure, match="No space left"):
        build(read_recipe(raw / "city.toml"), out)
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before
