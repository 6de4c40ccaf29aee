import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import LAND_USE, POI, fixed_lists, replaced, tiny_city_tables
from hypothesis import given, settings
from hypothesis import strategies as st

from topt_deploy.data.city import Schema, infer_schema, read_city
from topt_deploy.data.parquet import read_parquet
from topt_deploy.errors import BadData, Exit, NoInput, NoPermission
from topt_deploy.storage.hashed_file import Held

N = 12
VIEWS = {"poi": POI, "land_use": LAND_USE}
SCHEMA = Schema(views=VIEWS, mobility=True)
COUNTS = Schema(views=VIEWS, mobility=False)
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def tables():
    return tiny_city_tables(N)


@pytest.fixture
def regions(tables):
    return tables[0]


def at(row, value, n=N, fill=1.0):
    """n values that are ``fill`` but for one."""
    values = [fill] * n
    values[row] = value
    return values


def same(a, b):
    """Whether two cities agree bit for bit, wherever their rows came from."""
    arrays = [
        (a.region_id, b.region_id),
        (a.lonlat, b.lonlat),
        *((a.views[view], b.views[view]) for view in {**a.views, **b.views}),
        *((a.prompts[c], b.prompts[c]) for c in {**a.prompts, **b.prompts}),
        *((a.labels[t], b.labels[t]) for t in {**a.labels, **b.labels}),
    ]
    if a.flows is not None or b.flows is not None:
        arrays += [(getattr(a.flows, f), getattr(b.flows, f)) for f in ("origin", "dest", "flow", "target")]
    return a.city_id == b.city_id and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in arrays
    )


