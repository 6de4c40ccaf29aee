"""Single bad rows: refused, masked or left out, and each time predicted as if someone had mended the table by hand."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import fixed_lists, replaced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DONE, USAGE, PARTIAL, BAD_DATA = 0, 2, 3, 65
POI = ["food", "retail", "office", "school", "health", "nightlife", "park", "transit"]
POI += ["worship", "hotel", "warehouse", "parking"]


def changed(table, column, **rows):
    """``table`` with values of one column changed, by row (``_3=None``), and its type with them where needed."""
    values = table.column(column).to_pylist()
    for row, value in rows.items():
        values[int(row[1:])] = value
    return replaced(table, **{column: values})


def listed(table, view="poi", names=POI):
    """A view's columns as one list column with named categories."""
    values = np.stack([table.column(f"{view}_{name}").to_numpy() for name in names], axis=1)
    array = pa.array(values.tolist(), pa.list_(pa.float64()))
    field = pa.field(view, array.type, metadata={"categories": json.dumps(names)})
    return table.drop_columns([f"{view}_{name}" for name in names]).append_column(field, array)


def with_lists(column, change, kind=None):
    """Change the lists of a column, given as a Python list."""
    kind = kind or pa.float64()

    def spoil(table):
        lists = table.column(column).to_pylist()
        change(lists)
        place = table.schema.get_field_index(column)
        field = table.schema.field(place).with_type(pa.list_(kind))
        return table.set_column(place, field, pa.array(lists, field.type))

    return spoil


def shorten(lists):
    lists[4] = lists[4][:-1]


def clear(lists):
    lists[4] = None


def put(value, lists):
    lists[4][7] = value


def bare(table):
    """Positions from the geometry alone."""
    return table.drop_columns(["lon", "lat"])


@dataclass(frozen=True)
class Case:
    """A table's single bad rows.

    Attributes:
        spoil: Makes them, in the regions table.
        code, rows: What is found.
        fill: Columns that a median stands in for; none where nothing can.
        column: What the reason names.
    """

    spoil: object
    code: str
    rows: tuple[int, ...]
    column: str
    fill: tuple[str, ...] = ()


CASES = {
    "null id": Case(lambda t: changed(t, "region_id", _3=None, _9="  "), "missing_id", (3, 9), "region_id"),
    "duplicate ids": Case(
        lambda t: changed(t, "region_id", _3="D001", _9="D006"), "duplicate_id", (0, 3, 5, 9), "region_id"
    ),
    "null count": Case(
        lambda t: changed(t, "poi_food", _5=None, _6=None), "missing_value", (5, 6), "poi_food", ("poi_food",)
    ),
    "null position": Case(lambda t: changed(t, "lat", _5=None), "missing_value", (5,), "lat", ("lat",)),
    "negative count": Case(lambda t: changed(t, "poi_food", _5=-3), "bad_count", (5,), "poi_food", ("poi_food",)),
    "NaN and infinite counts": Case(
        lambda t: changed(t, "land_use_green", _5=float("nan"), _0=float("inf")),
        "bad_count", (0, 5), "land_use_green", ("land_use_green",),
    ),
    "metres": Case(lambda t: changed(t, "lat", _5=4.6e6), "bad_position", (5,), "lon, lat", ("lon", "lat")),
    "metres in the geometry": Case(
        lambda t: bare(changed(t, "geometry", _5=point(5e5, 4.6e6))), "bad_position", (5,), "lon, lat"
    ),
    "no shape": Case(
        lambda t: bare(changed(t, "geometry", _5=None, _7=b"no WKB")), "bad_geometry", (5, 7), "geometry"
    ),
    "negative in a list view": Case(
        lambda t: with_lists("poi", partial(put, -1.0))(listed(t)), "bad_count", (4,), "poi[transit]", ("poi",)
    ),
    "null in a list view": Case(
        lambda t: with_lists("poi", partial(put, None))(listed(t)), "missing_value", (4,), "poi", ("poi",)
    ),
    "short list view": Case(
        lambda t: with_lists("poi", shorten)(listed(t)), "bad_list", (4,), "poi", ("poi",)
    ),
    "list view of integers": Case(
        lambda t: with_lists("poi", clear, pa.int64())(listed(t)), "bad_list", (4,), "poi", ("poi",)
    ),
    "null prompt": Case(with_lists("prompt_crime", clear), "bad_list", (4,), "prompt_crime", ("prompt_crime",)),
    "short prompt": Case(with_lists("prompt_crime", shorten), "bad_list", (4,), "prompt_crime", ("prompt_crime",)),
    "NaN in a prompt": Case(
        with_lists("prompt_crime", partial(put, float("nan")), pa.float32()),
        "not_finite", (4,), "prompt_crime", ("prompt_crime",),
    ),
    "null in a prompt": Case(
        with_lists("prompt_crime", partial(put, None)), "missing_value", (4,), "prompt_crime", ("prompt_crime",)
    ),
}  # fmt: skip
MASKABLE = [name for name, case in CASES.items() if case.fill]


