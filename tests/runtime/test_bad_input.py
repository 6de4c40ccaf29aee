"""Bad tables: each is refused with its exit code and a message that names both sides, and nothing is left behind."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import fixed_lists, replaced
from commands import shell

BAD_DATA, NO_INPUT, USAGE = 65, 66, 2


def changed(table, row, column, value):
    """``table`` with one value changed, and the column's type with it where that is needed."""
    values = table.column(column).to_pylist()
    values[row] = value
    return replaced(table, **{column: values})


def with_ids(table, ids):
    return replaced(table, region_id=ids)


def ids_of(table):
    return table.column("region_id").to_pylist()


def prompts(table):
    return np.array(table.column("prompt_crime").to_pylist(), dtype=np.float32)


def ragged(table):
    lists = table.column("prompt_crime").to_pylist()
    lists[4] = lists[4][:-1]
    return replaced(table, prompt_crime=pa.array(lists, pa.list_(pa.float32())))


def null_list(table):
    lists = table.column("prompt_crime").to_pylist()
    lists[4] = None
    return replaced(table, prompt_crime=pa.array(lists, pa.list_(pa.float32())))


def nan_in_a_list(table):
    values = prompts(table)
    values[4, 7] = np.nan
    return replaced(table, prompt_crime=fixed_lists(values))


def other_encoder(table):
    index = table.schema.get_field_index("prompt_crime")
    field = table.schema.field(index).with_metadata({"encoder": "another-model/7B"})
    return table.set_column(index, field, table.column(index))


def as_list(table, view, names=None):
    """The view's wide columns as one list column, its categories named where ``names`` are given."""
    columns = [c for c in table.column_names if c.startswith(f"{view}_")]
    values = np.stack([table.column(c).to_numpy() for c in columns], axis=1)[:, : len(names) if names else None]
    array = fixed_lists(values)
    field = pa.field(view, array.type, metadata={"categories": json.dumps(names)} if names else None)
    return table.drop_columns(columns).append_column(field, array)


REGIONS = {
    "no region_id": (
        lambda t: t.drop_columns("region_id"),
        ["regions.parquet", "column 'region_id'", "absent", "--id-col", "'city_id'"],
    ),
    "null id": (lambda t: changed(t, 3, "region_id", None), ["column 'region_id'", "missing", "'row 3'"]),
    "blank id": (lambda t: changed(t, 3, "region_id", "  "), ["column 'region_id'", "missing", "'row 3'"]),
    "duplicate ids": (
        lambda t: changed(changed(t, 3, "region_id", "D001"), 9, "region_id", "D006"),
        ["column 'region_id'", "more than once", "'D001', 'D006'"],
    ),
    "integer ids": (
        lambda t: with_ids(t, list(range(len(t)))),
        ["column 'region_id'", "not text", "leading zeros", "int64"],
    ),
    "float ids": (lambda t: with_ids(t, [float(i) for i in range(len(t))]), ["not text", "double"]),
    "category too many": (
        lambda t: t.append_column("poi_zoo", t.column("poi_food")),
        ["view 'poi'", "'poi_zoo'", "12 categories", "13 categories", "unknown 'zoo'"],
    ),
    "category missing": (
        lambda t: t.drop_columns("poi_food"),
        ["view 'poi'", "'poi_food'", "12 categories", "11 categories", "without 'food'"],
    ),
    "category misspelt": (
        lambda t: t.rename_columns(["land_use_park" if c == "land_use_green" else c for c in t.column_names]),
        ["view 'land_use'", "without 'green'", "unknown 'park'"],
    ),
    "list with other names": (
        lambda t: as_list(t, "poi", ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]),
        ["view 'poi'", "without", "'food'", "unknown 'a'"],
    ),
    "list of counts too short": (
        lambda t: as_list(t, "poi", ["food", "retail"]),
        ["column 'poi'", "wrong length", "12 numbers", "lists of 2", "(77 in all)"],
    ),
    "no view at all": (
        lambda t: t.drop_columns([c for c in t.column_names if c.startswith("land_use_")]),
        ["view 'land_use'", "6 categories", "0 categories"],
    ),
    "NaN": (
        lambda t: changed(replaced(t, poi_food=t.column("poi_food").cast(pa.float64())), 5, "poi_food", float("nan")),
        ["column 'poi_food'", "'D006'", "number ≥ 0", "nan"],
    ),
    "infinite": (
        lambda t: changed(replaced(t, poi_food=t.column("poi_food").cast(pa.float64())), 5, "poi_food", float("inf")),
        ["column 'poi_food'", "'D006'", "number ≥ 0", "inf"],
    ),
    "negative": (lambda t: changed(t, 5, "poi_food", -3), ["column 'poi_food'", "'D006'", "number ≥ 0", "-3"]),
    "many negative": (
        lambda t: replaced(t, poi_food=[-1] * 12 + t.column("poi_food").to_pylist()[12:]),
        ["'D001', 'D002', 'D003', 'D004', 'D005' and 7 more (12 in all)"],
    ),
    "null count": (lambda t: changed(t, 5, "poi_food", None), ["column 'poi_food'", "'D006'", "missing", "null"]),
    "text in place of counts": (
        lambda t: replaced(t, poi_food=[str(v) for v in t.column("poi_food").to_pylist()]),
        ["column 'poi_food'", "not a number", "string"],
    ),
    "prompts of another width": (
        lambda t: replaced(t, prompt_crime=fixed_lists(prompts(t)[:, 1:])),
        ["column 'prompt_crime'", "wrong length", "256 numbers", "lists of 255", "(77 in all)"],
    ),
    "one prompt of another width": (ragged, ["column 'prompt_crime'", "'D005'", "256 numbers", "lists of 255"]),
    "null prompt": (null_list, ["column 'prompt_crime'", "'D005'", "256 numbers", "null"]),
    "NaN in a prompt": (nan_in_a_list, ["column 'prompt_crime'", "'D005'", "NaN or infinite"]),
    "no prompts": (lambda t: t.drop_columns("prompt_crime"), ["column 'prompt_crime'", "absent", "encode prompts"]),
    "prompts that are no lists": (
        lambda t: replaced(t, prompt_crime=[1.0] * len(t)),
        ["column 'prompt_crime'", "not a list", "double"],
    ),
    "prompts of another encoder": (
        other_encoder,
        ["column 'prompt_crime'", "another encoder", "hashing-256", "another-model/7B"],
    ),
    "empty table": (lambda t: t.slice(0, 0), ["the table is empty", "0 rows"]),
    "several cities": (
        lambda t: changed(t, 3, "city_id", "elsewhere"),
        ["column 'city_id'", "several cities", "'elsewhere', 'synthetic-demo'"],
    ),
    "no positions": (lambda t: t.drop_columns(["lon", "geometry"]), ["positions are absent", "lon and lat"]),
    "metres for degrees": (
        lambda t: changed(t, 5, "lat", 4_600_000.0),
        ["lon, lat", "'D006'", "not degrees", "4.6e+06"],
    ),
    "NaN longitude": (lambda t: changed(t, 5, "lon", float("nan")), ["lon", "'D006'"]),
}