class TestReading:
    def test_regions_are_sorted_by_id_with_all_that_belongs_to_them(self, tables):
        regions, mobility = tables
        regions = replaced(regions, prompt_x=fixed_lists(np.arange(N * 3).reshape(N, 3)))
        schema = Schema(views=VIEWS, mobility=True, prompts={"prompt_x": 3})
        city = read_city(regions, mobility, schema, labels=("crime", "calls"))
        assert len(city) == N
        assert city.region_id.tolist() == sorted(regions["region_id"].to_pylist()) != regions["region_id"].to_pylist()
        rows = {row["region_id"]: row for row in regions.to_pylist()}
        for i, region in enumerate(city.region_id):
            row = rows[region]
            assert city.lonlat[i].tolist() == [row["lon"], row["lat"]]
            assert city.views["poi"][i].tolist() == [row[f"poi_{name}"] for name in POI]
            assert city.views["land_use"][i].tolist() == [row[f"land_use_{name}"] for name in LAND_USE]
            assert city.prompts["prompt_x"][i].tolist() == row["prompt_x"]
            assert city.labels["crime"][i] == row["crime"]
            assert regions["region_id"][city.input_row[i]].as_py() == region
        assert city.views["poi"].dtype == city.lonlat.dtype == np.float64
        assert city.prompts["prompt_x"].dtype == np.float32

    def test_flows_point_at_sorted_regions(self, tables):
        regions, mobility = tables
        city = read_city(regions, mobility, SCHEMA)
        expected = {(r["origin_id"], r["dest_id"]): r["flow"] for r in mobility.to_pylist()}
        ids = city.region_id
        found = {
            (str(ids[o]), str(ids[d])): flow
            for o, d, flow in zip(city.flows.origin, city.flows.dest, city.flows.flow, strict=True)
        }
        assert found == expected
        pairs = list(zip(city.flows.origin, city.flows.dest, strict=True))
        assert pairs == sorted(pairs)

    @settings(max_examples=15, derandomize=True, deadline=None)
    @given(st.integers(0, 10_000))
    def test_the_order_of_rows_and_columns_changes_no_bit(self, seed):
        rng = np.random.default_rng(seed)
        regions, mobility = tiny_city_tables(N, lists=seed % 2 == 0, prompts=("prompt_x",))
        # Fractions, and pairs that occur more than once: sums that depend on their order.
        flow = rng.uniform(0, 1, 3 * len(mobility)) ** 9
        mobility = replaced(pa.concat_tables([mobility] * 3), flow=flow, target_flow=flow[::-1])
        schema = Schema(views=VIEWS, mobility=True, prompts={"prompt_x": 10})
        expected = read_city(regions, mobility, schema, labels=("crime",))
        columns = list(rng.permutation(regions.column_names))
        shuffled = regions.take(rng.permutation(N)).select(columns)
        flows = mobility.take(rng.permutation(len(mobility))).select(list(rng.permutation(mobility.column_names)))
        assert same(read_city(shuffled, flows, schema, labels=("crime",)), expected)

    def test_files_give_what_tables_give(self, tables, tmp_path):
        for name, table in zip(("r", "m"), tables, strict=True):
            pq.write_table(table, tmp_path / name, row_group_size=5)
        read = read_city(tmp_path / "r", tmp_path / "m", SCHEMA, labels=("crime",))
        assert same(read, read_city(*tables, SCHEMA, labels=("crime",)))

    @pytest.mark.parametrize("lists", [False, True])
    def test_chunks_and_slices_change_nothing(self, lists):
        regions, mobility = tiny_city_tables(N, lists=lists, prompts=("prompt_x",))
        schema = Schema(views=VIEWS, mobility=True, prompts={"prompt_x": 10})
        expected = read_city(regions, mobility, schema)
        pieces = pa.concat_tables([regions.slice(0, 1), regions.slice(1, 7), regions.slice(8)])
        assert same(read_city(pieces, mobility, schema), expected)
        longer = pa.concat_tables([regions, regions]).combine_chunks().slice(N)
        assert same(read_city(longer, mobility, schema), expected)

    def test_other_columns_are_neither_needed_nor_read(self, regions, tmp_path):
        pq.write_table(replaced(regions, text=["long"] * N, images=[["a.png"]] * N), tmp_path / "r")
        assert read_parquet(tmp_path / "r", ["region_id", "none"]).column_names == ["region_id"]
        assert read_parquet(tmp_path / "r").column_names[-1] == "images"
        assert same(read_city(tmp_path / "r", None, COUNTS), read_city(regions, None, COUNTS))

    @pytest.mark.parametrize(
        "kind", [pa.int8(), pa.int64(), pa.uint16(), pa.float32(), pa.float64(), pa.decimal128(9, 2)], ids=str
    )
    def test_counts_of_every_numeric_kind(self, regions, kind):
        values = list(range(N))
        counts = pa.array([Decimal(v) for v in values] if pa.types.is_decimal(kind) else values, kind)
        city = read_city(replaced(regions, poi_bar=counts), None, COUNTS)
        assert city.views["poi"][:, 0].tolist() == [values[row] for row in city.input_row]

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
    def test_ids_of_every_text_kind(self, tables, kind):
        regions, mobility = tables
        ids = regions["region_id"].cast(kind)
        flows = replaced(mobility, origin_id=mobility["origin_id"].cast(kind))
        assert same(read_city(replaced(regions, region_id=ids), flows, SCHEMA), read_city(*tables, SCHEMA))

    def test_another_id_column(self, regions):
        renamed = regions.rename_columns({"region_id": "GEOID"})
        assert same(read_city(renamed, None, COUNTS, id_col="GEOID"), read_city(regions, None, COUNTS))

    def test_leading_zeros_stay(self, regions):
        city = read_city(replaced(regions, region_id=[f"0{i:02d}" for i in range(N)]), None, COUNTS)
        assert city.region_id[1] == "001"

    def test_null_labels_are_nan_and_zero_is_a_label(self, regions):
        labels = at(3, None, fill=0)
        city = read_city(replaced(regions, crime=labels), None, COUNTS, labels=("crime",))
        unknown = np.isnan(city.labels["crime"])
        assert city.input_row[unknown].tolist() == [3]
        assert (city.labels["crime"][~unknown] == 0).all()

    def test_predicting_needs_no_labels(self, regions):
        city = read_city(regions.drop_columns(["crime", "calls"]), None, COUNTS)
        assert city.labels == {}


