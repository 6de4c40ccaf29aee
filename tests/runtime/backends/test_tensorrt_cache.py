"""What is kept of engines, what is trusted of it, and that many processes build one engine once."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import engines
import numpy as np
import pytest
from commands import PATIENCE_S

from topt_deploy.errors import BadBundle, BadConfig, CannotCreate
from topt_deploy.runtime.backends import tensorrt_cache
from topt_deploy.runtime.backends.tensorrt_cache import EngineCache, Fingerprint, cache_folder, cache_limit
from topt_deploy.tensorrt.build import Built

GB = 10**9
MADE = Fingerprint(
    graph="a" * 64, weights="b" * 64, flavour="rtx", version="1.7.1", cuda="13.0", driver="580.95.05",
    gpu="NVIDIA L4", capability="8.9", precision="fp16", profile={"tokens": [1, 512, 2048]},
)  # fmt: skip
OTHER = {
    **dict.fromkeys((f.name for f in fields(Fingerprint)), "another"),
    "profile": {"tokens": [1, 512, 4096]}, "settings": {"topt-deploy": "0"},
}  # fmt: skip
ENGINE = bytes(range(256)) * 40


class Builder:
    """Counts what it builds."""

    def __init__(self, engine=ENGINE, timing=b"timing"):
        self.built, self.engine, self.timing = [], engine, timing

    def __call__(self, timing):
        self.built.append(timing)
        return Built(engine=self.engine, timing_cache=self.timing, messages=())


@pytest.fixture
def build():
    return Builder()


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache" / "engines", GB)


@pytest.fixture(autouse=True)
def _logged(caplog):
    caplog.set_level(logging.INFO)


def path(cache, suffix, fingerprint=MADE):
    return cache.folder / f"{fingerprint.key}{suffix}"


def test_what_was_built_is_used_again(cache, build, caplog):
    assert bytes(cache.engine(MADE, build)) == ENGINE
    assert "miss (nothing is kept)" in caplog.text
    again = EngineCache(cache.folder, GB).engine(MADE, build)
    assert bytes(again) == ENGINE
    assert "hit (10240 bytes)" in caplog.text
    assert len(build.built) == 1


@pytest.mark.parametrize("name", [f.name for f in fields(Fingerprint)])
def test_a_change_of_any_field_misses(name, cache, build, caplog):
    cache.engine(MADE, build)
    changed = replace(MADE, **{name: OTHER[name]})
    assert changed.key != MADE.key
    other = Builder(b"another engine")
    assert bytes(cache.engine(changed, other)) == b"another engine"
    assert f"the nearest entry differs in {name})" in caplog.text
    assert bytes(cache.engine(MADE, build)) == ENGINE, "and the first one is still there"
    assert len(build.built) == 1


def test_the_same_facts_in_another_order_are_the_same_engine():
    profile = {"batch": [1, 1, 4], "tokens": [1, 512, 2048]}
    turned = dict(reversed(profile.items()))
    assert replace(MADE, profile=profile).key == replace(MADE, profile=turned).key


def test_measurements_go_from_build_to_build_on_the_same_gpu(cache, build):
    cache.engine(MADE, build)
    cache.engine(replace(MADE, weights="c" * 64), build)
    cache.engine(replace(MADE, gpu="NVIDIA T4"), build)
    cache.engine(replace(MADE, version="1.8"), build)
    assert build.built == [None, b"timing", None, None]


def test_files_and_folder_are_this_users_alone(tmp_path, build):
    before = os.umask(0)
    try:
        cache = EngineCache(tmp_path / "engines", GB)
        cache.engine(MADE, build)
    finally:
        os.umask(before)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in cache.folder.iterdir()} == {0o600}
    assert len(list(cache.folder.iterdir())) == 3, "engine, record and measurements; no lock, nothing temporary"


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def of_another(file):
    record = json.loads(file.read_text())
    record["fingerprint"]["weights"] = "c" * 64
    file.write_text(json.dumps(record))


def as_link(file):
    file.rename(file.with_suffix(".moved"))
    file.symlink_to(file.with_suffix(".moved"))


SPOILT = {
    "a changed byte": (".engine", flip, "changed or cut off"),
    "cut off": (".engine", lambda f: os.truncate(f, 5000), "changed or cut off"),
    "empty": (".engine", lambda f: os.truncate(f, 0), "empty"),
    "absent": (".engine", Path.unlink, "No such file"),
    "writable by the group": (".engine", lambda f: f.chmod(0o620), "others may write"),
    "writable by all": (".engine", lambda f: f.chmod(0o602), "others may write"),
    "a link": (".engine", as_link, "symbolic links"),
    "a pipe": (".engine", lambda f: (f.unlink(), os.mkfifo(f)), "no plain file"),
    "another's record": (".json", of_another, "another weights"),
    "a record writable by all": (".json", lambda f: f.chmod(0o606), "others may write"),
    "a record that is none": (".json", lambda f: f.write_text("[]"), "cannot be read"),
    "a record cut off": (".json", lambda f: os.truncate(f, 30), "cannot be read"),
    "a record of another kind": (".json", lambda f: f.write_text('{"fingerprint": 1, "sha256": 2}'), "cannot be read"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_not_to_be_trusted_is_built_again(how, cache, build, caplog):
    suffix, spoil, why = SPOILT[how]
    cache.engine(MADE, build)
    spoil(path(cache, suffix))
    assert bytes(cache.engine(MADE, build)) == ENGINE
    assert why in caplog.text
    assert len(build.built) == 2
    assert bytes(cache.engine(MADE, build)) == ENGINE
    assert len(build.built) == 2, "and sound from then on"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("suffix", [".engine", ".json"])
def test_another_users_file_is_built_again(suffix, cache, build, caplog):
    cache.engine(MADE, build)
    os.chown(path(cache, suffix), 12345, -1)
    assert bytes(cache.engine(MADE, build)) == ENGINE
    assert "another user's (12345)" in caplog.text
    assert len(build.built) == 2


def test_measurements_that_others_may_write_are_not_taken(cache, build):
    cache.engine(MADE, build)
    (timing,) = cache.folder.glob("*.timing")
    timing.chmod(0o622)
    cache.engine(replace(MADE, graph="c" * 64), build)
    assert build.built == [None, None]


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_to_is_refused(mode, tmp_path):
    folder = tmp_path / "engines"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(CannotCreate, match="others may write") as caught:
        EngineCache(folder, GB)
    assert "TOPT_CACHE" in caught.value.fix


def test_a_folder_that_is_a_link_or_a_file_is_refused(tmp_path):
    (tmp_path / "there").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(CannotCreate):
            EngineCache(tmp_path / name, GB)


def test_what_was_used_longest_ago_makes_room(tmp_path, build, caplog):
    cache = EngineCache(tmp_path / "engines", int(2.5 * len(ENGINE)))
    prints = [replace(MADE, graph=letter * 64) for letter in "xyz"]
    for age, fingerprint in zip((30, 20), prints, strict=False):
        cache.engine(fingerprint, build)
        at = time.time() - age
        os.utime(path(cache, ".json", fingerprint), (at, at))
    cache.engine(prints[0], build)  # used again: now the other is the older one
    cache.engine(prints[2], build)
    assert [path(cache, ".engine", p).exists() for p in prints] == [True, False, True]
    assert f"{prints[1].key[:16]}: removed" in caplog.text


def test_an_engine_larger_than_the_limit_is_kept_until_the_next(tmp_path, build):
    cache = EngineCache(tmp_path / "engines", 0)
    cache.engine(MADE, build)
    assert bytes(cache.engine(MADE, build)) == ENGINE
    assert len(build.built) == 1


def test_what_killed_processes_left_goes_after_a_day(cache, build):
    old, young = (cache.folder / f".{'f' * 64}.0123456789ab.engine", cache.folder / f".{'e' * 64}.0123456789ab.engine")
    for file in (old, young):
        file.write_bytes(b"part")
    os.utime(old, (1, 1))
    cache.engine(MADE, build)
    assert (old.exists(), young.exists()) == (False, True)


def test_a_build_that_fails_leaves_nothing(cache, build):
    def fail(timing):
        raise BadBundle("cannot be built")

    with pytest.raises(BadBundle, match="cannot be built"):
        cache.engine(MADE, fail)
    assert list(cache.folder.iterdir()) == []
    assert bytes(cache.engine(MADE, build)) == ENGINE


PROCESS = """
import os, sys, time
from pathlib import Path
from topt_deploy.tensorrt.build import Built
from topt_deploy.runtime.backends.tensorrt_cache import EngineCache
sys.path.insert(0, os.environ["TESTS"])
from test_tensorrt_cache import ENGINE, MADE
def build(timing):
    with open("built", "a") as file:
        file.write("x")
    time.sleep(0.5)
    return Built(engine=ENGINE, timing_cache=None, messages=())