def point(lon, lat):
    import shapely

    return shapely.to_wkb(shapely.Point(lon, lat))


def without(regions, mobility, rows):
    """The tables with these regions and all their flows left out, by Arrow's own means."""
    kept = np.setdiff1d(np.arange(len(regions)), list(rows))
    regions = regions.take(pa.array(kept))
    ids = set(regions.column("region_id").to_pylist())
    ends = zip(mobility.column("origin_id").to_pylist(), mobility.column("dest_id").to_pylist(), strict=True)
    return regions, mobility.filter(pa.array([{a, b} <= ids for a, b in ends]))


def with_medians(table, columns, rows):
    """The table with the median of the other rows, computed column by column, in these."""
    for column in columns:
        values = table.column(column).to_pylist()
        others = [value for row, value in enumerate(values) if row not in rows]
        if isinstance(others[0], list):
            stand_in = [float(np.median(entry)) for entry in zip(*others, strict=True)]
            kind = pa.list_(pa.float32() if column.startswith("prompt_") else pa.float64())
        else:
            stand_in, kind = float(np.median(others)), pa.float64()
        filled = pa.array([stand_in if row in rows else value for row, value in enumerate(values)], kind)
        place = table.schema.get_field_index(column)
        table = table.set_column(place, table.schema.field(place).with_type(kind), filled)
    return table


@pytest.fixture
def predicted(topt_run, demo_bundle):
    """Predict a folder with these options, which must end with ``code``: its predictions, receipt and what was said."""

    def call(folder: Path, *options, code=DONE):
        said = topt_run("predict", folder, "--bundle", demo_bundle, *options)
        assert said.code == code, said
        out = folder / "predictions.parquet"
        return pq.read_table(out), json.loads((folder / "predictions.receipt.json").read_text()), said

    return call


@pytest.fixture
def tables(demo_bundle):
    return tuple(pq.read_table(demo_bundle.with_name(f"{name}.parquet")) for name in ("regions", "mobility"))


@pytest.fixture
def write(tmp_path):
    """Write a city's tables into a folder of this name."""

    def call(name, regions, mobility):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        pq.write_table(regions, folder / "regions.parquet")
        pq.write_table(mobility, folder / "mobility.parquet")
        return folder

    return call


def aside(folder, table=""):
    return folder / f"predictions.quarantine{table}.parquet"


def recorded(file, rows):
    """What the receipt says of it."""
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "rows": rows}


def check_aside(given, found, rows, code):
    """The rows as they stood in their table, and why."""
    assert found.column_names == [*given.column_names, "row", "reason_code", "reason"]
    assert found.column("row").to_pylist() == list(rows)
    assert set(found.column("reason_code").to_pylist()) == {code}
    assert all(found.column("reason").to_pylist())
    # As Python values, written out, for a NaN is not equal to itself.
    assert repr(found.select(given.column_names).to_pylist()) == repr(given.take(pa.array(rows)).to_pylist())