class TestCityId:
    def test_from_the_column(self, regions):
        assert read_city(replaced(regions, city_id=["chicago"] * N), None, COUNTS).city_id == "chicago"
        assert read_city(regions, None, COUNTS).city_id is None

    def test_from_a_folder(self, regions, tmp_path):
        folder = tmp_path / "city=new york" / "2024"
        folder.mkdir(parents=True)
        pq.write_table(regions, folder / "r.parquet")
        assert read_city(folder / "r.parquet", None, COUNTS).city_id == "new york"

    def test_other_cities_flows_are_left_out(self, tables):
        regions, mobility = tables
        mine = replaced(mobility, city_id=["a"] * len(mobility))
        other = replaced(mobility, city_id=["b"] * len(mobility), origin_id=["elsewhere"] * len(mobility))
        here = replaced(regions, city_id=["a"] * N)
        both = read_city(here, pa.concat_tables([other.select(mine.column_names), mine]), SCHEMA)
        assert same(both, read_city(here, mine, SCHEMA))


class TestViews:
    def test_lists_and_columns_are_the_same(self):
        wide, mobility = tiny_city_tables(N)
        lists, _ = tiny_city_tables(N, lists=True)
        schema = infer_schema(wide, views=("poi", "land_use"), mobility=True)
        assert same(read_city(lists, mobility, schema), read_city(wide, mobility, schema))

    def test_named_lists_in_another_order_are_put_in_order(self):
        lists, _ = tiny_city_tables(N, lists=True)
        expected = read_city(lists, None, COUNTS)
        order = [2, 0, 3, 1]
        poi = np.array(lists["poi"].to_pylist())[:, order]
        names = str([POI[i] for i in order]).replace("'", '"')
        table = replaced(lists, poi=fixed_lists(poi))
        fields = [
            f.with_metadata({"categories": names}) if f.name == "poi" else lists.schema.field(f.name)
            for f in table.schema
        ]
        assert same(read_city(table.cast(pa.schema(fields)), None, COUNTS), expected)

    def test_lists_of_every_kind(self):
        lists, _ = tiny_city_tables(N, lists=True)
        expected = read_city(lists, None, COUNTS)
        values = lists["poi"].to_pylist()
        for kind in (pa.list_(pa.float64()), pa.large_list(pa.int32()), pa.list_(pa.int64(), 4)):
            column = pa.array([[int(v) for v in row] for row in values], kind)
            place = lists.schema.get_field_index("poi")
            table = lists.set_column(place, lists.schema.field("poi").with_type(kind), column)
            assert same(read_city(table, None, COUNTS), expected)

    def test_lists_have_names(self):
        lists, _ = tiny_city_tables(N, lists=True)
        assert infer_schema(lists, views=("poi",), mobility=False).views == {"poi": POI}

    def test_columns_are_named_and_sorted(self, regions):
        order = regions.column_names[::-1]
        schema = infer_schema(regions.select(order), views=("land_use", "poi"), mobility=True)
        assert schema.views == {"land_use": LAND_USE, "poi": tuple(sorted(POI))}
        assert list(schema.views) == ["land_use", "poi"]
        assert schema.mobility

    def test_columns_go_by_name_not_position(self, regions):
        schema = Schema(views={"poi": POI[::-1]}, mobility=False)
        city = read_city(regions, None, schema)
        assert city.views["poi"][:, 0].tolist() == [regions[f"poi_{POI[-1]}"][row].as_py() for row in city.input_row]

    def test_prompt_widths_are_read_off(self):
        regions, _ = tiny_city_tables(N, prompts=("prompt_a", "prompt_b"), prompt_width=7)
        schema = infer_schema(regions, views=("poi",), mobility=False, prompts=("prompt_b",))
        assert schema.prompts == {"prompt_b": 7}


