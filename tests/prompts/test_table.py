from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from builders import POI, replaced, tiny_city_tables

from topt_deploy.data.city import infer_schema, read_city
from topt_deploy.data.parquet import read_parquet, write_parquet
from topt_deploy.errors import BadData, NoInput
from topt_deploy.prompts.geotext import geo_text
from topt_deploy.prompts.table import merge_prompts, prompt_table, read_regions
from topt_deploy.prompts.templates import load_templates

N = 12
WORDING = load_templates().wording
FACTS = {"encoder": "tiny@1", "precision": "int8", "templates": {"crime": "c0ffee", "none": "0"}}


@pytest.fixture
def table():
    return tiny_city_tables(N)[0]


@pytest.fixture
def ids(table):
    return table["region_id"].to_pylist()


def bare(table, **columns):
    """No counts: ids and positions alone."""
    return replaced(table.select(["region_id", "lon", "lat"]), **columns)


def refuse(table, parts: Sequence[str], **options):
    with pytest.raises(BadData) as refused:
        read_regions(table, WORDING, **options)
    for part in parts:
        assert part in str(refused.value)


def by_id(ids, values):
    return [value for _, value in sorted(zip(ids, values, strict=True))]


class TestTexts:
    def test_built_from_counts(self, table, ids):
        regions = read_regions(table, WORDING)
        assert regions.region_id.tolist() == sorted(ids)
        assert len(regions) == N
        expected = [
            geo_text(WORDING, lon=row["lon"], lat=row["lat"], pois={name: row[f"poi_{name}"] for name in POI})
            for row in table.to_pylist()
        ]
        assert list(regions.texts) == by_id(ids, expected)
        assert "café" in regions.texts[0]
        assert regions.images == ((),) * N

    def test_the_tables_own_come_first(self, table, ids):
        own = [f"region {i}" if int(i) % 2 else (None, "", " \n")[int(i) % 3] for i in ids]
        built = read_regions(table, WORDING).texts
        texts = read_regions(replaced(table, text=own), WORDING).texts
        assert list(texts) == [
            f"region {i}" if int(i) % 2 else text for i, text in zip(sorted(ids), built, strict=True)
        ]

    def test_where_all_have_one_counts_are_not_even_looked_at(self, table, ids):
        wrong = replaced(table, text=ids, poi_bar=["many"] * N)
        assert list(read_regions(wrong, WORDING).texts) == sorted(ids)

    def test_an_address(self, table, ids):
        addresses = [f"{i}, Mill Street" if int(i) > 3 else None for i in ids]
        texts = read_regions(replaced(table, address=addresses), WORDING).texts
        for region, text in zip(sorted(ids), texts, strict=True):
            assert (f"\nAddress: {region}, Mill Street\n" in text) == (int(region) > 3)

    def test_a_list_of_counts_with_names(self, table):
        listed = tiny_city_tables(N, lists=True)[0]
        assert read_regions(listed, WORDING).texts == read_regions(table, WORDING).texts

    def test_a_list_of_counts_without_names(self, ids):
        listed = tiny_city_tables(N, lists=True)[0]
        unnamed = listed.cast(pa.schema([field.remove_metadata() for field in listed.schema]))
        refuse(unnamed, ["column 'poi'", "no names", "`categories`", "give every region a 'text'"])
        assert list(read_regions(replaced(unnamed, text=ids), WORDING).texts) == sorted(ids)

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
    def test_kinds_of_text(self, table, ids, kind):
        column = pa.array(ids, pa.string()).cast(kind)
        assert list(read_regions(replaced(table, text=column), WORDING).texts) == sorted(ids)

    def test_a_column_of_nulls(self, table):
        assert read_regions(replaced(table, text=pa.nulls(N)), WORDING).texts == read_regions(table, WORDING).texts

    def test_text_that_is_none(self, table):
        refuse(replaced(table, text=[1] * N), ["column 'text': not text", "expected: string", "found:    int64"])

    def test_row_order_does_not_count(self, table, ids):
        rich = replaced(table, text=[None, *ids[1:]], images=[[i] for i in ids])
        shuffled = rich.take(np.random.default_rng(1).permutation(N))
        one, two = read_regions(rich, WORDING), read_regions(shuffled, WORDING)
        assert (one.texts, one.images) == (two.texts, two.images)

    def test_city_and_id_column(self, table, ids):
        renamed = replaced(table.rename_columns({"region_id": "geoid"}), city_id=["x"] * N)
        regions = read_regions(renamed, WORDING, id_col="geoid")
        assert (regions.city_id, regions.region_id.tolist()) == ("x", sorted(ids))
        refuse(renamed, ["the region ids are absent"])