@pytest.mark.parametrize("name", CASES)
def test_by_default_the_city_is_refused(name, tables, write, topt_run, demo_bundle):
    case, (regions, mobility) = CASES[name], tables
    folder = write("city", case.spoil(regions), mobility)
    for options in ((), ("--on-bad-row", "fail")):
        said = topt_run("predict", folder, "--bundle", demo_bundle, "--log-format", "json", *options)
        assert said.code == BAD_DATA
        facts = json.loads(said.err)
        assert facts["code"] == case.code
        assert facts["column"] == case.column
        assert sorted(path.name for path in folder.iterdir()) == ["mobility.parquet", "regions.parquet"]


@pytest.mark.parametrize("name", CASES)
def test_quarantine_predicts_what_is_left_as_if_there_were_no_more(name, tables, write, predicted):
    case, (regions, mobility) = CASES[name], tables
    spoilt = case.spoil(regions)
    folder = write("city", spoilt, mobility)
    table, receipt, said = predicted(folder, "--on-bad-row", "quarantine", code=PARTIAL)
    by_hand = write("by hand", *without(spoilt, mobility, case.rows))
    expected, _, _ = predicted(by_hand)
    assert len(expected) == 3 * (77 - len(case.rows))
    assert table.equals(expected, check_metadata=True)
    assert (folder / "predictions.parquet").read_bytes() == (by_hand / "predictions.parquet").read_bytes()

    check_aside(spoilt, pq.read_table(aside(folder)), case.rows, case.code)
    flows = pq.read_table(aside(folder, "_mobility"))
    assert len(flows) == len(mobility) - len(pq.read_table(by_hand / "mobility.parquet"))
    rows = flows.column("row").to_pylist()
    assert len(set(rows)) == len(rows)
    assert flows.select(mobility.column_names).to_pylist() == mobility.take(pa.array(rows)).to_pylist()
    assert receipt["set_aside"] == {
        "regions": recorded(aside(folder), {case.code: len(case.rows)}),
        "mobility": recorded(aside(folder, "_mobility"), {"unknown_region": len(flows)}),
    }
    assert f"{aside(folder)}: {len(case.rows)} {case.code}" in said.out


@pytest.mark.parametrize("name", MASKABLE)
def test_mask_predicts_the_others_as_if_the_median_stood_there(name, tables, write, predicted):
    case, (regions, mobility) = CASES[name], tables
    spoilt = case.spoil(regions)
    folder = write("city", spoilt, mobility)
    table, receipt, _ = predicted(folder, "--on-bad-row", "mask", code=PARTIAL)
    expected, _, _ = predicted(write("by hand", with_medians(spoilt, case.fill, case.rows), mobility))
    ids = regions.column("region_id").to_pylist()
    bad = {ids[row] for row in case.rows}
    assert table.column("region_id").to_pylist() == ids * 3
    for row, other in zip(table.to_pylist(), expected.to_pylist(), strict=True):
        if row["region_id"] in bad:
            assert (row["prediction"], row["lower"], row["upper"], row["status"]) == (None, None, None, "masked")
            assert case.column in row["reason"]
            row |= {key: other[key] for key in ("prediction", "lower", "upper", "status", "reason")}
        assert row == other
    check_aside(spoilt, pq.read_table(aside(folder)), case.rows, case.code)
    assert not aside(folder, "_mobility").exists()
    assert receipt["set_aside"] == {"regions": recorded(aside(folder), {case.code: len(case.rows)})}
    assert receipt["status"]["masked"] == 3 * len(case.rows)


@pytest.mark.parametrize("name", sorted(set(CASES) - set(MASKABLE)))
def test_what_cannot_be_masked_is_refused_with_the_way_out(name, tables, write, topt_run, demo_bundle):
    case, (regions, mobility) = CASES[name], tables
    folder = write("city", case.spoil(regions), mobility)
    said = topt_run("predict", folder, "--bundle", demo_bundle, "--on-bad-row", "mask")
    assert said.code == BAD_DATA
    assert "there is no neutral value to replace it" in said.err
    assert "--on-bad-row quarantine" in said.err
    assert not aside(folder).exists()