class TestFlows:
    def test_pairs_that_occur_twice_are_summed(self, regions):
        flows = {"origin_id": ["001", "000", "001"], "dest_id": ["002", "000", "002"], "flow": [1.5, 4, 2]}
        city = read_city(regions, pa.table(flows), SCHEMA)
        assert city.flows.origin.tolist() == [0, 1]
        assert city.flows.dest.tolist() == [0, 2]
        assert city.flows.flow.tolist() == [4, 3.5]
        assert city.flows.target.tolist() == [4, 3.5]

    def test_the_target_may_differ(self, regions):
        flows = {"origin_id": ["001"] * 2, "dest_id": ["002"] * 2, "flow": [1, 2], "target_flow": [10, 20]}
        city = read_city(regions, pa.table(flows), SCHEMA)
        assert (city.flows.flow.tolist(), city.flows.target.tolist()) == ([3], [30])

    @pytest.mark.parametrize(
        "names",
        [("h_geocode", "w_geocode", "S000"), ("PULocationID", "DOLocationID", "flow")],
        ids=["LODES", "TLC"],
    )
    def test_aliases(self, tables, names):
        regions, mobility = tables
        renamed = mobility.rename_columns(dict(zip(("origin_id", "dest_id", "flow"), names, strict=True)))
        assert same(read_city(regions, renamed, SCHEMA), read_city(*tables, SCHEMA))


def refuse(regions, mobility=None, schema=COUNTS, *, parts, kind=BadData, exit_code=Exit.BAD_DATA, **more):
    """The error's text has every part; asked for as the user sees it."""
    with pytest.raises(kind) as caught:
        read_city(regions, mobility, schema, **more)
    assert caught.value.exit_code == exit_code
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    assert "np.str_" not in text
    return caught.value


class TestBadIds:
    def test_no_id_column(self, regions):
        refuse(
            regions.rename_columns({"region_id": "GEOID"}),
            parts=[
                "regions table, column 'region_id'",
                "absent",
                "found:    columns 'GEOID', 'lon'",
                "--id-col",
            ],
        )

    def test_numbers_lose_leading_zeros(self, regions):
        refuse(
            replaced(regions, region_id=list(range(N))),
            parts=[
                "column 'region_id': region ids are not text",
                "expected: string",
                "01073",
                "found:    int64",
            ],
        )

    @pytest.mark.parametrize("blank", [None, "", "  "])
    def test_missing(self, regions, blank):
        error = refuse(
            replaced(regions, region_id=pa.array([blank, *map(str, range(N - 2)), blank])),
            parts=["region ids are missing", "regions:  'row 0', 'row 11'", "expected: an id in every row"],
        )
        assert error.ids == ["row 0", "row 11"]

    def test_duplicates(self, regions):
        ids = ["b", "a", "b", "a", *map(str, range(N - 4))]
        refuse(
            replaced(regions, region_id=ids),
            parts=[
                "occur more than once",
                "regions:  'a', 'b'",
                "expected: each region once",
                "one row per region",
            ],
        )

    def test_only_the_first_few_are_shown_and_all_are_counted(self, regions):
        double = pa.concat_tables([regions, regions])
        refuse(double, parts=["'000', '001', '002', '003', '004' and 7 more (12 in all)"])

    def test_an_empty_table(self, regions):
        refuse(regions.slice(0, 0), parts=["the table is empty", "at least one region", "0 rows"])

    def test_several_cities(self, regions):
        refuse(
            replaced(regions, city_id=["b", *["a"] * (N - 1)]),
            parts=["column 'city_id': holds several cities", "found:    'a', 'b'", "one file per city"],
        )

    def test_the_id_column_twice(self, regions):
        double = pa.table([regions["region_id"], *regions.columns], names=["region_id", *regions.column_names])
        refuse(double, parts=["region_id"])


class TestBadPositions:
    def test_absent(self, regions):
        refuse(
            regions.drop_columns("lat"),
            parts=[
                "positions are absent",
                "expected: columns lon and lat in degrees",
                "found:    columns 'region_id'",
            ],
        )

    @pytest.mark.parametrize(
        ("column", "value"), [("lon", 180.5), ("lon", -181), ("lat", 90.1), ("lat", -412345.0), ("lon", INF)]
    )
    def test_outside_degrees(self, regions, column, value):
        values = regions[column].to_pylist()
        values[4] = value
        region = regions["region_id"][4].as_py()
        refuse(
            replaced(regions, **{column: values}),
            parts=[
                "positions are not degrees",
                f"regions:  '{region}'",
                "[-180, 180]",
                f"{value:g}",
                "CRS84",
            ],
        )

    @pytest.mark.parametrize("column", ["lon", "lat"])
    def test_nan(self, regions, column):
        values = regions[column].to_pylist()
        values[4] = NAN
        refuse(
            replaced(regions, **{column: values}),
            parts=[f"regions:  '{regions['region_id'][4].as_py()}'", "nan"],
        )

    def test_null(self, regions):
        refuse(replaced(regions, lon=at(2, None)), parts=["column 'lon': values are missing", "found:    null"])

    def test_text(self, regions):
        refuse(replaced(regions, lon=["1"] * N), parts=["column 'lon': not a number", "found:    string"])