engine = EngineCache(Path("engines"), 10**9).engine(MADE, build)
assert bytes(engine) == ENGINE
"""


def process(code, folder, *arguments):
    here = Path(__file__).parent
    environment = os.environ | {"TESTS": str(here), "PYTHONPATH": str(here.parents[1] / "support")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_processes_at_once_build_once(tmp_path):
    running = [process(PROCESS, tmp_path) for _ in range(4)]
    for one in running:
        assert one.wait() == 0, one.stderr.read()
    assert (tmp_path / "built").read_text() == "x"


@pytest.mark.parametrize("moment", ["while it builds", "between engine and record", "while it writes"])
def test_a_killed_process_leaves_nothing_that_is_trusted(moment, tmp_path, build):
    pause = "open('here', 'w').close(); time.sleep(60)"
    code = {
        "while it builds": PROCESS.replace("    time.sleep(0.5)", f"    {pause}"),
        "between engine and record": PROCESS.replace(
            "engine = EngineCache",
            "real = Path.replace\n"
            "def slow(self, target):\n"
            f"    if target.suffix == '.json':\n        {pause}\n"
            "    return real(self, target)\n"
            "Path.replace = slow\n"
            "engine = EngineCache",
        ),
        "while it writes": PROCESS.replace(
            "engine = EngineCache",
            "from topt_deploy.runtime.backends import tensorrt_cache\n"
            "def half(path, data):\n"
            f"    path.write_bytes(data[:len(data) // 2]); {pause}\n"
            "tensorrt_cache._write = half\n"
            "engine = EngineCache",
        ),
    }[moment]
    running = process(code, tmp_path)
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "here").exists():
        assert time.monotonic() < deadline, running.poll()
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    cache = EngineCache(tmp_path / "engines", GB)
    engine, _ = cache._look(MADE)
    assert engine is None
    assert bytes(cache.engine(MADE, build)) == ENGINE
    assert len(build.built) == 1
    assert {file.suffix for file in cache.folder.iterdir()} == {".engine", ".json", ".timing"}, "what it left is gone"


def test_its_place_and_limit_are_the_users_to_say(monkeypatch, tmp_path):
    for name in (tensorrt_cache.PLACE, tensorrt_cache.LIMIT, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/topt-deploy/engines"
    assert cache_limit() == 20 * GB
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    assert cache_folder() == tmp_path / ".cache/topt-deploy/engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/topt-deploy/engines"
    monkeypatch.setenv(tensorrt_cache.PLACE, str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine/engines"
    monkeypatch.setenv(tensorrt_cache.LIMIT, "0.5")
    assert cache_limit() == GB // 2
    for wrong in ("much", "-1", "nan"):
        monkeypatch.setenv(tensorrt_cache.LIMIT, wrong)
        with pytest.raises(BadConfig, match="TOPT_CACHE_GB"):
            cache_limit()


def test_the_command_lists_and_clears(tmp_path, build, topt_run, monkeypatch):
    monkeypatch.setenv(tensorrt_cache.PLACE, str(tmp_path))
    assert "0 engines kept" in topt_run("cache").out
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"
    cache = EngineCache(cache_folder(), GB)
    cache.engine(MADE, build)
    (cache.folder / ("0" * 64)).mkdir()
    (cache.folder / ("0" * 64) / "of-onnxruntime.engine").touch()
    said = topt_run("cache")
    assert MADE.key[:16] in said.out
    assert "1 engines kept" in said.out
    told = json.loads(topt_run("cache", "--clear", "--log-format", "json").out)
    assert [one["key"] for one in told["engines"]] == [MADE.key]
    assert list(cache.folder.iterdir()) == []


BUILD = """
import os, sys
from dataclasses import replace
from pathlib import Path
from topt_deploy.tensorrt.build import build_engine
from topt_deploy.tensorrt.library import find_library
from topt_deploy.tensorrt.profile import ProfileRange
from topt_deploy.storage.hashed_file import sha256_file
from topt_deploy.runtime.backends.tensorrt_cache import EngineCache
sys.path.insert(0, os.environ["TESTS"])
from test_tensorrt_cache import MADE
graph, library = Path(sys.argv[1]), find_library("rtx")
def build(timing):
    with open("built", "a") as file:
        file.write("x")
    return build_engine(library, graph, {"regions": ProfileRange(min=1, opt=7, max=100)}, capability="8.9")
hashes = {"graph": sha256_file(graph), "weights": sha256_file(graph.with_name("weights.bin"))}
print(len(EngineCache(Path("engines"), 10**9).engine(replace(MADE, **hashes), build)))
"""


def test_real_engines_are_built_once_by_processes_at_once_and_never_shared_between_weights(tmp_path):
    engines.rtx()
    text = "g (float[regions, 64] x, float[64, 64] w) => (float[regions, 64] y) { y = MatMul(x, w) }"
    graphs = []
    for name, value in (("one", 1.0), ("other", 2.0)):
        (tmp_path / name).mkdir()
        w = np.full((64, 64), value, np.float32)
        graphs.append(engines.write_external(tmp_path / name / "graph.onnx", text, w=w))
    assert graphs[0].read_bytes() == graphs[1].read_bytes(), "one graph, and other weights"
    running = [process(BUILD, tmp_path, str(graph)) for graph in (*graphs, graphs[0])]
    for one in running:
        assert one.wait() == 0, one.stderr.read()
    assert (tmp_path / "built").read_text() == "xx"
    first, second = (path.read_bytes() for path in sorted((tmp_path / "engines").glob("*.engine")))
    assert first != second
    assert min(len(first), len(second)) > 4 * 64**2