class TestImages:
    @pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.large_string())])
    def test_names_in_order(self, table, ids, kind):
        names = [None if i == "000" else [f"{i}/b.png", f"{i}/a.png"][: int(i) % 3] for i in ids]
        regions = read_regions(replaced(table, images=pa.array(names, kind)), WORDING)
        assert [list(images) for images in regions.images] == [name or [] for name in by_id(ids, names)]

    @pytest.mark.parametrize("column", [["a.png"] * N, [[1]] * N], ids=["text", "numbers"])
    def test_not_lists_of_names(self, table, column):
        refuse(replaced(table, images=column), ["column 'images': not lists of files", "list<string>"])

    def test_two_each_and_none_at_all(self, table):
        two = pa.FixedSizeListArray.from_arrays(pa.array(["a.png", "b.png"] * N), 2)
        assert read_regions(replaced(table, images=two), WORDING).images == (("a.png", "b.png"),) * N
        assert read_regions(replaced(table, images=pa.nulls(N)), WORDING).images == ((),) * N

    def test_a_null_name(self, table):
        names = [["a.png"]] * (N - 1) + [["a.png", None]]
        refuse(replaced(table, images=names), ["column 'images'", "a file's name is missing", f"'row {N - 1}'"])

    def test_damaged_names(self, table):
        flat = pa.StringArray.from_buffers(
            N, pa.array(range(N + 1), pa.int32()).buffers()[1], pa.py_buffer(b"\xff" * N)
        )
        names = pa.ListArray.from_arrays(list(range(N + 1)), flat)
        refuse(replaced(table, images=names), ["column 'images': not UTF-8 text"])


class TestNothingToEncode:
    def test_a_position_is_not_enough(self, table, ids):
        refuse(bare(table), ["nothing but a position", f"'{min(ids)}'", f"({N} in all)", "poi_<category>", "'lon'"])

    @pytest.mark.parametrize("column", ["text", "address", "images"])
    def test_any_one_thing_is(self, table, ids, column):
        value = ["a.png"] if column == "images" else "a b"
        poor = min(ids)
        read_regions(bare(table, **{column: [value] * N}), WORDING)
        refuse(bare(table, **{column: [None if i == poor else value for i in ids]}), ["nothing but", f"'{poor}'\n"])

    def test_an_image_and_no_counts(self, table):
        regions = read_regions(bare(table, images=[["a.png"]] * N), WORDING)
        assert "POI" not in regions.texts[0]
        assert "Coordinates" in regions.texts[0]


class TestFiles:
    def test_a_file(self, table, ids, tmp_path):
        rich = replaced(table, images=[[i] for i in ids], text=[None, *ids[1:]])
        write_parquet(tmp_path / "regions.parquet", rich)
        one, two = read_regions(tmp_path / "regions.parquet", WORDING), read_regions(rich, WORDING)
        assert (one.texts, one.images) == (two.texts, two.images)

    def test_a_file_without_any_of_the_columns(self, table, tmp_path):
        write_parquet(tmp_path / "regions.parquet", table)
        assert read_regions(tmp_path / "regions.parquet", WORDING).texts == read_regions(table, WORDING).texts

    def test_errors_name_it(self, table, tmp_path):
        path = tmp_path / "regions.parquet"
        write_parquet(path, bare(table))
        refuse(path, [str(path), "nothing but a position"])
        with pytest.raises(NoInput):
            read_regions(tmp_path / "none.parquet", WORDING)


def vectors(seed=0, width=5):
    return np.random.default_rng(seed).normal(size=(N, width)).astype(np.float32)


@pytest.fixture
def regions(table):
    return read_regions(replaced(table, city_id=["x"] * N), WORDING)


class TestPromptTable:
    def test_columns(self, regions, tmp_path):
        values = {"crime": vectors(0), "none": vectors(1).astype(np.float64)}
        reasons = [None] * N
        reasons[3] = "a.png: not an image"
        values["crime"][3] = np.nan
        made = prompt_table(regions, values, reasons=reasons, **FACTS)
        write_parquet(tmp_path / "prompts.parquet", made)
        read = read_parquet(tmp_path / "prompts.parquet")
        assert read.to_pylist() == made.to_pylist()
        assert read.column_names == ["region_id", "city_id", "status", "reason", "prompt_crime", "prompt_none"]
        assert read["region_id"].to_pylist() == regions.region_id.tolist()
        assert read["city_id"].to_pylist() == ["x"] * N
        assert read["status"].to_pylist() == ["skipped" if row == 3 else "ok" for row in range(N)]
        assert read["reason"].to_pylist() == reasons
        for task in values:
            column = read[f"prompt_{task}"]
            assert column.type == pa.list_(pa.float32(), 5)
            expected = [None if row == 3 else v for row, v in enumerate(values[task].astype(np.float32).tolist())]
            assert column.to_pylist() == expected
            described = {"encoder": "tiny@1", "precision": "int8", "template": FACTS["templates"][task]}
            assert read.schema.field(f"prompt_{task}").metadata == {
                k.encode(): v.encode() for k, v in described.items()
            }

    def test_no_city(self, table):
        made = prompt_table(read_regions(table, WORDING), {"crime": vectors()}, reasons=[None] * N, **FACTS)
        assert made["city_id"].to_pylist() == [None] * N
        assert made["city_id"].type == made["reason"].type == pa.string()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
    def test_what_is_no_vector(self, regions, bad):
        values = vectors()
        values[4, 2 if bad else slice(None)] = bad
        with pytest.raises(BadData, match="no usable vector at precision int8") as refused:
            prompt_table(regions, {"crime": values}, reasons=[None] * N, **FACTS)
        assert refused.value.column == "prompt_crime"
        assert refused.value.ids == [regions.region_id[4]]