class TestBadViews:
    @pytest.mark.parametrize(
        ("value", "shown"), [(NAN, "nan"), (INF, "inf"), (-INF, "-inf"), (-1.0, "-1"), (-0.5, "-0.5")]
    )
    def test_a_count_that_is_none(self, regions, value, shown):
        region = regions["region_id"][7].as_py()
        refuse(
            replaced(regions, poi_bar=at(7, value)),
            parts=[
                "regions table, column 'poi_bar': counts must be finite and not negative",
                f"regions:  '{region}'",
                "expected: a number ≥ 0",
                f"found:    {shown}",
                "write 0",
            ],
        )

    def test_a_null_count(self, regions):
        region = regions["region_id"][7].as_py()
        refuse(
            replaced(regions, poi_bar=at(7, None)),
            parts=["column 'poi_bar': values are missing", f"'{region}'", "found:    null", "write 0"],
        )

    @pytest.mark.parametrize("kind", ["text", "flags"])
    def test_a_count_of_another_kind(self, regions, kind):
        values = ["3"] * N if kind == "text" else [True] * N
        refuse(replaced(regions, poi_bar=values), parts=["column 'poi_bar': not a number", "expected: numbers"])

    def test_an_unknown_category(self, regions):
        refuse(
            replaced(regions, poi_zoo=[1] * N),
            parts=[
                "view 'poi'",
                "poi_zoo",
                "expected: 4 categories: 'bar', 'café'",
                "5 categories, with unknown 'zoo'",
            ],
        )

    def test_a_missing_category(self, regions):
        refuse(
            regions.drop_columns("land_use_works"),
            parts=[
                "view 'land_use'",
                "land_use_works",
                "expected: 3 categories",
                "2 categories, without 'works'",
                "a column of zeros",
            ],
        )

    def test_a_renamed_category_names_both_sides(self, regions):
        refuse(regions.rename_columns({"poi_bar": "poi_pub"}), parts=["without 'bar'", "with unknown 'pub'"])

    def test_an_absent_view(self, regions):
        refuse(
            regions.drop_columns([f"poi_{name}" for name in POI]),
            parts=["0 categories", "without 'bar', 'café'"],
        )
        with pytest.raises(BadData, match="view 'zoning' is absent") as caught:
            infer_schema(regions, views=("poi", "zoning"), mobility=False)
        assert "zoning_<category>" in caught.value.expected
        assert "`views`" in caught.value.fix

    @pytest.mark.parametrize(
        ("names", "parts"),
        [
            *((text, ["categor"]) for text in ('["bar"', "3", "[1, 2", '{"a": 1}')),
            ('["a", "b"]', ["expected: 4 names", "found:    2 names"]),
        ],
    )
    def test_category_names_that_are_no_list_or_do_not_fit_the_width(self, names, parts):
        lists, _ = tiny_city_tables(N, lists=True)
        fields = [f.with_metadata({"categories": names}) if f.name == "poi" else f for f in lists.schema]
        refuse(lists.cast(pa.schema(fields)), parts=["column 'poi'", *parts])

    def test_other_names_in_a_list(self):
        lists, _ = tiny_city_tables(N, lists=True)
        schema = Schema(views={"poi": ("bar", "café", "school", "zoo"), "land_use": LAND_USE}, mobility=False)
        refuse(lists, schema=schema, parts=["without 'zoo'", "with unknown 'shop'"])