@pytest.mark.parametrize("case", REGIONS)
def test_a_bad_regions_table_is_refused(case, desk, refused):
    change, parts = REGIONS[case]
    pq.write_table(change(pq.read_table(desk.regions)), desk.regions)
    facts = refused(BAD_DATA, *parts)
    assert facts["error"] in ("BadData", "BadRows")
    assert facts["file"].endswith("regions.parquet")
    assert {"expected", "found", "to_do", "region_ids"} & facts.keys()


MOBILITY = {
    "unknown regions": (
        lambda t: changed(changed(t, 0, "origin_id", "X9"), 1, "origin_id", "X8"),
        ["column 'origin_id'", "'X8', 'X9'", "does not have", "'D001'"],
    ),
    "an unknown destination": (lambda t: changed(t, 0, "dest_id", "X9"), ["column 'dest_id'", "'X9'"]),
    "a null end": (lambda t: changed(t, 0, "dest_id", None), ["column 'dest_id'"]),
    "integer ids": (lambda t: replaced(t, origin_id=[1] * len(t)), ["column 'origin_id'", "not text", "int64"]),
    "negative flow": (lambda t: changed(t, 0, "flow", -1), ["column 'flow'", "number ≥ 0", "-1"]),
    "NaN flow": (lambda t: replaced(t, flow=[float("nan")] * len(t)), ["column 'flow'", "nan"]),
    "null flow": (lambda t: changed(t, 0, "flow", None), ["column 'flow'", "missing"]),
    "no flow column": (lambda t: t.drop_columns("flow"), ["exactly one flow column", "S000"]),
    "two origin columns": (
        lambda t: t.append_column("h_geocode", t.column("origin_id")),
        ["exactly one origin_id column", "'h_geocode'"],
    ),
    "no rows": (lambda t: t.slice(0, 0), ["no flow at all", "0 rows"]),
    "another city's": (lambda t: replaced(t, city_id=["elsewhere"] * len(t)), ["no flow at all"]),
}


@pytest.mark.parametrize("case", MOBILITY)
def test_a_bad_mobility_table_is_refused(case, desk, refused):
    change, parts = MOBILITY[case]
    pq.write_table(change(pq.read_table(desk.mobility)), desk.mobility)
    facts = refused(BAD_DATA, *parts)
    assert facts["file"].endswith("mobility.parquet")


def test_machines_are_told_which_regions(desk, refused):
    table = pq.read_table(desk.regions)
    pq.write_table(replaced(table, poi_food=[-1] * 12 + table.column("poi_food").to_pylist()[12:]), desk.regions)
    facts = refused(BAD_DATA)
    assert facts["region_ids"] == ["D001", "D002", "D003", "D004", "D005"]
    assert facts["region_count"] == 12
    assert facts["column"] == "poi_food"
    assert facts["expected"] == "a number ≥ 0"


