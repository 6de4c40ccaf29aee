"""The batch on a real Ray cluster of this machine: the same bytes, and nothing lost with a worker that is killed."""

import json
import secrets
import subprocess
import sys
from importlib.util import find_spec

import pytest
from batch import BLIND, kill_at_work, outputs, spoil, start
from commands import PATIENCE_S, environment, shell

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="no Ray here: pip install 'topt-deploy[ray]'"),
]
DONE, PARTIAL, BAD_DATA, NO_DEVICE, TRY_AGAIN = 0, 3, 65, 69, 75
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
CLUSTER = """\
import sys, ray
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a cluster of three processors that runs in another folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        cwd=tmp_path_factory.mktemp("ray"),
        env=environment(**TOKEN),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    address = process.stdout.readline().strip()
    assert address, "Ray does not start"
    yield address
    process.communicate("", timeout=PATIENCE_S)


@pytest.fixture
def on_ray(cluster, demo_bundle, tmp_path):
    """Predict these inputs on the cluster: a process that is under way."""

    def call(*inputs):
        command = ["topt-run", "predict", *inputs, "--bundle", demo_bundle, "--out", "out", "--engine", "ray"]
        return start([*command, "--workers", "2", "--log-format", "json"], tmp_path, RAY_ADDRESS=cluster, **TOKEN)

    return call


def ended(process):
    """Its code, its cities by name, its last line, and what it said besides."""
    out, err = process.communicate(timeout=PATIENCE_S)
    *lines, last = [json.loads(line) for line in out.splitlines()]  # and nothing of Ray's own
    assert len({line["city"] for line in lines}) == len(lines), "each city once"
    return process.returncode, {line["city"]: line for line in lines}, last, err


def test_the_same_bytes_and_only_our_lines(on_ray, cities, apart, tmp_path):
    process = on_ray(cities)
    code, found, last, err = ended(process)
    assert code == DONE, err
    assert outputs(tmp_path / "out") == apart
    assert {line["status"] for line in found.values()} == {"done"}
    assert last["cities"] == {"done": 6}
    assert [line for line in err.splitlines() if "cities," not in line] == []


def test_bad_cities_among_good_ones(on_ray, mine, apart, tmp_path):
    spoil(mine / "city=B")
    (mine / "city=D/regions.parquet").write_bytes(b"no Parquet")
    code, found, last, err = ended(on_ray("cities"))  # a path of the command's folder, not of the workers'
    assert code == PARTIAL, err
    assert {name for name, line in found.items() if line["status"] == "failed"} == {"B", "D"}
    assert all(found[name]["error"]["exit_code"] == BAD_DATA for name in "BD")
    assert set(found["A"]["regions"]) <= {"ok", "extrapolated"}
    assert all(isinstance(count, int) for count in found["A"]["regions"].values())
    assert last["cities"] == {"done": 4, "failed": 2}
    assert outputs(tmp_path / "out") == {k: v for k, v in apart.items() if k[5] in "ACEF"}


def test_a_killed_worker_loses_nothing(on_ray, one_slow, tmp_path):
    cities, expected = one_slow
    process = on_ray(cities)
    killed = kill_at_work(tmp_path / "out/city=C/predictions.parquet", 1, lambda: process.poll() is None)
    code, found, _, err = ended(process)
    assert len(killed) == 1
    assert code == DONE, err
    assert len(found) == 6
    assert outputs(tmp_path / "out") == expected


def test_a_city_that_kills_its_workers_fails_alone(on_ray, one_slow, tmp_path):
    cities, expected = one_slow
    process = on_ray(cities)
    killed = kill_at_work(tmp_path / "out/city=C/predictions.parquet", 2, lambda: process.poll() is None)
    code, found, last, err = ended(process)
    assert len(killed) == 2
    assert code == TRY_AGAIN, err
    assert found["C"]["error"]["exit_code"] == TRY_AGAIN
    assert last["cities"] == {"done": 5, "failed": 1}
    again = on_ray(cities, "--resume")
    assert ended(again)[2]["cities"] == {"done": 1, "skipped": 5}
    assert outputs(tmp_path / "out") == expected


def test_a_local_cluster_of_its_own(cities, apart, demo_bundle, tmp_path):
    said = shell(f"topt-run predict {cities} --bundle {demo_bundle} --out out --engine ray --workers 2", tmp_path)
    assert said.code == DONE, said
    assert outputs(tmp_path / "out") == apart
    assert said.out.splitlines()[0] == "6 cities: 6 done"
    assert [line for line in said.err.splitlines() if "cities," not in line] == []


def test_a_cluster_that_does_not_let_us_in(cluster, cities, demo_bundle, tmp_path):
    command = f"topt-run predict {cities} --bundle {demo_bundle} --out out --engine ray"
    said = shell(command, tmp_path, RAY_ADDRESS=cluster, **TOKEN | {"RAY_AUTH_TOKEN": "0" * 64})
    assert said.code == NO_DEVICE, said
    assert said.err.startswith("error: Ray's cluster does not answer")
    assert cluster in said.err


def test_a_bundle_that_a_node_cannot_see(cluster, cities, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BLIND.format(engine="ray"), cities, tmp_path / "out"],
        env=environment(RAY_ADDRESS=cluster, **TOKEN), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout.split() == ["66"] * 6, done
    assert "put the same bundle where every node sees it" in done.stderr


def test_without_ray_it_is_said(cities, demo_bundle, tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('none here')")
    command = f"topt-run predict {cities} --bundle {demo_bundle} --out out --engine ray"
    said = shell(command, tmp_path, PYTHONPATH=str(tmp_path))
    assert said.code == NO_DEVICE
    assert "none here" in said.err
    assert "topt-deploy[ray]" in said.err