class TestBadLists:
    PROMPTS = Schema(views={}, mobility=False, prompts={"prompt_x": 4})

    def column(self, regions, values, kind=None):
        return replaced(regions, prompt_x=pa.array(values, kind))

    def all_good_but(self, regions, sixth, kind=None):
        values = [[1.0, 2.0, 3.0, 4.0]] * N
        values[5] = sixth
        return self.column(regions, values, kind)

    def test_absent(self, regions):
        refuse(
            regions,
            schema=self.PROMPTS,
            parts=["column 'prompt_x': column is absent", "a list of 4 numbers per region", "encoder"],
        )
        with pytest.raises(BadData, match="prompt column is absent") as caught:
            infer_schema(regions, views=(), mobility=False, prompts=("prompt_x",))
        assert "prompt4re.enabled=false" in caught.value.fix

    def test_one_of_the_wrong_length(self, regions):
        refuse(
            self.all_good_but(regions, [1.0, 2.0, 3.0]),
            schema=self.PROMPTS,
            parts=[
                "column 'prompt_x': list of the wrong length",
                f"'{regions['region_id'][5].as_py()}'",
                "expected: 4 numbers",
                "found:    lists of 3",
            ],
        )

    @pytest.mark.parametrize("fixed", [False, True])
    def test_all_of_the_wrong_length(self, regions, fixed):
        kind = pa.list_(pa.float32(), 5) if fixed else None
        refuse(
            self.column(regions, [[0.0] * 5] * N, kind),
            schema=self.PROMPTS,
            parts=["wrong length", "and 7 more (12 in all)", "expected: 4 numbers", "5"],
        )

    @pytest.mark.parametrize("fixed", [False, True])
    def test_a_null(self, regions, fixed):
        refuse(
            self.all_good_but(regions, None, pa.list_(pa.float32(), 4) if fixed else None),
            schema=self.PROMPTS,
            parts=["prompt_x", f"'{regions['region_id'][5].as_py()}'", "found:    null"],
        )

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_an_entry_that_is_not_finite(self, regions, value):
        refuse(
            self.all_good_but(regions, [1.0, 2.0, value, 4.0]),
            schema=self.PROMPTS,
            parts=[
                "column 'prompt_x': list entries are NaN or infinite",
                f"'{regions['region_id'][5].as_py()}'",
                "finite numbers",
            ],
        )

    def test_a_null_entry(self, regions):
        table = self.all_good_but(regions, [1.0, 2.0, None, 4.0])
        refuse(table, schema=self.PROMPTS, parts=["prompt_x", "numbers without nulls"])

    def test_entries_of_text(self, regions):
        values = [["a"] * 4 for _ in range(N)]
        refuse(self.column(regions, values), schema=self.PROMPTS, parts=["prompt_x", "numbers", "string"])

    def test_not_a_list(self, regions):
        refuse(self.column(regions, [1.0] * N), schema=self.PROMPTS, parts=["prompt_x", "not a list", "double"])

    def test_a_negative_count_in_a_view_names_its_category(self):
        lists, _ = tiny_city_tables(N, lists=True)
        values = np.array(lists["poi"].to_pylist())
        values[3, 1] = -2
        table = replaced(lists.drop_columns("poi"), poi=fixed_lists(values))
        schema = Schema(views={"poi": ("00", "01", "02", "03")}, mobility=False)
        refuse(table, schema=schema, parts=["poi[01]", f"'{lists['region_id'][3].as_py()}'", "found:    -2"])


def test_codes_of_a_file_are_its_texts(tables, tmp_path, monkeypatch):
    """Ids in several row groups, each with a dictionary of its own, one that fell back to plain text, and nulls."""
    regions, mobility = tables
    mobility = mobility.append_column("city_id", pa.array(["A"] * len(mobility)))
    for how in ({"row_group_size": 3}, {"use_dictionary": False}, {"dictionary_pagesize_limit": 8}):
        pq.write_table(regions, tmp_path / "r.parquet")
        pq.write_table(mobility, tmp_path / "m.parquet", **how)
        found = read_city(tmp_path / "r.parquet", Held(tmp_path / "m.parquet"), SCHEMA, city_id="A").flows
        expected = read_city(regions, mobility, SCHEMA, city_id="A").flows
        for part in ("origin", "dest", "flow", "target"):
            assert np.array_equal(getattr(found, part), getattr(expected, part))
    ends = mobility["origin_id"].to_pylist()
    ends[1] = None
    place = mobility.schema.get_field_index("origin_id")
    pq.write_table(mobility.set_column(place, "origin_id", pa.array(ends)), tmp_path / "m.parquet", row_group_size=3)
    with pytest.raises(BadData, match="names regions that the regions table does not have"):
        read_city(regions, tmp_path / "m.parquet", SCHEMA, city_id="A")


