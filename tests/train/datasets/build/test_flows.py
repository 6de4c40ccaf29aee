"""Trips as they are published: TLC, LODES, Chicago's taxis, bikes by positions, any table of pairs."""

import gzip
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from open_data import middle, squares, write

from topt_deploy.errors import BadConfig, BadData
from topt_deploy.train.datasets.build import build
from topt_deploy.train.datasets.build.recipe import recipe_of

pytest.importorskip("shapely", reason="needs the geo extra")
pytest.importorskip("pyogrio", reason="needs the geo extra")

TRACTS = [f"360610{number:05d}" for number in range(1, 10)]


def flows(folder, sources, ids=None, **more):
    squares(folder, ids=ids)
    raw = {"regions": {"file": "areas.geojson", "id": "area_numbe"}, "flows": sources, **more}
    report = build(recipe_of(raw, folder=folder, name="small"), folder / "out")
    table = pq.read_table(folder / "out" / "mobility.parquet").to_pylist()
    return {(row["origin_id"], row["dest_id"]): row["flow"] for row in table}, report


def test_tlc_trips_of_the_period_and_their_unknown_zones(tmp_path):
    when = [
        datetime(2019, 1, 1),
        datetime(2019, 1, 31, 23, 59),
        datetime(2019, 2, 1),
        datetime(2019, 1, 5),
        datetime(2019, 1, 5),
    ]
    table = {
        "tpep_pickup_datetime": pa.array(when, pa.timestamp("us")),
        "PULocationID": pa.array([1, 1, 1, 2, 264], pa.int32()),
        "DOLocationID": pa.array([2, 2, 2, 265, 3], pa.int64()),
    }
    pq.write_table(pa.table(table), tmp_path / "yellow.parquet")
    found, report = flows(tmp_path, ["yellow.parquet"], **{"from": "2019-01-01", "to": "2019-02-01"})
    assert found == {("1", "2"): 2}
    assert report.tallies["flows"].as_dict() == {"read": 5, "assigned": 2, "unknown_region": 2, "other_period": 1}
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert [row["value"] for row in rejects] == ["264", "265"]


@pytest.mark.parametrize("damage", ["none", "zeros lost", "floats"])
def test_lodes_from_home_to_work_by_tract(tmp_path, damage):
    """Blocks of 15 digits in a compressed file, workplace first; the state of Alabama begins with a zero."""
    ids = [f"010010201{number:02d}" for number in range(1, 10)]
    block = {"none": "{}1001", "zeros lost": "{}1001", "floats": "{}1001"}[damage]
    home, work = block.format(ids[2]), block.format(ids[0])
    if damage != "none":
        home, work = home.lstrip("0"), work.lstrip("0")
    if damage == "floats":
        home, work = f"{float(home):.14e}", f"{float(work):.1f}"
    main = f"w_geocode,h_geocode,S000,SA01\n{work},{home},3,1\n{work},{home},4,1\n{work},131210001001001,9,1\n"
    (tmp_path / "al_od_main.csv.gz").write_bytes(gzip.compress(main.encode()))
    (tmp_path / "al_od_aux.csv.gz").write_bytes(gzip.compress(f"w_geocode,h_geocode,S000\n{home},{home},1\n".encode()))
    found, report = flows(tmp_path, [{"file": "al_od_*.csv.gz"}], ids)
    assert found == {(ids[2], ids[0]): 7, (ids[2], ids[2]): 1}
    assert report.tallies["flows"].reasons["unknown_region"] == 1
    assert any("leading zeros" in told for told in report.tallies["flows"].warnings) == (damage != "none")


def test_blocks_of_another_census_are_said(tmp_path):
    write(tmp_path / "od.csv", "w_geocode,h_geocode,S000\n" + "360610099001001,360610099001002,1\n" * 3)
    squares(tmp_path, ids=TRACTS)
    raw = {"regions": {"file": "areas.geojson", "id": "area_numbe"}, "flows": ["od.csv"]}
    report = build(recipe_of(raw, folder=tmp_path, name="small"), tmp_path / "out")
    assert "between two regions" in report.tallies["flows"].warnings[0]


def test_chicago_taxis_with_blanks_outside_the_city(tmp_path):
    write(tmp_path / "taxi.csv", """
        Trip Start Timestamp,Pickup Community Area,Dropoff Community Area
        05/31/2019 11:45:00 PM,1,2
        05/31/2019 11:45:00 PM,1.0,
        05/31/2019 11:45:00 PM,,2
        """)  # fmt: skip
    found, report = flows(tmp_path, ["taxi.csv"])
    assert found == {("1", "2"): 1}
    assert report.tallies["flows"].as_dict() == {"read": 3, "assigned": 1, "blank": 2}


def test_bikes_by_positions(tmp_path):
    (a, b), (c, d) = middle(4), middle(6)
    write(tmp_path / "bike.csv", f"""
        ride_id,started_at,start_lat,start_lng,end_lat,end_lng
        1,2024-06-01 10:00:00.123,{b},{a},{d},{c}
        2,2024-06-01 10:00:00.123,{b},{a},0,0
        3,2024-06-01 10:00:00.123,{b},{a},,
        4,2024-06-01 10:00:00.123,{b},{a},{d},-80
        """)  # fmt: skip
    found, report = flows(tmp_path, ["bike.csv"], **{"from": "2024-01-01", "to": "2025-01-01"})
    assert found == {("4", "6"): 1}
    assert report.tallies["flows"].as_dict() == {"read": 4, "assigned": 1, "blank": 1, "null_island": 1, "outside": 1}


def test_any_table_of_pairs_and_several_sources(tmp_path):
    write(tmp_path / "od.csv", 'von,nach,fahrten\n1,2,"1.000,5"\n1,2,2\n3,1,4')
    write(tmp_path / "more.csv", "origin_id,dest_id,flow\n1,2,0.5\n9,9,1")
    own = {"file": "od.csv", "origin": "von", "dest": "nach", "count": "fahrten", "decimal": ","}
    found, _ = flows(tmp_path, [own, "more.csv"])
    assert found == {("1", "2"): 1003, ("3", "1"): 4, ("9", "9"): 1}
    with pytest.raises(BadConfig, match="begin and end is not stated"):
        flows(tmp_path, ["od.csv"])
    write(tmp_path / "bad.csv", "origin_id,dest_id,flow\n1,2,-3")
    with pytest.raises(BadData, match="not a number, on line 2"):
        flows(tmp_path, ["bad.csv"])


def test_without_flows_there_is_no_old_table(tmp_path):
    write(tmp_path / "od.csv", "origin_id,dest_id,flow\n1,2,0.5")
    flows(tmp_path, ["od.csv"])
    raw = {"regions": {"file": "areas.geojson", "id": "area_numbe"}}
    build(recipe_of(raw, folder=tmp_path, name="small"), tmp_path / "out")
    assert not (tmp_path / "out" / "mobility.parquet").exists()
