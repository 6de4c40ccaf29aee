import hashlib
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import PATIENCE_S

from topt_deploy.errors import BadData, CannotCreate, IOFailure
from topt_deploy.prompts.cache import Cache, content_key


def vectors(n, width=48, seed=0):
    values = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    return {f"{i:064x}": row for i, row in enumerate(values)}


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, vector in found.items():
        assert vector.dtype == np.float32
        assert np.array_equal(vector, expected[key], equal_nan=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vectors.cache"


@pytest.fixture
def filled(path):
    stored = vectors(40)
    with Cache(path) as cache:
        cache.put(stored)
    return stored


class TestKey:
    def test_order_does_not_count(self):
        assert content_key(a=1, b=["x", {"c": 2, "d": 3}]) == content_key(b=["x", {"d": 3, "c": 2}], a=1)

    def test_every_value_counts(self):
        facts = {"text": "a", "images": ["1", "2"], "precision": "int8"}
        changed = [{"text": "b"}, {"images": ["2", "1"]}, {"images": ["12"]}, {"precision": None}, {"more": 0}]
        keys = {content_key(**facts)} | {content_key(**(facts | change)) for change in changed}
        assert len(keys) == 6
        assert content_key(a="1") != content_key(a=1)

    def test_the_same_on_every_machine(self):
        assert content_key(text="é", n=1) == hashlib.sha256(rb'{"n":1,"text":"\u00e9"}').hexdigest()

    def test_what_is_not_plain(self):
        with pytest.raises(TypeError):
            content_key(a=b"bytes")
        with pytest.raises(ValueError, match="JSON compliant"):
            content_key(a=float("nan"))


class TestCache:
    def test_round_trip(self, path, filled):
        with Cache(path) as cache:
            same(cache.get(filled), filled)
            same(cache.get([]), {})
            same(cache.get(["unknown"]), {})
            one = next(iter(filled))
            same(cache.get(["unknown", one, one]), {one: filled[one]})

    def test_more_keys_than_one_query_takes(self, path):
        stored = vectors(1201, width=2)
        with Cache(path) as cache:
            third = {key: stored[key] for key in list(stored)[::3]}
            cache.put(third)
            same(cache.get(stored), third)

    def test_odd_values_and_widths(self, path):
        odd = {
            "a": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
            "b": np.arange(4096, dtype=np.float32)[::2],
            "c": np.array([0.5], np.float16),
        }
        with Cache(path) as cache:
            cache.put(odd)
            same(cache.get(odd), odd)

    def test_the_last_one_put_stays(self, path, filled):
        key = next(iter(filled))
        with Cache(path) as cache:
            cache.put({key: np.ones(3, np.float32)})
            assert cache.get([key])[key].tolist() == [1, 1, 1]

    def test_one_file(self, path, filled):
        assert [p.name for p in path.parent.iterdir()] == [path.name]


class TestDamage:
    @pytest.mark.parametrize(
        "change",
        [
            "vector = zeroblob(length(vector))",
            "vector = substr(vector, 1, 8)",
            "vector = 'text'",
            "vector = NULL",
            "checksum = NULL",
            "checksum = zeroblob(32)",
            "vector = (SELECT vector FROM vectors WHERE key = '{other}'),"
            " checksum = (SELECT checksum FROM vectors WHERE key = '{other}')",
        ],
    )
    def test_a_damaged_entry_is_absent_and_can_be_put_again(self, path, filled, change):
        key, other, *_ = filled
        database = sqlite3.connect(path)
        with database:
            assert database.execute(f"UPDATE vectors SET {change.format(other=other)} WHERE key = ?", [key]).rowcount
        database.close()
        with Cache(path) as cache:
            same(cache.get(filled), {k: v for k, v in filled.items() if k != key})
            cache.put({key: filled[key]})
            same(cache.get(filled), filled)

    def test_damage_anywhere_gives_no_wrong_vector(self, path, filled):
        data = path.read_bytes()
        rng, refused, absent = np.random.default_rng(0), 0, 0
        for _ in range(200):
            damaged = bytearray(data)
            start = int(rng.integers(len(data)))
            damaged[start : start + 40] = rng.bytes(len(damaged[start : start + 40]))
            path.write_bytes(damaged)
            try:
                with Cache(path) as cache:
                    found = cache.get(filled)
            except BadData:
                refused += 1
                continue
            absent += len(found) < len(filled)
            same(found, {key: filled[key] for key in found})
        assert refused > 10
        assert absent > 10

    @pytest.mark.parametrize("size", [50, 100, 4096, -4096])
    def test_cut_off(self, path, filled, size):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(BadData, match="not a cache"), Cache(path) as cache:
            cache.get(filled)

    @pytest.mark.parametrize(
        "data", [b"region_id,lon,lat\n" * 40, b"PK\3\4", b"SQLite format 3\0"], ids=["csv", "zip", "magic"]
    )
    def test_another_file(self, path, data):
        path.write_bytes(data)
        with pytest.raises(BadData, match="not a cache") as refused:
            Cache(path)
        assert refused.value.file == str(path)
        assert "delete" in refused.value.fix
        assert path.read_bytes() == data

    def test_another_database(self, path):
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE vectors (a)")
        database.close()
        before = path.read_bytes()
        with pytest.raises(BadData, match="a database of something else"):
            Cache(path)
        assert path.read_bytes() == before

    def test_an_empty_file_is_filled(self, path):
        path.touch()
        with Cache(path) as cache:
            cache.put({"a": np.ones(2, np.float32)})
            assert list(cache.get(["a"])) == ["a"]


class TestSystem:
    def test_no_folder(self, tmp_path):
        with pytest.raises(CannotCreate, match="unable to open") as refused:
            Cache(tmp_path / "none" / "x")
        assert refused.value.file == str(tmp_path / "none" / "x")
        with pytest.raises(CannotCreate):
            Cache(tmp_path)

    def test_another_process_writes_for_too_long(self, path, filled):
        database = sqlite3.connect(path, isolation_level=None)
        database.execute("BEGIN IMMEDIATE")
        with pytest.raises(IOFailure, match="locked"):
            Cache(path, wait_s=0.05)
        database.execute("ROLLBACK")
        with Cache(path, wait_s=0.05) as cache:
            same(cache.get(filled), filled)
        database.close()

    def test_disk_full(self, path, filled):
        with Cache(path) as cache:
            cache._database.execute("PRAGMA max_page_count = 1")
            with pytest.raises(IOFailure, match="full"):
                cache.put({"b": np.ones(1, np.float32), "a": np.ones(10**6, np.float32)})
            same(cache.get([*filled, "a", "b"]), filled)
        with Cache(path) as cache:
            cache.put({"b": np.ones(1, np.float32), "a": np.ones(10**6, np.float32)})


WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from topt_deploy.prompts.cache import Cache
path, name, n, start = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
time.sleep(max(0, start - time.time()))
with Cache(path) as cache:
    for i in range(n):
        key = f"{name}-{i}"
        cache.put({key: np.full(5000, i, np.float32), "common": np.full(7, i, np.float32)})
        assert set(cache.get([key, "common"])) == {key, "common"}
        print(i, flush=True)
"""


def writer(path, name, n, start=0.0):
    command = [sys.executable, "-c", WRITER, str(path), name, str(n), str(start)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def written(name, n):
    return {f"{name}-{i}": np.full(5000, i, np.float32) for i in range(n)}


def test_several_processes_write_at_once(path):
    """From the making of the file on."""
    workers = [writer(path, name, 25, time.time() + 1) for name in "abcd"]
    for worker in workers:
        worker.communicate(timeout=PATIENCE_S)
    assert [worker.returncode for worker in workers] == [0] * 4
    expected = written("a", 25) | written("b", 25) | written("c", 25) | written("d", 25)
    with Cache(path) as cache:
        same(cache.get(expected), expected)


def test_killed_while_writing(path):
    """What was put is there, and the next one goes on at once."""
    with writer(path, "a", 10**6) as worker:
        for _ in range(5):
            assert worker.stdout.readline()
        time.sleep(0.01)
        worker.kill()
        last = int(("4\n" + worker.stdout.read()).split()[-1])
    with Cache(path, wait_s=1) as cache:
        same(cache.get(written("a", last + 1)), written("a", last + 1))
        cache.put({"next": np.ones(3, np.float32)})
