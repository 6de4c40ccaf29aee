"""Which cities an input has, what they are called, and where their output goes."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from topt_deploy.errors import NoInput, UsageError
from topt_deploy.runtime.addresses import joined, local_path, shown
from topt_deploy.runtime.batch.plan import plan
from topt_deploy.runtime.inputs import one_city

REGIONS, MOBILITY = "regions.parquet", "mobility.parquet"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, and a way to put files of a size there."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def put(*names, size=10):
        for name in names:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x" * size)
        return folder

    return put


def planned(*inputs, out="out", mobility=True):
    """Regions and flows by city."""
    return {job.name: (job.regions, job.mobility) for job in plan(inputs, out, mobility=mobility)}


class TestInputs:
    def test_files_are_called_what_they_are_called(self, here):
        here("Oslo.parquet", "north/Bergen.parquet")
        assert planned("Oslo.parquet", "north/Bergen.parquet") == {
            "Oslo": ("Oslo.parquet", None),
            "Bergen": ("north/Bergen.parquet", None),
        }

    def test_a_regions_file_is_called_what_its_folder_is(self, here):
        here("Oslo/regions.parquet", "Oslo/mobility.parquet")
        expected = {"Oslo": ("Oslo/regions.parquet", "Oslo/mobility.parquet")}
        assert planned("Oslo/regions.parquet") == planned("Oslo") == planned(".") | expected
        assert planned("Oslo") == expected

    def test_folders_at_any_depth(self, here):
        here("a/Oslo/regions.parquet", "a/b/c/Bergen/regions.parquet", "a/b/c/Bergen/mobility.parquet")
        assert planned("a") == {
            "Oslo": ("a/Oslo/regions.parquet", None),
            "Bergen": ("a/b/c/Bergen/regions.parquet", "a/b/c/Bergen/mobility.parquet"),
        }

    def test_what_lies_below_a_citys_own_folder_is_its_own(self, here):
        here("d/Oslo/regions.parquet", "d/Oslo/runs/1/held_out.parquet", "d/Oslo2/regions.parquet")
        here("d/Oslo/model.topt/golden/a.regions.parquet", "d/model.topt/golden/a.regions.parquet")
        assert planned("d") == {"Oslo": ("d/Oslo/regions.parquet", None), "Oslo2": ("d/Oslo2/regions.parquet", None)}

    def test_hive_partitions(self, here):
        here("d/city=Oslo/regions.parquet", "d/city=Oslo/mobility.parquet", "d/country=NO/city=Bergen/part-0.parquet")
        assert planned("d") == {
            "Oslo": ("d/city=Oslo/regions.parquet", "d/city=Oslo/mobility.parquet"),
            "Bergen": ("d/country=NO/city=Bergen/", None),
        }

    def test_a_partition_in_several_parts_is_one_city(self, here):
        """A city is predicted as a whole, also where only some of its parts are named."""
        here("d/city=Oslo/part-0.parquet", "d/city=Oslo/part-1.parquet", "d/city=Oslo/mobility.parquet")
        expected = {"Oslo": ("d/city=Oslo/", "d/city=Oslo/mobility.parquet")}
        for given in ("d", "d/city=*", "d/city=Oslo/part-0.parquet", "d/city=Oslo/part-*.parquet"):
            assert planned(given) == expected

    def test_folders_that_stand_for_files(self, here):
        here(*(f"d/Oslo/{name}.parquet/part-{part}.parquet" for name in ("regions", "mobility") for part in "01"))
        here("d/Bergen.parquet/a.parquet", "d/Bergen.parquet/b.parquet", "d/Bergen.mobility.parquet/part-0.parquet")
        here("d/Voss/regions/part-0.parquet", "d/Voss/mobility.parquet")
        expected = {
            "Oslo": ("d/Oslo/regions.parquet/", "d/Oslo/mobility.parquet/"),
            "Bergen": ("d/Bergen.parquet/", "d/Bergen.mobility.parquet/"),
            "Voss": ("d/Voss/regions/", "d/Voss/mobility.parquet"),
        }
        assert planned("d") == planned("d/Oslo", "d/*.parquet", "d/Voss/regions") == expected

    def test_partitions_in_a_folder_that_is_called_like_a_file(self, here):
        """So Spark writes many cities at once."""
        here("d/all.parquet/city=A/part-0.parquet", "d/all.parquet/city=A/part-1.parquet")
        here("d/all.parquet/city=B/part-0.parquet")
        assert planned("d/all.parquet") == {name: (f"d/all.parquet/city={name}/", None) for name in "AB"}

    def test_flat_files_with_flows_of_their_own(self, here):
        here("d/Oslo.parquet", "d/Oslo.mobility.parquet", "d/Bergen.parquet", "d/mobility.parquet")
        expected = {
            "Oslo": ("d/Oslo.parquet", "d/Oslo.mobility.parquet"),
            "Bergen": ("d/Bergen.parquet", "d/mobility.parquet"),
        }
        assert planned("d") == planned("d/*.parquet") == planned("d/Oslo.parquet", "d/Bergen.parquet") == expected
        assert planned("d", mobility=False) == {name: (regions, None) for name, (regions, _) in expected.items()}

    def test_regions_parquet_stands_for_its_folder(self, here):
        here("Oslo/regions.parquet", "Oslo/labels.parquet", "Oslo/prompts.parquet")
        assert planned("Oslo") == {"Oslo": ("Oslo/regions.parquet", None)}

    def test_what_is_ours_is_no_input(self, here):
        here("d/Oslo.parquet", "d/predictions.parquet", "d/predictions.quarantine.parquet", "d/prompts.parquet")
        assert list(planned("d")) == ["Oslo"]

    def test_but_what_is_named_is(self, here):
        here("d/prompts.parquet", "d/data.pq")
        assert list(planned("d/prompts.parquet", "d/data.pq")) == ["data", "prompts"]

    @pytest.mark.parametrize(
        "hidden", [".git/x.parquet", "_tmp/x.parquet", ".x.parquet", "_x.parquet", "a/_b/c/x.parquet"]
    )
    def test_hidden_names_are_passed_over(self, hidden, here):
        folder = here(f"d/{hidden}", "d/Oslo.parquet")
        assert list(planned("d")) == list(planned((folder / "d").as_uri())) == ["Oslo"]

    @pytest.mark.parametrize("pattern", ["city=*", "city=*/regions.parquet", "**/regions.parquet", "c?ty=[AB]*"])
    def test_quoted_globs(self, pattern, here):
        here(*(f"city={name}/{file}" for name in ("A", "B") for file in (REGIONS, MOBILITY)))
        assert planned(pattern) == {name: (f"city={name}/{REGIONS}", f"city={name}/{MOBILITY}") for name in ("A", "B")}

    def test_a_name_with_a_globs_signs_is_a_name_first(self, here):
        here("[x].parquet", "x.parquet")
        assert list(planned("[x].parquet")) == ["[x]"]

    def test_an_input_named_twice_is_one(self, here):
        here("d/Oslo.parquet", "d/Bergen.parquet")
        assert planned("d", "d/Oslo.parquet", "d/*.parquet") == planned("d")

    @pytest.mark.parametrize("inputs", [("a", "b"), ("a/Oslo.parquet", "b/Oslo.parquet"), ("*/Oslo.parquet",)])
    def test_two_cities_of_one_name_are_refused(self, inputs, here):
        here("a/Oslo.parquet", "b/Oslo.parquet")
        with pytest.raises(UsageError, match="two inputs are the city 'Oslo'") as caught:
            plan(inputs, "out", mobility=True)
        assert {caught.value.file, caught.value.found} == {"a/Oslo.parquet", "b/Oslo.parquet"}

    @pytest.mark.parametrize("given", ["nowhere", "nowhere.parquet", "*.nothing", "empty", "", "x" * 5000])
    def test_nothing_is_an_error(self, given, here):
        here("empty/notes.txt", "Oslo.parquet")
        with pytest.raises(NoInput, match="no regions table found"):
            plan([given], "out", mobility=True)

    def test_one_input_of_several_that_is_nothing_is_an_error(self, here):
        here("Oslo.parquet")
        with pytest.raises(NoInput, match="nowhere"):
            plan(["Oslo.parquet", "nowhere"], "out", mobility=True)


class TestLinks:
    def test_a_linked_file_or_folder_is_read(self, here):
        folder = here("far/Oslo.parquet", "near/x")
        (folder / "near" / "Bergen.parquet").symlink_to(folder / "far" / "Oslo.parquet")
        (folder / "link").symlink_to(folder / "near")
        assert planned("link") == {"Bergen": ("link/Bergen.parquet", None)}

    def test_a_linked_folder_below_is_not_followed(self, here):
        folder = here("near/Oslo.parquet")
        (folder / "near" / "round").symlink_to(folder)
        assert list(planned("near")) == ["Oslo"]

    def test_a_link_to_nowhere_is_a_city_that_will_fail(self, here):
        folder = here("d/Oslo.parquet")
        (folder / "d" / "Bergen.parquet").symlink_to("nowhere")
        (folder / "d" / "loop.parquet").symlink_to("loop.parquet")
        assert set(planned("d")) == {"Bergen", "Oslo", "loop"}


class TestOutputs:
    def test_every_city_has_a_folder(self, here):
        here("Oslo.parquet")
        for out in ("out", "out/", "/abs/out", "s3://bucket/out/"):
            (job,) = plan(["Oslo.parquet"], out, mobility=True)
            assert job.out == f"{out.rstrip('/')}/city=Oslo/predictions.parquet"

    @pytest.mark.parametrize("name", ["São Paulo", "a=b", "50%", "what?", "a:b", "{c}", "'d'", "Zürich #2", "日本"])
    def test_readers_of_partitions_see_the_names(self, name, here):
        folder = here(f"{name}.parquet")
        (job,) = plan([f"{name}.parquet"], str(folder / "out"), mobility=True)
        assert job.name == name
        out = Path(job.out)
        assert out.parent.parent == folder / "out"
        out.parent.mkdir(parents=True)
        pq.write_table(pa.table({"x": [1]}), out)
        partitioned = ds.partitioning(pa.schema([("city", pa.string())]), flavor="hive")
        assert ds.dataset(folder / "out", partitioning=partitioned).to_table().column("city").to_pylist() == [name]
        (job,) = plan([f"{name}.parquet"], (folder / "out").as_uri(), mobility=True)
        from pyarrow import fs

        assert fs.FileSystem.from_uri(job.out)[1] == str(out), "the same place as a URI"

    def test_a_name_that_is_not_utf_8(self, here):
        name = os.fsdecode(b"M\xfcnchen")
        here(f"{name}.parquet")
        (job,) = plan([f"{name}.parquet"], "out", mobility=True)
        assert job.out == f"out/city={name}/predictions.parquet"

    def test_the_largest_comes_first(self, here):
        here("d/small.parquet", size=10)
        here("d/large.parquet", size=30)
        here("d/flows.parquet", size=20)
        here("d/flows.mobility.parquet", size=20)
        here("d/alike.parquet", size=10)
        jobs = plan(["d"], "out", mobility=True)
        assert [(job.name, job.size) for job in jobs] == [("flows", 40), ("large", 30), ("alike", 10), ("small", 10)]
        assert [job.name for job in plan(["d"], "out", mobility=False)] == ["large", "flows", "alike", "small"]


class TestUris:
    @pytest.mark.parametrize("given", ["d", "d/", "d/city=S%C3%A3o Paulo", "d/city=São Paulo"])
    def test_folders(self, given, here):
        folder = here("d/city=São Paulo/regions.parquet", "d/city=São Paulo/mobility.parquet")
        uri = f"{folder.as_uri()}/{given.replace('S%C3%A3o', 'São').replace('ã', '%C3%A3').replace(' ', '%20')}"
        base = f"{folder.as_uri()}/d/city=S%C3%A3o%20Paulo"
        assert planned(uri) == {"São Paulo": (f"{base}/regions.parquet", f"{base}/mobility.parquet")}

    def test_files(self, here):
        folder = here("d/Oslo.parquet", "d/Oslo.mobility.parquet", "e/Bergen.parquet", "e/mobility.parquet")
        base = folder.as_uri()
        assert planned(f"{base}/d/Oslo.parquet", f"{base}/e/Bergen.parquet") == {
            "Oslo": (f"{base}/d/Oslo.parquet", f"{base}/d/Oslo.mobility.parquet"),
            "Bergen": (f"{base}/e/Bergen.parquet", f"{base}/e/mobility.parquet"),
        }

    def test_sizes_are_those_of_the_files(self, here):
        folder = here("d/Oslo.parquet", "d/Oslo.mobility.parquet", size=20)
        for given in ("d", "d/Oslo.parquet"):
            (there,), (near,) = (plan([place], "out", mobility=True) for place in (f"{folder.as_uri()}/{given}", given))
            assert there.size == near.size == 40

    def test_nothing(self, here):
        folder = here("empty/notes.txt")
        for given in ("empty", "nowhere", "nowhere.parquet"):
            with pytest.raises(NoInput):
                plan([f"{folder.as_uri()}/{given}"], "out", mobility=True)

    @pytest.mark.parametrize("given", ["http://host/x.parquet", "hdfs://host/x", "ftp://x"])
    def test_other_kinds_are_refused(self, given):
        with pytest.raises(UsageError, match="unknown kind of address") as caught:
            plan([given], "out", mobility=True)
        assert "s3://" in caught.value.expected

    def test_settings_go_with_every_file_and_are_told_nowhere(self):
        assert (
            joined("s3://bucket/out?scheme=http", "city=A/x.parquet") == "s3://bucket/out/city=A/x.parquet?scheme=http"
        )
        assert joined("out?", "a?") == "out?/a?", "of a path it is a part"
        assert shown("s3://key:secret@bucket/x?scheme=http") == "s3://key@bucket/x"
        assert shown("what?") == "what?"

    def test_the_path_of_a_place_on_this_machine(self):
        assert local_path("out/a b%20c") == Path("out/a b%20c"), "a path is not escaped"
        assert local_path("file:///out/a%20b/x.parquet") == Path("/out/a b/x.parquet")
        assert local_path("s3://bucket/out") is None

    def test_azures_account_comes_from_the_environment(self, monkeypatch):
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
        with pytest.raises(UsageError, match="AZURE_STORAGE_ACCOUNT"):
            plan(["az://container/x"], "out", mobility=True)


class TestAlone:
    """One city, whose output is a file, or many."""

    def test_one_table(self, here):
        here("d/regions.parquet", "Oslo.parquet")
        for given in ("d", "d/", "d/regions.parquet"):
            assert one_city([given], None) == one_city([given], "new.parquet") == Path("d/regions.parquet")
        assert one_city(["Oslo.parquet"], None) == Path("Oslo.parquet")
        assert one_city(["nowhere.parquet"], None) == Path("nowhere.parquet"), "which is then said not to be there"
        assert one_city(["x" * 300], "y" * 300) == Path("x" * 300)

    def test_many(self, here):
        here("d/city=A/regions.parquet", "d/city=B/regions.parquet", "Oslo.parquet")
        for inputs in (["d"], ["d/*"], ["d/city=A", "d/city=B"], ["Oslo.parquet", "d"], ["file:///Oslo.parquet"]):
            assert one_city(inputs, None) is None
        for out in ("d", "new/", "s3://bucket"):
            assert one_city(["Oslo.parquet"], out) is None
