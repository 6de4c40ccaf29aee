"""Honest input in forms that other tools write: read, or refused with what it is and what to do."""

import io
import json
import shutil
import unicodedata
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import LAND_USE, POI, replaced, tiny_city_tables

import topt_deploy
from topt_deploy.config.load import load_config
from topt_deploy.data import parquet
from topt_deploy.data.city import Schema, read_city
from topt_deploy.data.dataframes import as_given
from topt_deploy.data.parquet import ParquetFile
from topt_deploy.data.parquet_parts import open_table
from topt_deploy.errors import BadConfig, BadData, UsageError
from topt_deploy.runtime.predictor import load
from topt_deploy.storage.hashed_file import Held

SCHEMA = Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=True)


def test_a_million_flows_among_few_regions_in_a_default_file(tmp_path):
    ids = np.array([f"2026-district-{i:04d}" for i in range(120)])
    rng = np.random.default_rng(0)
    ends = rng.integers(0, 120, (2, 1_000_000))
    table = pa.table({"origin_id": ids[ends[0]], "dest_id": ids[ends[1]], "flow": rng.integers(1, 9, 1_000_000)})
    pq.write_table(table, tmp_path / "m.parquet")
    assert ParquetFile(tmp_path / "m.parquet").read().num_rows == 1_000_000


class TestUnicode:
    def test_ids_in_another_normal_form(self):
        regions, mobility = tiny_city_tables()
        for form in ("NFC", "NFD"):
            other = "NFD" if form == "NFC" else "NFC"

            def named(column, form):
                return [unicodedata.normalize(form, f"Málaga {i}") for i in column.to_pylist()]

            here = replaced(regions, region_id=named(regions["region_id"], form))
            flows = {end: named(mobility[end], other) for end in ("origin_id", "dest_id")}
            city = read_city(here, replaced(mobility, **flows), SCHEMA)
            assert city.flows.flow.sum() == sum(mobility["flow"].to_pylist())
            assert set(city.region_id) == set(here["region_id"].to_pylist())

    def test_two_regions_that_differ_in_nothing_else_are_two(self):
        regions, mobility = tiny_city_tables()
        ids = regions["region_id"].to_pylist()
        twins = {ids[0]: "caf\u00e9", ids[1]: "cafe\u0301"}
        named = [twins.get(i, i) for i in ids]
        flows = {end: [twins.get(i, i) for i in mobility[end].to_pylist()] for end in ("origin_id", "dest_id")}
        city = read_city(replaced(regions, region_id=named), replaced(mobility, **flows), SCHEMA)
        assert len(city) == 12

    def test_categories_in_another_normal_form(self):
        regions, mobility = tiny_city_tables()
        named = [unicodedata.normalize("NFD", name) for name in regions.column_names]
        assert named != regions.column_names
        city = read_city(regions.rename_columns(named), mobility, SCHEMA)
        assert np.array_equal(city.views["poi"], read_city(regions, mobility, SCHEMA).views["poi"])


def other_files():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a", "b")
    feather = io.BytesIO()
    with pa.ipc.new_file(feather, pa.schema([("a", pa.int64())])):
        pass
    return {
        "a CSV table": b"region_id,lon,lat\n1,2,3\n",
        "a CSV table ": b"\xef\xbb\xbfregion_id;lon;lat\n1;2;3\n",
        "JSON": b'{"type": "FeatureCollection", "features": []}',
        "GeoPackage": b"SQLite format 3\0" + bytes(2000),
        "shapefile": b"\0\0\x27\x0a" + bytes(100),
        "zip": stream.getvalue(),
        "Feather": feather.getvalue(),
        "old spreadsheet": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
        "UTF-16": "region_id\tlon\n1\t2\n".encode("utf-16"),
        "FlatGeobuf": b"fgb\x03fgb\0" + bytes(100),
        "HTML": b"<!DOCTYPE html><html>404</html>",
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }


@pytest.mark.parametrize("kind", other_files())
def test_another_format_is_named(kind, desk, topt_run):
    desk.regions.write_bytes(other_files()[kind])
    said = topt_run("predict", desk.regions)
    assert said.code == 65
    assert kind.strip() in said.err
    assert "cut off" not in said.err