class TestBadFlows:
    def test_none_given(self, regions):
        refuse(
            regions,
            None,
            SCHEMA,
            kind=NoInput,
            exit_code=Exit.NO_INPUT,
            parts=["reads flows between regions", "origin_id, dest_id, flow", "--mobility"],
        )

    @pytest.mark.parametrize("column", ["origin_id", "dest_id"])
    def test_unknown_regions(self, tables, column):
        regions, mobility = tables
        ids = mobility[column].to_pylist()
        ids[3] = ids[8] = "9999"
        ids[9] = "0"
        refuse(
            regions,
            replaced(mobility, **{column: ids}),
            SCHEMA,
            parts=[
                f"mobility table, column '{column}': names regions that the regions table does not have",
                "regions:  '0', '9999'",
                "such as '000'",
                "drop those flows, or add the regions",
            ],
        )

    def test_a_null_end(self, tables):
        regions, mobility = tables
        ids = [None, *mobility["origin_id"].to_pylist()[1:]]
        refuse(regions, replaced(mobility, origin_id=ids), SCHEMA, parts=["mobility table, column 'origin_id'"])

    def test_ends_that_are_numbers(self, tables):
        regions, mobility = tables
        refuse(
            regions,
            replaced(mobility, dest_id=list(range(len(mobility)))),
            SCHEMA,
            parts=["column 'dest_id': region ids are not text", "found:    int64", "as they stand in regions table"],
        )

    @pytest.mark.parametrize("column", ["origin_id", "dest_id", "flow"])
    def test_a_missing_column(self, tables, column):
        regions, mobility = tables
        refuse(
            regions,
            mobility.drop_columns(column),
            SCHEMA,
            parts=[f"expected exactly one {column} column", f"one of {column}", "found:    columns"],
        )

    def test_two_columns_for_one_role(self, tables):
        regions, mobility = tables
        refuse(
            regions,
            replaced(mobility, S000=mobility["flow"]),
            SCHEMA,
            parts=["expected exactly one flow column", "flow, S000", "'S000'"],
        )

    @pytest.mark.parametrize("column", ["flow", "target_flow"])
    @pytest.mark.parametrize("value", [NAN, INF, -3.0])
    def test_a_flow_that_is_none(self, tables, column, value):
        regions, mobility = tables
        bad = replaced(mobility, **{column: at(2, value, len(mobility))})
        refuse(
            regions,
            bad,
            SCHEMA,
            parts=[f"mobility table, column '{column}'", f"'{mobility['origin_id'][2].as_py()}'", f"{value:g}"],
        )

    def test_a_null_flow(self, tables):
        regions, mobility = tables
        bad = replaced(mobility, flow=at(2, None, len(mobility)))
        refuse(regions, bad, SCHEMA, parts=["column 'flow': values are missing", "found:    null"])

    def test_no_row(self, tables):
        regions, mobility = tables
        refuse(regions, mobility.slice(0, 0), SCHEMA, parts=["mobility table: no flow at all", "0 rows"])

    def test_only_other_cities(self, tables):
        regions, mobility = tables
        here = replaced(regions, city_id=["a"] * N)
        refuse(
            here,
            replaced(mobility, city_id=["b"] * len(mobility)),
            SCHEMA,
            parts=["mobility table", "'a'"],
        )