@pytest.mark.parametrize("name", ["regions.parquet", "mobility.parquet"])
@pytest.mark.parametrize("content", ["text", "nothing", "cut"])
def test_what_is_no_whole_parquet_is_refused(name, content, desk, refused):
    path = desk.folder / name
    whole = path.read_bytes()
    path.write_bytes({"text": b"region_id,lon,lat\n", "nothing": b"", "cut": whole[: len(whole) // 2]}[content])
    said = ("not a Parquet file, but a CSV table", "convert it") if content == "text" else ("not a whole", "again")
    facts = refused(BAD_DATA, name, *said)
    assert facts["file"].endswith(name)


def test_a_parquet_cut_anywhere_is_refused(desk, topt_run):
    whole = desk.regions.read_bytes()
    rng = random.Random(0)
    for cut in [1, 3, 4, 8, 12, *(rng.randrange(len(whole)) for _ in range(20)), len(whole) - 1]:
        desk.regions.write_bytes(whole[:cut])
        assert topt_run("predict", desk.regions).code == BAD_DATA, cut
    assert not desk.out.exists()


def test_a_changed_byte_in_the_footer_is_bad_data_or_harmless_and_never_a_bug(desk, topt_run):
    whole = desk.regions.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    rng = random.Random(1)
    codes = set()
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(len(whole) - 8 - length, len(whole))] ^= 1 << rng.randrange(8)
        desk.regions.write_bytes(data)
        said = topt_run("predict", desk.regions)
        assert said.code in (0, BAD_DATA), said.err
        codes.add(said.code)
    assert BAD_DATA in codes


def test_a_folder_in_place_of_the_mobility_is_refused(desk, refused):
    refused(NO_INPUT, "a folder without a part of a table", arguments=("--mobility", desk.bundle))


def test_a_folder_without_regions_is_refused(desk, refused):
    folder = desk.folder / "folder.parquet"
    folder.mkdir()
    arguments = ("--bundle", desk.bundle, "--out", desk.folder / "out")
    refused(NO_INPUT, "folder.parquet", "no regions table found", arguments=arguments, regions=folder)
    refused(USAGE, "--out", arguments=("--bundle", desk.bundle), regions=folder)


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_any_folder_in_place_of_the_regions_is_no_bug(place, desk, topt_run, monkeypatch):
    monkeypatch.chdir(desk.folder.parent)
    said = topt_run("predict", place)
    assert said.code in (BAD_DATA, NO_INPUT), said
    assert said.err.startswith("error: ")


def test_no_regions_file(desk, refused):
    refused(NO_INPUT, "nowhere.parquet", "no such file", regions=desk.folder / "nowhere.parquet")


def test_no_mobility_file(desk, refused):
    desk.mobility.unlink()
    refused(NO_INPUT, "no mobility table was given", "origin_id, dest_id, flow", "--mobility")


def test_no_such_mobility_file(desk, refused):
    refused(NO_INPUT, "nowhere.parquet", "no such file", arguments=("--mobility", desk.folder / "nowhere.parquet"))


def test_no_bundle(desk, refused, monkeypatch):
    monkeypatch.delenv("TOPT_BUNDLE", raising=False)
    desk.bundle.rename(desk.folder / "elsewhere.topt")
    refused(NO_INPUT, "no bundle", "model.topt", "$TOPT_BUNDLE", "topt-deploy export", "--bundle")


def test_no_such_bundle(desk, refused):
    refused(NO_INPUT, "nowhere.topt", "no such bundle", arguments=("--bundle", desk.folder / "nowhere.topt"))


def test_a_task_that_the_bundle_lacks(desk, refused):
    arguments = ("--task", "crime", "--task", "theft")
    refused(USAGE, "does not predict 'theft'", "crime, check_in, service_call", arguments=arguments)


def test_an_unknown_map_format(desk, refused):
    refused(USAGE, "unknown map format", ".gpkg or .geojson", arguments=("--geo", desk.folder / "map.shp"))


def test_absurd_counts_are_predicted_or_refused_and_never_a_bug(desk, topt_run):
    table = pq.read_table(desk.regions)
    for absurd in (1e30, 1e308):
        pq.write_table(replaced(table, poi_food=[absurd] * len(table)), desk.regions)
        said = topt_run("predict", desk.regions)
        assert said.code in (0, BAD_DATA), said.err
        if said.code == 0:
            assert np.isfinite(pq.read_table(desk.out).column("prediction").to_numpy()).all()


@pytest.mark.parametrize(
    ("spoil", "code", "part"),
    [
        (lambda desk: desk.regions.unlink(), NO_INPUT, "no such file"),
        (lambda desk: desk.mobility.unlink(), NO_INPUT, "no mobility table was given"),
        (lambda desk: desk.regions.write_bytes(b"PAR1"), BAD_DATA, "not a whole Parquet file"),
    ],
)
def test_the_whole_command_ends_the_same_way(spoil, code, part, desk):
    """The others call the command within this process; these show that the process itself ends so."""
    spoil(desk)
    before = desk.state()
    said = shell("topt-run predict regions.parquet", desk.folder)
    assert said.code == code
    assert said.out == ""
    assert part in said.err
    assert "Traceback" not in said.err
    assert desk.state() == before
