"""What ``--resume`` leaves as it is, and what it does again; and the lock that keeps two from one output."""

import json
import os
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from batch import NAMES, outputs, spoil
from commands import environment, shell

from topt_deploy.storage.locks import locked

DONE, PARTIAL, BAD_DATA, TRY_AGAIN = 0, 3, 65, 75


def touched(path):
    """The same bytes, another time and another file."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))


def rewritten(path, **options):
    """The same table in other bytes."""
    before = path.read_bytes()
    pq.write_table(pq.read_table(path), path, **options)
    assert path.read_bytes() != before


@pytest.fixture
def again(desk, topt_run):
    """Predict the desk's city with ``--resume`` and these options: ``skipped`` or ``predicted``, and its output."""

    def call(*options, code=DONE):
        said = topt_run("predict", desk.regions, "--resume", "--log-format", "json", *options)
        assert said.code == code, said
        return json.loads(said.out)["event"]

    return call


class TestOneCity:
    def test_the_first_time_it_is_predicted(self, again, desk):
        assert again() == "predicted"
        before = desk.state()
        stamps = [path.stat().st_mtime_ns for path in (desk.out, desk.receipt)]
        assert again() == "skipped"
        assert desk.state() == before
        assert [path.stat().st_mtime_ns for path in (desk.out, desk.receipt)] == stamps

    def test_without_the_option_it_is_done_again(self, again, desk, topt_run):
        again()
        stamp = desk.out.stat().st_mtime_ns
        assert topt_run("predict", desk.regions).code == DONE
        assert desk.out.stat().st_mtime_ns != stamp

    def test_people_are_told(self, again, desk, topt_run):
        again()
        said = topt_run("predict", desk.regions, "--resume")
        assert f"predictions {desk.out}, as they were" in said.out

    @pytest.mark.parametrize("name", ["regions", "mobility"])
    def test_content_counts_and_not_time_or_place(self, name, again, desk):
        again()
        touched(getattr(desk, name))
        assert again() == "skipped"
        touched(desk.out)
        assert again() == "skipped"
        moved = shutil.copy(getattr(desk, name), desk.folder / f"other-{name}.parquet")
        if name == "mobility":
            assert again("--mobility", moved) == "skipped"
        rewritten(getattr(desk, name), compression="zstd")
        assert again() == "predicted"
        assert again() == "skipped"

    @pytest.mark.parametrize(
        "options",
        [("--task", "crime"), ("--wide",), ("--coverage", "0.5"), ("--on-bad-row", "mask"), ("--id-col", "text")],
    )
    def test_another_option(self, options, again, desk):
        if "text" in options:
            table = pq.read_table(desk.regions)
            place = table.schema.get_field_index("text")
            pq.write_table(table.set_column(place, "text", table.column("region_id")), desk.regions)
        again()
        assert again(*options) == "predicted"
        assert again(*options) == "skipped"
        assert again() == "predicted"

    def test_what_says_the_same_is_the_same(self, again):
        again()
        assert again("--coverage", "0.9", "--threads", "2", "--no-cache") == "skipped"
        assert again("--task", "crime", "--task", "check_in", "--task", "service_call") == "skipped"
        assert again("--task", "check_in", "--task", "crime", "--task", "service_call") == "predicted"

    def test_another_bundle(self, again, desk, reseal):
        again()
        shutil.copytree(desk.bundle, desk.folder / "same.topt")
        assert again("--bundle", desk.folder / "same.topt") == "skipped"
        reseal(desk.bundle, lambda record: record["source"].update(city_id="another"))
        assert again() == "predicted"

    def test_another_version(self, again, monkeypatch):
        again()
        monkeypatch.setattr("topt_deploy.runtime.predict_city.__version__", "99.0")
        assert again() == "predicted"

    @pytest.mark.parametrize("tamper", ["flip", "cut", "empty", "gone", "folder"])
    def test_an_output_that_was_tampered_with(self, tamper, again, desk, topt_run):
        again()
        whole = desk.out.read_bytes()
        if tamper in ("gone", "folder"):
            desk.out.unlink()
        else:
            flipped = bytes([*whole[:500], whole[500] ^ 1, *whole[501:]])
            desk.out.write_bytes({"flip": flipped, "cut": whole[:-1], "empty": b""}[tamper])
        if tamper == "folder":
            desk.out.mkdir()
            assert topt_run("predict", desk.regions, "--resume").code == 73
            return
        assert again() == "predicted"
        assert desk.out.read_bytes() == whole

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", "{}", '{"output": 3}', '{"output": {}, "key": 1}', "\udcff", "[" * 10**5]
    )
    def test_a_damaged_receipt(self, text, again, desk):
        again()
        desk.receipt.write_bytes(text.encode(errors="surrogateescape"))
        assert again() == "predicted"
        assert again() == "skipped"

    def test_a_receipt_with_parts_missing(self, again, desk):
        again()
        whole = json.loads(desk.receipt.read_text())
        for key in ("output", "key", "set_aside", "status", "seconds"):
            desk.receipt.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
            assert again() == "predicted", key
            assert json.loads(desk.receipt.read_text()).keys() == whole.keys()
        desk.receipt.write_text(json.dumps(whole | {"output": {"file": "predictions.parquet"}}))
        assert again() == "predicted"

    def test_no_receipt(self, again, desk):
        again()
        desk.receipt.unlink()
        assert again() == "predicted"

    def test_what_was_set_aside_is_part_of_it(self, again, desk):
        spoil(desk.folder)
        options = ("--on-bad-row", "quarantine")
        aside = desk.folder / "predictions.quarantine.parquet"
        assert again(*options, code=PARTIAL) == "predicted"
        assert again(*options, code=PARTIAL) == "skipped", "and the exit code is what it was"
        whole = aside.read_bytes()
        for spoilt in (None, b"other"):
            aside.unlink()
            if spoilt is not None:
                aside.write_bytes(spoilt)
            assert again(*options, code=PARTIAL) == "predicted"
            assert aside.read_bytes() == whole

    def test_a_map_is_made_where_it_is_asked_for(self, again, desk):
        pytest.importorskip("pyogrio", reason="needs the geo extra")
        again()
        assert again("--geo", desk.folder / "map.gpkg") == "predicted"
        assert (desk.folder / "map.gpkg").exists()

    def test_bad_input_is_found_although_an_output_stands(self, again, desk, topt_run):
        again()
        spoil(desk.folder)
        assert topt_run("predict", desk.regions, "--resume").code == BAD_DATA