MOBILITY = {
    "unknown regions": (
        lambda t: changed(changed(t, "origin_id", _0="X9"), "dest_id", _7="X8"), {"unknown_region": [0, 7]},
    ),
    "null ends": (
        lambda t: changed(changed(t, "origin_id", _3=None), "dest_id", _3=None), {"unknown_region": [3]},
    ),
    "bad flows": (
        lambda t: changed(t, "flow", _2=-1.0, _4=float("nan"), _6=None, _8=float("inf")),
        {"missing_value": [6], "bad_count": [2, 4, 8]},
    ),
    "bad targets": (
        lambda t: changed(t.append_column("target_flow", t.column("flow")), "target_flow", _5=-1), {"bad_count": [5]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("policy", ["mask", "quarantine"])
@pytest.mark.parametrize("name", MOBILITY)
def test_a_bad_flow_is_left_out_by_either_policy(name, policy, tables, write, predicted, topt_run, demo_bundle):
    (spoil, codes), (regions, mobility) = MOBILITY[name], tables
    spoilt = spoil(mobility)
    bad = [row for rows in codes.values() for row in rows]
    folder = write("city", regions, spoilt)
    assert topt_run("predict", folder, "--bundle", demo_bundle).code == BAD_DATA
    table, receipt, _ = predicted(folder, "--on-bad-row", policy, code=PARTIAL)
    kept = spoilt.take(pa.array(np.setdiff1d(np.arange(len(spoilt)), bad)))
    assert table.equals(predicted(write("by hand", regions, kept))[0])
    assert len(table) == 231
    found = pq.read_table(aside(folder, "_mobility"))
    assert found.column("row").to_pylist() == bad
    assert found.column("reason_code").to_pylist() == [code for code, rows in codes.items() for _ in rows]
    given = spoilt.take(pa.array(bad)).to_pylist()
    assert repr(found.select(spoilt.column_names).to_pylist()) == repr(given)
    assert receipt["set_aside"]["mobility"]["rows"] == {code: len(rows) for code, rows in codes.items()}
    assert not aside(folder).exists()


def test_rows_of_a_mobility_table_of_several_cities_are_counted_in_the_file(tables, write, predicted):
    regions, mobility = tables
    others = replaced(mobility, city_id=["elsewhere"] * len(mobility), origin_id=["X"] * len(mobility))
    spoilt = changed(mobility, "flow", _2=-1)
    folder = write("city", regions, pa.concat_tables([others, spoilt, others]))
    table, _, _ = predicted(folder, "--on-bad-row", "quarantine", code=PARTIAL)
    found = pq.read_table(aside(folder, "_mobility"))
    assert found.column("row").to_pylist() == [len(others) + 2]
    assert found.column("city_id").to_pylist() == ["synthetic-demo"]
    kept = mobility.take(pa.array(np.setdiff1d(np.arange(len(mobility)), [2])))
    assert table.equals(predicted(write("by hand", regions, kept))[0])


def test_several_reasons_at_once(tables, write, predicted):
    """Row by row the reasons are those of one run after the other, each on what the last one left."""
    regions, mobility = tables
    spoilt = changed(changed(changed(regions, "region_id", _3=None), "poi_food", _5=-1, _3=-1), "lat", _8=91.0)
    folder = write("city", spoilt, mobility)
    table, receipt, _ = predicted(folder, "--on-bad-row", "quarantine", code=PARTIAL)
    assert receipt["set_aside"]["regions"]["rows"] == {"bad_count": 1, "bad_position": 1, "missing_id": 1}
    found = {row["row"]: row["reason_code"] for row in pq.read_table(aside(folder)).to_pylist()}
    assert found == {3: "missing_id", 5: "bad_count", 8: "bad_position"}
    assert table.equals(predicted(write("by hand", *without(spoilt, mobility, (3, 5, 8))))[0])


def test_two_kinds_of_bad_values_in_one_column_get_the_median_of_the_good_ones(tables, write, predicted):
    """Neither is part of the other's median, and a stand-in is not taken for a bad value itself."""
    regions, mobility = tables
    spoilt = changed(regions, "poi_food", _3=None, _5=float("nan"), _7=-1e9)
    folder = write("city", spoilt, mobility)
    table, receipt, _ = predicted(folder, "--on-bad-row", "mask", code=PARTIAL)
    expected, _, _ = predicted(write("by hand", with_medians(spoilt, ["poi_food"], (3, 5, 7)), mobility))
    assert receipt["set_aside"]["regions"]["rows"] == {"missing_value": 1, "bad_count": 2}
    bad = {"D004", "D006", "D008"}
    for row, other in zip(table.to_pylist(), expected.to_pylist(), strict=True):
        assert row == other if row["region_id"] not in bad else row["prediction"] is None
    reasons = {row["region_id"]: row["reason"] for row in table.to_pylist() if row["region_id"] in bad}
    assert reasons["D004"] == "column 'poi_food': values are missing"


def test_a_region_that_is_bad_twice_says_so_twice(tables, write, predicted):
    regions, mobility = tables
    folder = write("city", changed(changed(regions, "poi_food", _5=None), "lat", _5=91.0), mobility)
    table, receipt, _ = predicted(folder, "--on-bad-row", "mask", "--wide", code=PARTIAL)
    (row,) = [row for row in table.to_pylist() if row["status"] == "masked"]
    assert row["region_id"] == "D006"
    assert "lon, lat" in row["reason"]
    assert "poi_food" in row["reason"]
    assert {row[task] for task in ("crime", "check_in", "service_call")} == {None}
    assert pq.read_table(aside(folder)).column("row").to_pylist() == [5, 5]
    assert receipt["set_aside"]["regions"]["rows"] == {"bad_position": 1, "missing_value": 1}


@pytest.mark.parametrize("policy", ["mask", "quarantine"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: replaced(t, poi_food=[-1] * len(t)),
        lambda t: replaced(t, region_id=["D001"] * len(t)),
        lambda t: replaced(t, poi_food=[-1] * 40 + [1] * 37, poi_hotel=[1] * 40 + [None] * 37),
    ],
)
def test_where_no_row_is_good_the_city_is_refused(spoil, policy, tables, write, topt_run, demo_bundle):
    regions, mobility = tables
    folder = write("city", spoil(regions), mobility)
    said = topt_run("predict", folder, "--bundle", demo_bundle, "--on-bad-row", policy)
    assert said.code == BAD_DATA, said
    assert said.err.startswith("error: ")
    assert sorted(path.name for path in folder.iterdir()) == ["mobility.parquet", "regions.parquet"]


@pytest.mark.parametrize("policy", ["mask", "quarantine"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.drop_columns("poi_food"),
        lambda t: replaced(t, poi_food=["many"] * len(t)),
        lambda t: replaced(t, region_id=list(range(len(t)))),
        lambda t: replaced(t, prompt_crime=fixed_lists(np.zeros((len(t), 3)))),
        lambda t: replaced(t, prompt_crime=pa.array([["a"] * 256] * (len(t) - 1) + [["a"]])),
        lambda t: t.slice(0, 0),
    ],
)
def test_what_is_wrong_with_the_table_is_no_matter_of_rows(spoil, policy, tables, write, topt_run, demo_bundle):
    regions, mobility = tables
    folder = write("city", spoil(regions), mobility)
    said = topt_run("predict", folder, "--bundle", demo_bundle, "--on-bad-row", policy)
    assert said.code == BAD_DATA, said


def test_a_clean_run_removes_what_an_earlier_one_set_aside(tables, write, predicted):
    regions, mobility = tables
    folder = write("city", changed(regions, "poi_food", _5=-3), mobility)
    predicted(folder, "--on-bad-row", "quarantine", code=PARTIAL)
    assert aside(folder).exists()
    assert aside(folder, "_mobility").exists()
    predicted(folder, "--on-bad-row", "mask", code=PARTIAL)
    assert aside(folder).exists()
    assert not aside(folder, "_mobility").exists(), "masked regions keep their flows"
    pq.write_table(regions, folder / "regions.parquet")
    _, receipt, _ = predicted(folder, "--on-bad-row", "quarantine")
    assert receipt["set_aside"] == {}
    assert not aside(folder).exists()


@pytest.mark.parametrize("policy", ["mask", "quarantine"])
def test_nothing_is_set_aside_of_a_sound_city(policy, tables, write, predicted):
    folder = write("city", *tables)
    before, _, _ = predicted(folder)
    table, receipt, _ = predicted(folder, "--on-bad-row", policy)
    assert table.equals(before)
    assert receipt["set_aside"] == {}
    assert receipt["options"]["on_bad_row"] == policy


@pytest.mark.parametrize("policy", ["mask", "quarantine"])
def test_a_city_named_by_its_folder_keeps_its_name(policy, tables, write, predicted):
    regions, mobility = tables
    regions = changed(regions, "poi_food", _5=-3).drop_columns("city_id")
    folder = write("city=Oslo", regions, replaced(mobility, city_id=["Oslo"] * len(mobility)))
    table, _, _ = predicted(folder, "--on-bad-row", policy, code=PARTIAL)
    assert set(table.column("city_id").to_pylist()) == {"Oslo"}


@pytest.mark.parametrize("policy", ["mask", "quarantine"])
def test_a_map_has_the_regions_that_the_predictions_have(policy, tables, write, predicted):
    pyogrio = pytest.importorskip("pyogrio", reason="needs the geo extra")
    regions, mobility = tables
    folder = write("city", changed(regions, "poi_food", _5=-3), mobility)
    table, _, _ = predicted(folder, "--on-bad-row", policy, "--wide", "--geo", folder / "map.gpkg", code=PARTIAL)
    _, features = pyogrio.read_arrow(folder / "map.gpkg")
    assert features.column("region_id").to_pylist() == table.column("region_id").to_pylist()
    assert features.column("crime").to_pylist() == table.column("crime").to_pylist()
    assert ("D006" in features.column("region_id").to_pylist()) == (policy == "mask")


@pytest.fixture(scope="module")
def predictor(demo_bundle):
    from topt_deploy.runtime import load

    return load(demo_bundle, threads=1)


BAD = st.sampled_from([None, float("nan"), float("inf"), -1.0, -1e300])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spots=st.dictionaries(
        st.tuples(st.integers(0, 76), st.sampled_from(["poi_food", "land_use_green", "lon", "lat"])), BAD, max_size=30
    )
)
def test_any_bad_values_anywhere(spots, tables, predictor):
    """Left out or masked, the rows are those that hold a bad value; the oracles are as above."""
    regions, mobility = tables
    for column in {column for _, column in spots}:
        values = regions.column(column).to_pylist()
        for (row, where), value in spots.items():
            if where == column:
                # Negative degrees are degrees.
                values[row] = 1e9 if column in ("lon", "lat") and value == -1.0 else value
        regions = replaced(regions, **{column: pa.array(values, pa.float64())})
    bad = sorted({row for row, _ in spots})
    found = predictor.predictions(regions, mobility, on_bad_row="quarantine")
    assert sorted({row for part in found.sieve.aside["regions"] for row in part.rows.tolist()}) == bad
    assert found.long().equals(predictor.predict(*without(regions, mobility, bad)))

    found = predictor.predictions(regions, mobility, on_bad_row="mask")
    assert sorted(found.sieve.masked) == bad
    # A position is masked as a whole where either number is no degree, and a null alone where it is null.
    rows = found.wide().column("status").to_pylist()
    assert [row for row, status in enumerate(rows) if status == "masked"] == bad
    numbers = found.wide().column("crime").to_pylist()
    assert [row for row, number in enumerate(numbers) if number is None] == bad
