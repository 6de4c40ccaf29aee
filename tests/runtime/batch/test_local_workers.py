"""Many cities on one machine: each as if it were alone, and nothing lost with whoever dies."""

import json
import os
import shutil
import signal
import sys

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from batch import NAMES, alive, children, done, kill, outputs, spoil, start, wait_for, write_cities
from commands import PATIENCE_S, shell, without_privileges

from topt_deploy.runtime.batch import local_workers
from topt_deploy.runtime.predict_city import CityJob

DONE, USAGE, PARTIAL, BAD_DATA, NO_INPUT, NO_DEVICE, CANNOT_CREATE, TRY_AGAIN = 0, 2, 3, 65, 66, 69, 73, 75
BAD_BUNDLE, INTERRUPTED, TERMINATED = 76, 130, 143
PER_CITY = {"predictions.parquet", "predictions.receipt.json"}


def said_of(said):
    """JSON lines: those of the cities by name, and the last one, of the batch."""
    *lines, last = [json.loads(line) for line in said.out.splitlines()]
    assert all(line["event"] == "city" for line in lines)
    return {line["city"]: line for line in lines}, last


class TestSameBytes:
    @pytest.mark.parametrize("workers", [1, 2, 7])
    def test_every_city_is_what_it_is_alone(self, workers, cities, apart, batch, tmp_path):
        said = batch(cities, "--workers", workers)
        assert said.code == DONE, said
        assert outputs(tmp_path / "out") == apart
        for name in NAMES:
            assert {path.name for path in (tmp_path / "out" / f"city={name}").iterdir()} == PER_CITY
        assert said.out.splitlines()[0] == "6 cities: 6 done"

    def test_any_input_that_names_them(self, cities, apart, batch, tmp_path):
        said = batch("../cities/city=[A-C]", *(cities / f"city={n}" for n in "DE"), cities / "city=F/regions.parquet")
        assert said.code != DONE, "the glob finds nothing"
        (tmp_path / "near").symlink_to(cities)
        said = batch("near/city=[A-C]", *(cities / f"city={n}" for n in "DE"), cities / "city=F/regions.parquet")
        assert said.code == DONE, said
        assert outputs(tmp_path / "out") == apart

    def test_options_reach_every_city(self, cities, batch, tmp_path):
        said = batch(cities, "--wide", "--task", "crime", "--coverage", "0.5", "--on-bad-row", "mask")
        assert said.code == DONE, said
        for name in NAMES:
            folder = tmp_path / "out" / f"city={name}"
            table = pq.read_table(folder / "predictions.parquet", partitioning=None)
            columns = ["city_id", "region_id", "crime", "crime_lower", "crime_upper", "status", "reason", "geometry"]
            assert table.column_names == columns
            assert set(table.column("city_id").to_pylist()) == {name}
            options = json.loads((folder / "predictions.receipt.json").read_text())["options"]
            assert options["coverage"] == {"crime": 0.5}
            assert options["on_bad_row"] == "mask"

    def test_the_folders_are_partitions_of_one_table(self, cities, batch, tmp_path):
        assert batch(cities).code == DONE
        files = [str(file) for file in (tmp_path / "out").glob("*/predictions.parquet")]
        table = ds.dataset(files, partitioning="hive").to_table()
        assert sorted(set(table.column("city").to_pylist())) == list(NAMES)
        assert table.column("city").to_pylist() == table.column("city_id").to_pylist()

    def test_flat_files_and_flows_of_all(self, mine, batch, tmp_path):
        """Ids repeat between cities; the shared flows tell them apart by city_id."""
        flat, shared = tmp_path / "flat", tmp_path / "shared"
        flat.mkdir()
        shared.mkdir()
        every = []
        for name in "AB":
            regions = pq.read_table(mine / f"city={name}/regions.parquet", partitioning=None)
            flows = pq.read_table(mine / f"city={name}/mobility.parquet", partitioning=None)
            regions = regions.append_column("city_id", pa.array([name] * len(regions)))
            every.append(flows.append_column("city_id", pa.array([name] * len(flows))))
            pq.write_table(regions, flat / f"{name}.parquet")
            pq.write_table(regions, shared / f"{name}.parquet")
            pq.write_table(flows, flat / f"{name}.mobility.parquet")
        pq.write_table(pa.concat_tables(every), shared / "mobility.parquet")
        for given in ("flat", "shared"):
            assert batch(given, out=f"out-{given}").code == DONE
        assert len(outputs(tmp_path / "out-flat")) == 2
        assert outputs(tmp_path / "out-flat") == outputs(tmp_path / "out-shared")