class TestBatch:
    def test_only_what_is_not_done(self, mine, apart, batch, tmp_path):
        assert batch(mine, "--resume").code == DONE
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
        shutil.rmtree(tmp_path / "out" / "city=B")
        (tmp_path / "out" / "city=C" / "predictions.parquet").write_bytes(b"torn")
        (tmp_path / "out" / "city=D" / "predictions.receipt.json").write_bytes(b"torn")
        rewritten(mine / "city=E" / "regions.parquet", row_group_size=4)
        touched(mine / "city=F" / "regions.parquet")
        said = batch(mine, "--resume", "--log-format", "json")
        assert said.code == DONE
        found = {line["city"]: line["status"] for line in map(json.loads, said.out.splitlines()[:-1])}
        assert found == {name: "skipped" if name in "AF" else "done" for name in NAMES}
        assert json.loads(said.out.splitlines()[-1])["cities"] == {"done": 4, "skipped": 2}
        assert outputs(tmp_path / "out") == apart
        for name in "AF":
            path = tmp_path / "out" / f"city={name}" / "predictions.parquet"
            assert path.stat().st_mtime_ns == stamps[path]

    def test_after_failures(self, mine, cities, apart, batch, tmp_path):
        spoil(mine / "city=B")
        (mine / "city=C/regions.parquet").unlink()
        (mine / "city=C/regions.parquet").symlink_to("nowhere")
        assert batch(mine).code == PARTIAL
        for name in "BC":
            (mine / f"city={name}/regions.parquet").unlink()
            shutil.copy(cities / f"city={name}/regions.parquet", mine / f"city={name}")
        said = batch(mine, "--resume")
        assert said.code == DONE
        assert said.out.splitlines()[0] == "6 cities: 2 done, 4 skipped"
        assert outputs(tmp_path / "out") == apart

    def test_one_city_goes_on_where_a_batch_was(self, cities, demo_bundle, batch, tmp_path):
        """And the other way round: they are the same outputs."""
        assert batch(cities).code == DONE
        one = f"topt-run predict {cities}/city=A --bundle {demo_bundle} --out out/city=A/predictions.parquet"
        said = shell(f"{one} --resume --log-format json", tmp_path)
        assert json.loads(said.out)["event"] == "skipped"

    def test_a_killed_runs_leftovers_are_swept(self, cities, apart, batch, tmp_path):
        folder = tmp_path / "out" / "city=A"
        folder.mkdir(parents=True)
        (folder / ".predictions.0123456789ab.parquet").write_bytes(b"torn")
        (folder / ".predictions.receipt.0123456789ab.json").write_bytes(b"torn")
        (folder / ".predictions.parquet.lock").touch()
        (folder / "notes.txt").write_text("not ours")
        assert batch(cities, "--resume").code == DONE
        assert {path.name for path in folder.iterdir()} == {
            "predictions.parquet", "predictions.receipt.json", "notes.txt",
        }  # fmt: skip