class TestBadLabels:
    def test_absent(self, regions):
        refuse(
            regions,
            labels=("noise",),
            parts=[
                "column 'noise': label column is absent",
                "found:    columns 'region_id'",
                "null where unknown",
                "--task",
            ],
        )

    def test_all_null(self, regions):
        for nothing in (pa.nulls(N), pa.nulls(N, pa.float64())):
            refuse(
                replaced(regions, crime=nothing),
                labels=("crime",),
                parts=["column 'crime': no region has a label"],
            )

    @pytest.mark.parametrize("value", [-1.0, INF])
    def test_not_a_count(self, regions, value):
        refuse(
            replaced(regions, crime=at(1, value)),
            labels=("crime",),
            parts=["column 'crime'", f"'{regions['region_id'][1].as_py()}'", f"{value:g}"],
        )

    @pytest.mark.parametrize("with_null", [False, True])
    def test_nan_is_not_null(self, regions, with_null):
        values = at(1, NAN)
        if with_null:
            values[5] = None
        refuse(
            replaced(regions, crime=pa.array(values)),
            labels=("crime",),
            parts=[
                "column 'crime': label is NaN",
                f"regions:  '{regions['region_id'][1].as_py()}'\n",
                "null for a region",
            ],
        )

    def test_text(self, regions):
        refuse(replaced(regions, crime=["many"] * N), labels=("crime",), parts=["column 'crime': not a number"])


class TestBadFiles:
    @pytest.fixture
    def path(self, regions, tmp_path):
        pq.write_table(regions, tmp_path / "regions.parquet")
        return tmp_path / "regions.parquet"

    def test_missing(self, tmp_path):
        path = tmp_path / "none.parquet"
        refuse(path, kind=NoInput, exit_code=Exit.NO_INPUT, parts=[str(path), "no such file"])

    def test_missing_mobility(self, path, tmp_path):
        flows = tmp_path / "none.parquet"
        refuse(path, flows, SCHEMA, kind=NoInput, exit_code=Exit.NO_INPUT, parts=[str(flows), "no such file"])

    @pytest.mark.parametrize("keep", [0, 3, 100, 0.5, -1, -8], ids=str)
    def test_truncated(self, path, keep):
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        refuse(path, parts=[str(path), "not a whole Parquet file", "expected: Parquet", "cut off"])

    @pytest.mark.parametrize(
        "data", [b"region_id,lon,lat\n1,2,3\n", b"PK\3\4", b"PAR1" * 9], ids=["csv", "zip", "magic"]
    )
    def test_not_parquet(self, path, data):
        path.write_bytes(data)
        refuse(path, parts=[str(path), "Parquet file"])

    def test_a_folder(self, tmp_path):
        refuse(tmp_path, kind=NoInput, exit_code=Exit.NO_INPUT, parts=[str(tmp_path), "part-"])

    def test_damage_inside_is_never_a_traceback(self, path):
        """One byte changed anywhere: read, or refused as a user's error."""
        data = path.read_bytes()
        rng, refused = np.random.default_rng(0), 0
        for position in rng.choice(len(data), 300, replace=False):
            damaged = bytearray(data)
            damaged[position] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            try:
                read_city(path, None, COUNTS)
            except BadData:
                refused += 1
        assert refused > 100

    def test_a_damaged_name_below_a_list_column(self, path):
        pq.write_table(tiny_city_tables(N, lists=True)[0], path)
        data = path.read_bytes()
        assert b"element" in data
        path.write_bytes(data.replace(b"element", b"\xe5lement"))
        refuse(path, parts=[str(path), "Parquet"])

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_permission_denied(self, path):
        path.chmod(0)
        refuse(path, kind=NoPermission, exit_code=Exit.NO_PERMISSION, parts=[str(path), "may not read"])

    def test_permission_denied_by_the_system(self, path, monkeypatch):
        def refused(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refused)
        refuse(path, kind=NoPermission, exit_code=Exit.NO_PERMISSION, parts=[str(path), "may not read", "grant"])

    def test_errors_name_the_file_and_the_column(self, path, regions):
        pq.write_table(replaced(regions, poi_bar=at(0, -1.0)), path)
        refuse(path, parts=[f"{path}, column 'poi_bar': "])

    def test_as_a_record_for_machines(self, path, regions):
        pq.write_table(replaced(regions, poi_bar=[-1.0] * N), path)
        record = refuse(path, parts=[]).as_dict()
        assert record["error"] == "BadRows"
        assert record["code"] == "bad_count"
        assert record["exit_code"] == 65
        assert record["file"] == str(path)
        assert record["column"] == "poi_bar"
        assert (len(record["region_ids"]), record["region_count"]) == (5, N)
        assert record["expected"] == "a number ≥ 0"