class TestBadCities:
    def test_the_others_are_done(self, mine, apart, batch, tmp_path):
        spoil(mine / "city=B")
        (mine / "city=D/regions.parquet").write_bytes(b"no Parquet")
        (mine / "city=E/mobility.parquet").unlink()
        said = batch(mine, "--log-format", "json")
        assert said.code == PARTIAL
        cities, last = said_of(said)
        assert {name: line["status"] for name, line in cities.items()} == {
            "A": "done", "B": "failed", "C": "done", "D": "failed", "E": "failed", "F": "done",
        }  # fmt: skip
        codes = {name: cities[name]["error"]["exit_code"] for name in "BDE"}
        assert codes == {"B": BAD_DATA, "D": BAD_DATA, "E": NO_INPUT}
        assert cities["B"]["error"]["file"] == f"{mine}/city=B/regions.parquet"
        assert last["cities"] == {"done": 3, "failed": 3}
        assert outputs(tmp_path / "out") == {k: v for k, v in apart.items() if k[5] in "ACF"}

    def test_people_read_which_and_why(self, mine, batch):
        spoil(mine / "city=B")
        said = batch(mine)
        assert said.code == PARTIAL
        (line,) = [line for line in said.err.splitlines() if line.startswith("B: error: ")]
        assert "counts must be finite and not negative" in line
        assert said.out.splitlines()[0] == "6 cities: 5 done, 1 failed"
        assert "Traceback" not in said.err

    def test_an_older_output_of_a_city_that_fails_stays(self, mine, batch, tmp_path):
        assert batch(mine).code == DONE
        before = outputs(tmp_path / "out")
        spoil(mine / "city=B")
        assert batch(mine).code == PARTIAL
        assert outputs(tmp_path / "out") == before

    def test_rows_set_aside(self, mine, batch, apart, tmp_path):
        spoil(mine / "city=B")
        said = batch(mine, "--on-bad-row", "quarantine", "--log-format", "json")
        assert said.code == PARTIAL
        cities, last = said_of(said)
        assert cities["B"]["status"] == "partial"
        assert cities["B"]["set_aside"]["regions"] == {"bad_count": 1}
        assert last["cities"] == {"done": 5, "partial": 1}
        found = outputs(tmp_path / "out")
        assert {name.rpartition("/")[2] for name in found.keys() - apart.keys()} == {
            "predictions.quarantine.parquet",
            "predictions.quarantine_mobility.parquet",
        }
        assert {k: v for k, v in found.items() if k[5] != "B"} == {k: v for k, v in apart.items() if k[5] != "B"}


class TestWhereNothingCanBegin:
    @pytest.mark.parametrize(
        ("arguments", "code", "part"),
        [
            (("nowhere",), NO_INPUT, "no regions table found"),
            (("--task", "theft", "cities"), USAGE, "does not predict 'theft'"),
            (("--mobility", "m.parquet", "cities"), USAGE, "--mobility is for one city only"),
            (("--geo", "map.gpkg", "cities"), USAGE, "--geo is for one city only"),
            (("--device", "cuda", "cities"), NO_DEVICE, "device 'cuda'"),
            (("http://host/x",), USAGE, "unknown kind of address"),
        ],
    )
    def test_it_is_said_and_no_output_made(self, arguments, code, part, mine, batch, tmp_path):
        if "cuda" in arguments:
            import onnxruntime

            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                pytest.skip("this ONNX Runtime has CUDA")
        said = batch(*arguments, out="out/")
        assert said.code == code, said
        assert part in said.err
        assert said.err.startswith("error: ")
        assert not (tmp_path / "out").exists()

    def test_many_cities_without_a_place(self, cities, demo_bundle, tmp_path):
        said = shell(f"topt-run predict {cities} --bundle {demo_bundle}", tmp_path)
        assert said.code == USAGE
        assert "--out" in said.err

    def test_a_spoilt_bundle(self, cities, demo_bundle, tmp_path):
        bundle = shutil.copytree(demo_bundle, tmp_path / "model.topt")
        weights = bundle / "models" / "topt.weights"
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
        said = shell(f"topt-run predict {cities} --bundle model.topt --out out", tmp_path)
        assert said.code == BAD_BUNDLE, said
        assert said.err.count("error: ") == 1

    def test_into_the_bundle(self, cities, demo_bundle, tmp_path):
        bundle = shutil.copytree(demo_bundle, tmp_path / "model.topt")
        said = shell(f"topt-run predict {cities} --bundle model.topt --out model.topt/out", tmp_path)
        assert said.code == USAGE
        assert "into the bundle" in said.err
        assert not (bundle / "out").exists()

    def test_a_place_that_takes_no_files(self, cities, batch):
        said = batch(cities, out="/proc")
        assert said.code == CANNOT_CREATE, said
        assert "Traceback" not in said.err

    def test_a_folder_that_may_not_be_listed(self, mine, demo_bundle, tmp_path):
        """Its cities must not be left out in silence."""
        (mine / "city=B").chmod(0)
        said = shell(f"topt-run predict cities --bundle {demo_bundle} --out out", tmp_path, before=without_privileges)
        (mine / "city=B").chmod(0o755)
        assert said.code == 77, said
        assert "city=B" in said.err


MANY = [f"{n:03d}" for n in range(60)]


@pytest.fixture(scope="module")
def many(shared, once, demo_city):
    """Sixty cities: some seconds of work for two workers."""
    once("many", lambda folder: write_cities(folder / "many", demo_city, MANY, regions=12))
    return shared / "many"