HOLD = "import sys, time; from pathlib import Path; from topt_deploy.storage.atomic import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


@pytest.fixture
def holder():
    """Another process that writes an output, and never ends by itself."""
    started = []

    def call(place):
        process = subprocess.Popen([sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE, env=environment())
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


class TestLock:
    def test_a_second_process_is_told_to_try_again(self, desk, topt_run, holder):
        holder(desk.out)
        before = desk.state()
        said = topt_run("predict", desk.regions)
        assert said.code == TRY_AGAIN
        assert "predictions.parquet: another process is writing this output" in said.err
        assert "wait for it" in said.err
        assert desk.state() == before

    def test_another_output_is_free(self, desk, topt_run, holder):
        holder(desk.out)
        assert topt_run("predict", desk.regions, "--out", desk.folder / "other.parquet").code == DONE

    def test_a_killed_holder_does_not_block(self, desk, topt_run, holder):
        process = holder(desk.out)
        process.kill()
        process.wait()
        lock = desk.folder / ".predictions.parquet.lock"
        assert lock.exists()
        assert topt_run("predict", desk.regions).code == DONE
        assert not lock.exists()

    def test_one_locked_city_of_a_batch(self, cities, apart, batch, holder, tmp_path):
        (tmp_path / "out" / "city=C").mkdir(parents=True)
        process = holder(tmp_path / "out" / "city=C" / "predictions.parquet")
        said = batch(cities)
        assert said.code == TRY_AGAIN
        assert "C: error: " in said.err
        assert "another process is writing this output" in said.err
        process.kill()
        process.wait()
        said = batch(cities, "--resume")
        assert said.code == DONE
        assert said.out.splitlines()[0] == "6 cities: 1 done, 5 skipped"
        assert outputs(tmp_path / "out") == apart

    def test_two_batches_at_once_write_every_city_whole(self, cities, apart, demo_bundle, tmp_path):
        command = f"topt-run predict {cities} --bundle {demo_bundle} --out out --workers 2"
        said = shell(f"{command} & {command}; wait", tmp_path)
        assert said.code in (DONE, TRY_AGAIN)
        assert "Traceback" not in said.err
        assert outputs(tmp_path / "out") == apart

    def test_it_is_let_go_of_after_errors(self, tmp_path):
        place = tmp_path / "x.parquet"
        for _ in range(2):
            with pytest.raises(KeyError), locked(place):
                raise KeyError
        assert list(tmp_path.iterdir()) == []
