"""The batch on a real local Spark session: the same bytes, and nothing lost with a worker that is killed."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from batch import BLIND, ancestor, kill_at_work, outputs, spoil, start
from commands import PATIENCE_S, environment, shell

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("pyspark") is None, reason="no Spark here: pip install 'topt-deploy[spark]'"),
    pytest.mark.skipif(shutil.which("java") is None, reason="no Java here: apt-get install openjdk-17-jre-headless"),
]
SUBMITTED = Path(__file__).parents[3] / "examples/spark/topt_run.py"
DONE, PARTIAL, BAD_DATA, NO_DEVICE, TRY_AGAIN = 0, 3, 65, 69, 75


@pytest.fixture
def on_spark(demo_bundle, tmp_path):
    """Predict these inputs on Spark: a process that is under way."""

    def call(*inputs):
        command = ["topt-run", "predict", *inputs, "--bundle", demo_bundle, "--out", "out", "--engine", "spark"]
        return start([*command, "--workers", "2", "--log-format", "json"], tmp_path)

    return call


def ended(process):
    """Its code, its cities by name, its last line, and what it said besides."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert out, err
    *lines, last = [json.loads(line) for line in out.splitlines()]
    assert len({line["city"] for line in lines}) == len(lines), "each city once"
    return process.returncode, {line["city"]: line for line in lines}, last, err


def test_the_same_bytes_with_a_bad_city_and_a_killed_worker(on_spark, one_slow, tmp_path):
    given, expected = one_slow
    cities = shutil.copytree(given, tmp_path / "cities")
    spoil(cities / "city=B")
    (cities / "city=D/regions.parquet").write_bytes(b"no Parquet")
    process = on_spark("cities")
    killed = kill_at_work(tmp_path / "out/city=C/predictions.parquet", 1, lambda: process.poll() is None)
    code, found, last, err = ended(process)
    assert len(killed) == 1
    assert code == PARTIAL, err
    assert {name: line["status"] for name, line in found.items()} == {
        "A": "done", "B": "failed", "C": "done", "D": "failed", "E": "done", "F": "done",
    }  # fmt: skip
    assert all(found[name]["error"]["exit_code"] == BAD_DATA for name in "BD")
    assert last["cities"] == {"done": 4, "failed": 2}
    assert outputs(tmp_path / "out") == {k: v for k, v in expected.items() if k[5] in "ACEF"}
    assert [line for line in err.splitlines() if "cities," not in line] == []


def test_a_city_that_kills_its_workers_fails_alone(on_spark, one_slow, demo_bundle, tmp_path):
    cities, expected = one_slow
    process = on_spark(cities)
    killed = kill_at_work(tmp_path / "out/city=C/predictions.parquet", 2, lambda: process.poll() is None)
    code, found, last, err = ended(process)
    assert len(killed) == 2
    assert code == TRY_AGAIN, err
    assert found["C"]["error"]["exit_code"] == TRY_AGAIN
    assert last["cities"] == {"done": 5, "failed": 1}
    said = shell(f"topt-run predict {cities} --bundle {demo_bundle} --out out --resume", tmp_path)
    assert said.out.splitlines()[0] == "6 cities: 1 done, 5 skipped"
    assert outputs(tmp_path / "out") == expected


def test_submitted_to_a_cluster_that_loses_an_executor(one_slow, demo_bundle, tmp_path):
    """spark-submit, and a cluster of two executors, JVMs of their own, one of which is killed with a city at work."""
    cities, expected = one_slow
    submit = Path(find_spec("pyspark").origin).parent / "bin/spark-submit"
    words = ["predict", cities, "--bundle", demo_bundle, "--out", tmp_path / "out", "--engine", "spark"]
    settings = ["--conf", "spark.ui.enabled=false", "--conf", f"spark.local.dir={tmp_path}"]
    process = start(
        [submit, "--master", "local-cluster[2,1,1024]", *settings, SUBMITTED, *words, "--log-format", "json"], tmp_path,
        PYSPARK_PYTHON=sys.executable, PYSPARK_DRIVER_PYTHON=sys.executable,
    )  # fmt: skip
    killed = kill_at_work(
        tmp_path / "out/city=C/predictions.parquet", 1, lambda: process.poll() is None,
        lambda pid: ancestor(pid, "CoarseGrainedExecutorBackend"),
    )  # fmt: skip
    code, found, last, err = ended(process)
    assert len(killed) == 1
    assert "Lost executor" in err
    assert code == DONE, err
    assert len(found) == 6
    assert last["cities"] == {"done": 6}
    assert outputs(tmp_path / "out") == expected


def test_a_bundle_that_a_node_cannot_see(cities, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BLIND.format(engine="spark"), cities, tmp_path / "out"], env=environment(),
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout.split() == ["66"] * 6, done
    assert "put the same bundle where every node sees it" in done.stderr


@pytest.mark.parametrize("lacking", ["pyspark", "java"])
def test_without_it_it_is_said(lacking, cities, demo_bundle, tmp_path):
    (tmp_path / "pyspark.py").write_text("raise ImportError('none here')")
    more = {"PYTHONPATH": str(tmp_path)} if lacking == "pyspark" else {"JAVA_HOME": "/nonexistent"}
    command = f"topt-run predict {cities} --bundle {demo_bundle} --out out --engine spark"
    said = shell(command, tmp_path, **more)
    assert said.code == NO_DEVICE, said
    assert ("topt-deploy[spark]" if lacking == "pyspark" else "Java 17") in said.err
    assert said.err.startswith("error: ")