def test_a_file_that_is_cut_off_is_still_told_so(desk, topt_run):
    desk.regions.write_bytes(desk.regions.read_bytes()[:-100])
    assert "cut off" in topt_run("predict", desk.regions).err


class TestFolders:
    def spark(self, folder, table, parts):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_SUCCESS").touch()
        (folder / "._SUCCESS.crc").write_bytes(b"crc")
        for number in range(parts):
            first, end = (i * len(table) // parts for i in (number, number + 1))
            rows = table.slice(first, end - first)
            pq.write_table(rows, folder / f"part-{number:05d}-1a2b-c000.snappy.parquet")

    def test_a_table_in_one_part(self, desk, topt_run):
        folder = desk.folder / "spark" / "regions.parquet"
        self.spark(folder, pq.read_table(desk.regions), 1)
        for given in (folder, folder.parent):
            out = desk.folder / "out.parquet"
            done = topt_run("predict", given, "--bundle", desk.bundle, "--mobility", desk.mobility, "--out", out)
            assert done.code == 0, done.err
            assert pq.read_table(out).num_rows == 231
            out.unlink()

    def test_parts_give_the_bytes_of_one_file(self, desk, topt_run):
        """Alone, in a batch, from Python, as a city's folder and as regions.parquet; flows in parts too."""
        assert topt_run("predict", desk.regions).code == 0
        expected = desk.out.read_bytes()
        city, inner = desk.folder / "spark" / "city=other", desk.folder / "spark" / "plain"
        regions, mobility = pq.read_table(desk.regions), pq.read_table(desk.mobility)
        self.spark(city, regions, 3)
        shutil.copy(desk.mobility, city)
        self.spark(inner / "regions.parquet", regions, 4)
        self.spark(inner / "mobility.parquet", mobility, 5)
        part = next(city.glob("part-*"))
        for given, home in ((city, city), (part, city), (inner, inner), (inner / "regions.parquet", inner)):
            done = topt_run("predict", given, "--bundle", desk.bundle)
            assert done.code == 0, done.err
            assert (home / "predictions.parquet").read_bytes() == expected
            assert topt_run("predict", given, "--bundle", desk.bundle, "--resume").out.count("as they were") == 1
            (home / "predictions.parquet").unlink()
        for given in (city.parent, city.parent.as_uri()):
            out = desk.folder / "out"
            done = topt_run("predict", given, "--bundle", desk.bundle, "--out", out)
            assert done.code == 0, done.err
            assert {path.parent.name for path in out.glob("*/predictions.parquet")} == {"city=other", "city=plain"}
            assert {path.read_bytes() for path in out.glob("*/predictions.parquet")} == {expected}
            shutil.rmtree(out)
        table = load(desk.bundle).predict(inner / "regions.parquet", inner / "mobility.parquet")
        assert table.equals(pq.read_table(desk.out))
        model = topt_deploy.load(desk.bundle)
        assert model.predict(str(city)).equals(table)
        assert model.predict(inner).equals(table)

    def test_another_part_is_another_input(self, desk, topt_run):
        folder = desk.folder / "parts"
        self.spark(folder, pq.read_table(desk.regions), 2)
        shutil.copy(desk.mobility, folder)
        assert topt_run("predict", folder, "--bundle", desk.bundle).code == 0
        last = sorted(folder.glob("part-*"))[-1]
        pq.write_table(pq.read_table(last, partitioning=None).slice(1), last)
        said = topt_run("predict", folder, "--bundle", desk.bundle, "--resume", "--on-bad-row", "quarantine")
        assert "as they were" not in said.out
        for name in ("part-9.parquet", last.name):
            said = topt_run("predict", folder, "--bundle", desk.bundle, "--out", folder / name)
            assert said.code == 2
            assert "input" in said.err

    def test_parts_that_do_not_go_together(self, desk, topt_run):
        folder = desk.folder / "t.parquet"
        table = pq.read_table(desk.regions)
        for other, told in (
            (table.drop_columns("lat"), "different columns"),
            (replaced(table, lat=["x"] * len(table)), "different types"),
            (table, "occur more than once"),
        ):
            self.spark(folder, table, 1)
            pq.write_table(other, folder / "part-9.parquet")
            said = topt_run("predict", folder, "--bundle", desk.bundle)
            assert said.code == 65
            assert told in said.err
            shutil.rmtree(folder)

    def test_a_table_that_is_divided_by_another_column_is_refused(self, desk, topt_run):
        folder = desk.folder / "t.parquet"
        self.spark(folder / "borough=Bronx", pq.read_table(desk.regions), 1)
        for more in ((), ("--out", desk.folder / "out" / "")):
            said = topt_run("predict", folder, "--bundle", desk.bundle, *more)
            assert said.code == 65
            assert "no folders inside" in said.err

    def test_a_damaged_part_is_named_where_the_user_has_it(self, desk, topt_run):
        folder = desk.folder / "cities" / "city=A"
        self.spark(folder, pq.read_table(desk.regions), 2)
        shutil.copy(desk.mobility, folder)
        last = sorted(folder.glob("part-*"))[-1]
        last.write_bytes(b"PAR1")
        for given, told in ((folder.parent, str(last)), (folder.parent.as_uri(), f"{folder.as_uri()}/{last.name}")):
            said = topt_run("predict", given, "--bundle", desk.bundle, "--out", desk.folder / "out")
            assert said.code == 65
            assert told.replace("%3D", "=") in said.err

    def test_empty_parts_and_columns_without_a_value(self, tmp_path):
        table = pa.table({"a": ["x", None], "b": pa.array([None, None], pa.null())})
        full = pa.table({"b": [1.5], "a": ["y"]})
        for number, part in enumerate((table.slice(0, 0), table, full)):
            pq.write_table(part, tmp_path / f"part-{number}.parquet")
        for coded in ((), ("a",)):
            read = open_table(tmp_path, coded=coded).read()
            assert read.to_pydict() == {"a": ["x", None, "y"], "b": [None, None, 1.5]}
            assert read.column("a").num_chunks == 1

    def test_many_small_parts_may_not_take_more_memory_than_one_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(parquet, "MEMORY_FREE_BYTES", 1 << 20)
        for number in range(3):
            pq.write_table(pa.table({"a": np.zeros(60_000)}), tmp_path / f"part-{number}.parquet")
            assert ParquetFile(tmp_path / f"part-{number}.parquet").read().num_rows == 60_000
        with pytest.raises(BadData, match="great deal of memory"):
            open_table(tmp_path).read()

    def test_training_reads_parts(self, tmp_path):
        regions, mobility = tiny_city_tables()
        self.spark(tmp_path / "regions.parquet", regions, 2)
        self.spark(tmp_path / "mobility.parquet", mobility, 3)
        city = read_city(Held(tmp_path / "regions.parquet"), Held(tmp_path / "mobility.parquet"), SCHEMA)
        whole = read_city(regions, mobility, SCHEMA)
        assert np.array_equal(city.lonlat, whole.lonlat)
        assert np.array_equal(city.flows.flow, whole.flows.flow)

    def test_extents_of_parts_are_joined(self, tmp_path):
        geo = {"version": "1.1.0", "primary_column": "geometry"}
        for number, box in enumerate(([0, 0, 1, 1], [2, -1, 3, 0])):
            shape = {"encoding": "WKB", "geometry_types": ["Point"][:number], "bbox": box}
            described = json.dumps(geo | {"columns": {"geometry": shape}})
            table = pa.table({"geometry": [b"x"]}).replace_schema_metadata({"geo": described})
            pq.write_table(table, tmp_path / f"part-{number}.parquet")
        joined = json.loads(open_table(tmp_path).metadata[b"geo"])["columns"]["geometry"]
        assert joined == {"encoding": "WKB", "geometry_types": ["Point"], "bbox": [0, -1, 3, 1]}

    @pytest.mark.parametrize("key", ["city", "city_id"])
    def test_partitions_of_cities(self, key, desk, topt_run):
        for name in "AB":
            folder = desk.folder / "cities" / f"{key}={name}"
            self.spark(folder, pq.read_table(desk.regions).drop_columns("city_id"), 1)
            flows = pq.read_table(desk.mobility).drop_columns("city_id")
            pq.write_table(flows, folder / "mobility.parquet")
        out = desk.folder / "out"
        said = topt_run("predict", desk.folder / "cities", "--bundle", desk.bundle, "--out", out)
        assert said.code == 0, said.err
        for name in "AB":
            table = pq.read_table(out / f"city={name}" / "predictions.parquet", partitioning=None)
            assert set(table.column("city_id").to_pylist()) == {name}


class TestToml:
    def test_a_byte_order_mark(self, tmp_path):
        (tmp_path / "topt.toml").write_bytes(b"\xef\xbb\xbf[tasks.crime]\n")
        assert list(load_config(file=tmp_path / "topt.toml").tasks) == ["crime"]

    @pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "{a=" * 100_000])
    def test_nested_without_end(self, text, tmp_path):
        (tmp_path / "topt.toml").write_text(text)
        with pytest.raises(BadConfig, match="not valid TOML"):
            load_config(file=tmp_path / "topt.toml")