@pytest.fixture(scope="module")
def undisturbed(shared, once, many, demo_bundle):
    """What they are where nobody is killed."""
    command = f"topt-run predict many --bundle {demo_bundle} --out undisturbed --workers 2"
    once("undisturbed", lambda folder: shell(command, folder))
    return outputs(shared / "undisturbed")


@pytest.fixture
def begun(many, demo_bundle, tmp_path):
    """A batch of many cities that is at work, and has some of them done."""
    out = tmp_path / "out"
    started = []

    def call(*options):
        process = start(
            ["topt-run", "predict", many, "--bundle", demo_bundle, "--out", out, "--workers", 2, *options], tmp_path
        )
        started.append(process)
        wait_for(lambda: done(out) >= 3 or process.poll() is not None, "three cities")
        assert process.poll() is None, process.communicate()
        return process

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=PATIENCE_S)


class TestDeath:
    def test_killed_workers_lose_nothing(self, begun, undisturbed, tmp_path):
        process = begun()
        killed = set()
        for at in (3, 20, 40):
            wait_for(lambda at=at: done(tmp_path / "out") >= at, f"{at} cities")
            if victims := [pid for pid in children(process.pid) if pid not in killed]:
                kill(victims[0])
                killed.add(victims[0])
        out, err = process.communicate(timeout=PATIENCE_S)
        assert len(killed) == 3
        assert process.returncode == DONE, err
        assert out.splitlines()[0] == "60 cities: 60 done"
        assert outputs(tmp_path / "out") == undisturbed

    def test_all_workers_at_once(self, begun, undisturbed, tmp_path):
        process = begun()
        for pid in children(process.pid):
            kill(pid)
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == DONE
        assert outputs(tmp_path / "out") == undisturbed

    def test_a_city_that_kills_its_workers_fails_alone(self, cities, apart, demo_bundle, tmp_path):
        script = f"""\
import os, signal, sys
from pathlib import Path
from topt_deploy.runtime.batch import city_task, run_batch
def deadly(job, **more):
    if job.name == "C":
        with open("tries", "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return city_task.work(job, **more)
run_batch.work = deadly
from topt_deploy.runtime.cli import main
sys.argv = ["topt-run", "predict", {str(cities)!r}, "--bundle", {str(demo_bundle)!r}, "--out", "out", "--workers", "2",
            "--log-format", "json"]
main()
"""
        process = start([sys.executable, "-c", script], tmp_path)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == TRY_AGAIN, err
        assert (tmp_path / "tries").read_text() == "xx"
        lines = [json.loads(line) for line in out.splitlines()]
        (lost,) = [line for line in lines if line.get("status") == "failed"]
        assert lost["city"] == "C"
        assert lost["error"]["exit_code"] == TRY_AGAIN
        assert "killed by SIGKILL" in lost["error"]["message"]
        assert "--resume" in lost["error"]["to_do"]
        assert outputs(tmp_path / "out") == {k: v for k, v in apart.items() if k[5] != "C"}

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
    def test_workers_end_where_their_parent_is_killed(self, how, begun, many, undisturbed, demo_bundle, tmp_path):
        process = begun()
        workers = children(process.pid)
        assert len(workers) == 2
        kill(process.pid, how)
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: TERMINATED}[how]
        wait_for(lambda: not any(alive(pid) for pid in workers), "the workers' end")
        finished = done(tmp_path / "out")
        assert 3 <= finished < len(MANY)
        said = shell(f"topt-run predict {many} --bundle {demo_bundle} --out out --resume", tmp_path)
        assert said.code == DONE, said
        assert f"{finished} skipped" in said.out
        assert outputs(tmp_path / "out") == undisturbed

    def test_control_c(self, begun, tmp_path):
        process = begun()
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == INTERRUPTED
        assert err.strip() == "interrupted"
        assert out == ""
        assert not any(alive(pid) for pid in workers)
        left = {path.name for path in (tmp_path / "out").glob("city=*/*")}
        assert left == PER_CITY, "what was begun is whole or gone, and no lock is left"


def test_a_name_that_is_not_utf_8(cities, apart, batch, tmp_path):
    name = os.fsdecode(b"M\xfcnchen")
    shutil.copytree(cities / "city=A", tmp_path / "in" / name)
    shutil.copytree(cities / "city=B", tmp_path / "in" / "city=B")
    said = batch("in", "--log-format", "json")
    assert said.code == DONE, said
    assert (tmp_path / "out" / f"city={name}" / "predictions.parquet").is_file()
    assert outputs(tmp_path / "out")["city=B/predictions.parquet"] == apart["city=B/predictions.parquet"]


def test_small_cities_have_two_workers_per_processor(monkeypatch):
    """They wait for the disk as long as they are worked on; large ones take memory."""
    monkeypatch.setattr(local_workers, "usable_cpus", lambda: 3)
    small, large = (
        CityJob(name="", regions="", mobility=None, out="", size=size)
        for size in (10_000, local_workers.SMALL_BYTES + 1)
    )
    assert local_workers.workers_for([small, small]) == 6
    assert local_workers.workers_for([small, large]) == 3