class TestMerge:
    @pytest.fixture
    def prompts(self, regions):
        return prompt_table(regions, {"crime": vectors(0), "none": vectors(1)}, reasons=[None] * N, **FACTS)

    def test_added_where_they_belong(self, table, ids, prompts):
        merged = merge_prompts(table, prompts.take(np.random.default_rng(0).permutation(N)))
        assert merged.drop_columns(["prompt_crime", "prompt_none"]).equals(table, check_metadata=True)
        place = {region: row for row, region in enumerate(sorted(ids))}
        assert merged["prompt_none"].to_pylist() == [vectors(1).tolist()[place[i]] for i in ids]
        city = read_city(merged, None, infer_schema(merged, views=["poi"], mobility=False, prompts=["prompt_crime"]))
        assert np.array_equal(city.prompts["prompt_crime"], vectors(0))
        assert city.encoders == {"prompt_crime": "tiny@1"}

    def test_replaced_and_all_else_as_it_was(self, prompts, ids):
        table = tiny_city_tables(N, lists=True, prompts=("prompt_crime", "prompt_calls"))[0]
        table = replaced(table, city_id=["x"] * N, geometry=[b"wkb"] * N)
        fields = [f.with_metadata({"encoder": "old"}) if f.name.startswith("prompt_") else f for f in table.schema]
        table = table.cast(pa.schema(fields, metadata={"geo": "{}", "synthetic": "true", "encoder": "old"}))
        merged = merge_prompts(table, prompts)
        assert merged.column_names == [*table.column_names, "prompt_none"]
        assert merged.schema.metadata == {b"geo": b"{}", b"synthetic": b"true"}
        assert merged.schema.field("prompt_crime").metadata[b"encoder"] == b"tiny@1"
        assert merged.schema.field("prompt_calls").metadata == {b"encoder": b"old"}
        assert b"categories" in merged.schema.field("poi").metadata
        others = [column for column in table.column_names if column != "prompt_crime"]
        before = table.select(others).replace_schema_metadata(merged.schema.metadata)
        assert merged.select(others).equals(before, check_metadata=True)

    def test_skipped_regions_stay_null_and_are_refused_by_the_model(self, table, regions):
        reasons = ["unreadable", *[None] * (N - 1)]
        merged = merge_prompts(table, prompt_table(regions, {"crime": vectors()}, reasons=reasons, **FACTS))
        assert merged["prompt_crime"].null_count == 1
        schema = infer_schema(merged, views=["poi"], mobility=False, prompts=["prompt_crime"])
        with pytest.raises(BadData, match=f"'{regions.region_id[0]}'\n(.|\n)*found:    null"):
            read_city(merged, None, schema)

    def test_another_id_column(self, table, prompts):
        renamed = table.rename_columns({"region_id": "geoid"})
        assert merge_prompts(renamed, prompts, id_col="geoid")["prompt_crime"].null_count == 0

    def test_other_regions(self, table, prompts):
        with pytest.raises(BadData, match="not those of these regions") as refused:
            merge_prompts(table.slice(2), prompts.slice(3))
        assert refused.value.expected == f"prompts of {N - 2} regions"
        for one, other in ((table, prompts.slice(1)), (table.slice(1), prompts)):
            with pytest.raises(BadData, match="not those of these regions"):
                merge_prompts(one, other)
        with pytest.raises(BadData, match="more than once"):
            merge_prompts(table, pa.concat_tables([prompts, prompts]))

    def test_another_city(self, table, prompts):
        with pytest.raises(BadData, match="another city") as refused:
            merge_prompts(replaced(table, city_id=["y"] * N), prompts)
        assert (refused.value.expected, refused.value.found) == ("'y'", "'x'")