@pytest.fixture(scope="module")
def predictor(demo_bundle):
    return load(demo_bundle)


class TestPython:
    @pytest.fixture
    def expected(self, predictor, demo_city):
        return predictor.predict(demo_city / "regions.parquet", demo_city / "mobility.parquet")

    def test_a_path_may_be_text(self, predictor, expected, demo_city):
        found = predictor.predict(str(demo_city / "regions.parquet"), str(demo_city / "mobility.parquet"))
        assert found.equals(expected)

    def test_text_and_an_encoder(self, prompted, tmp_path):
        for name in ("bare.parquet", "mobility.parquet"):  # prompts are kept beside the regions, which others share
            shutil.copy(prompted / name, tmp_path)
        found = load(prompted / "model.topt").predict(
            str(tmp_path / "bare.parquet"), str(tmp_path / "mobility.parquet")
        )
        assert found.num_rows > 0

    @pytest.mark.parametrize("kind", ["pandas", "dataset", "polars", "record batches"])
    def test_other_tables(self, kind, predictor, expected, demo_city):
        regions, flows = (pq.read_table(demo_city / f"{name}.parquet") for name in ("regions", "mobility"))
        numbers = expected.column("prediction")
        if kind == "pandas":
            pytest.importorskip("pandas")
            regions, flows = regions.drop_columns("geometry").to_pandas(), flows.to_pandas()
        elif kind == "polars":
            polars = pytest.importorskip("polars", reason="polars is not installed")
            regions, flows = polars.from_arrow(regions), polars.from_arrow(flows)
        elif kind == "dataset":
            import pyarrow.dataset as ds

            regions, flows = ds.dataset(regions), ds.dataset(flows)
        else:
            regions, flows = regions.to_reader(), flows.to_reader()
        assert predictor.predict(regions, flows).column("prediction").equals(numbers)

    @pytest.mark.parametrize("table", [3, None, [1], {"region_id": ["a"]}, object()])
    def test_what_is_no_table(self, table, predictor):
        with pytest.raises(UsageError, match="not a table"):
            predictor.predict(table)

    def test_an_unknown_device(self, demo_bundle):
        with pytest.raises(UsageError, match="no such device"):
            load(demo_bundle, device="gpu")

    @pytest.mark.parametrize(
        "arguments",
        [
            {"bundle": 3}, {"bundle": None}, {"threads": "two"}, {"threads": 0}, {"threads": 1.5},
            {"encoder_bundle": 3}, {"require_signature": b"key"},
        ],
    )  # fmt: skip
    def test_arguments_of_another_kind(self, arguments, demo_bundle):
        with pytest.raises(UsageError, match=next(iter(arguments))):
            topt_deploy.load(**{"bundle": demo_bundle, **arguments})

    def test_a_coverage_that_is_no_number(self, demo_bundle, demo_city):
        with pytest.raises(UsageError, match="coverage"):
            topt_deploy.load(demo_bundle).predict(demo_city / "regions.parquet", coverage="high")

    def test_one_task_is_no_list_of_letters(self, predictor, demo_city):
        found = predictor.predict(demo_city / "regions.parquet", demo_city / "mobility.parquet", tasks="crime")
        assert set(found.column("task").to_pylist()) == {"crime"}

    def test_a_frame_of_several_kinds(self):
        pandas = pytest.importorskip("pandas")
        with pytest.raises(BadData, match="several kinds"):
            as_given(pandas.DataFrame({"region_id": ["a", 3, b"x"]}), "regions")

    def test_mlflow_without_rows(self, demo_bundle):
        pandas = pytest.importorskip("pandas")
        from topt_deploy.runtime.mlflow import MlflowModel

        model = MlflowModel(load(demo_bundle))
        for frame in (pandas.DataFrame(), pandas.DataFrame({"city_id": [], "region_id": []}), 3):
            with pytest.raises(BadData):
                model.predict(frame)


def test_cities_with_odd_names_at_uris(desk, topt_run):
    for name in ("a%2Fb", "a%00b", "100%25"):
        folder = desk.folder / "cities" / f"city={name}"
        folder.mkdir(parents=True)
        for table in ("regions", "mobility"):
            pq.write_table(
                pq.read_table(desk.folder / f"{table}.parquet").drop_columns("city_id"), folder / f"{table}.parquet"
            )
    out = (desk.folder / "out").as_uri()
    said = topt_run("predict", (desk.folder / "cities").as_uri(), "--bundle", desk.bundle, "--out", out)
    assert said.code == 0, said.err
    found = [pq.read_table(file, partitioning=None) for file in (desk.folder / "out").glob("*/predictions.parquet")]
    assert {name for table in found for name in table.column("city_id").to_pylist()} == {"a/b", "a\0b", "100%"}


@pytest.mark.parametrize("name", [".predictions.parquet.part", "predictions.parquet", "_run.json"])
def test_links_below_a_uri_lead_nowhere(name, desk, topt_run):
    """Of whoever may write to the folder of results, and wants another file written."""
    victim = desk.folder / "victim"
    victim.write_text("mine")
    cities = desk.folder / "cities" / "city=A"
    cities.mkdir(parents=True)
    for table in (desk.regions, desk.mobility):
        shutil.copy(table, cities)
    out = desk.folder / "out"
    (out / "city=A").mkdir(parents=True)
    link = (out if name == "_run.json" else out / "city=A") / name
    link.symlink_to(victim)
    topt_run("predict", desk.folder / "cities", "--bundle", desk.bundle, "--out", out.as_uri())
    assert victim.read_text() == "mine"
    topt_run("predict", desk.folder / "cities", "--bundle", desk.bundle, "--out", out)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("uri", [False, True])
def test_a_citys_folder_is_no_link(uri, desk, topt_run):
    cities, elsewhere, out = (desk.folder / name for name in ("cities", "elsewhere", "out"))
    for folder in (cities / "city=A", elsewhere, out):
        folder.mkdir(parents=True)
    for table in (desk.regions, desk.mobility):
        shutil.copy(table, cities / "city=A")
    (out / "city=A").symlink_to(elsewhere)
    arguments = ("predict", cities, "--bundle", desk.bundle, "--out")
    said = topt_run(*arguments, out.as_uri() if uri else out)
    assert said.code == 73
    assert "is a link" in said.err
    assert list(elsewhere.iterdir()) == []
    (desk.folder / "linked").symlink_to(elsewhere)  # what the user names may be one
    assert topt_run(*arguments, desk.folder / "linked").code == 0


@pytest.mark.parametrize("role", ["in", "out"])
def test_a_uri_without_a_name_for_a_file(role, desk, topt_run):
    odd = f"{desk.folder.as_uri()}/a%00b/"
    place, out = (odd, desk.folder / "out") if role == "in" else (desk.regions, odd)
    said = topt_run("predict", place, "--bundle", desk.bundle, "--out", out)
    assert (said.code, "zero byte" in said.err) == (2, True), said.err
