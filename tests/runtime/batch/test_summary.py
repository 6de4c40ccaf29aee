"""What is said of a whole batch: its exit code, its record and its metrics."""

import json
import math
import time

import pytest
from batch import NAMES, spoil
from commands import shell

from topt_deploy.runtime.summary import CityResult, Summary

DONE, PARTIAL, BAD_DATA, NO_INPUT, BUG, IO_ERROR, TRY_AGAIN, BAD_BUNDLE = 0, 3, 65, 66, 70, 74, 75, 76


def result(status="done", code=None, set_aside=None):
    error = None if code is None else {"error": "X", "exit_code": code, "message": "m"}
    return CityResult(city="a", file="b", status=status, regions={"ok": 3}, set_aside=set_aside or {}, error=error)


GOOD, ASIDE = result(), result("partial", set_aside={"regions": {"bad_count": 2}})


def bad(*codes):
    return [result("failed", code) for code in codes]


@pytest.mark.parametrize(
    ("results", "code"),
    [
        ([], DONE),
        ([GOOD, GOOD], DONE),
        ([GOOD, result("skipped")], DONE),
        ([GOOD, ASIDE], PARTIAL),
        ([ASIDE], PARTIAL),
        ([GOOD, *bad(BAD_DATA)], PARTIAL),
        ([result("skipped"), *bad(NO_INPUT)], PARTIAL),
        ([ASIDE, *bad(BAD_DATA, BUG)], PARTIAL),
        (bad(BAD_DATA), BAD_DATA),
        (bad(NO_INPUT, NO_INPUT), NO_INPUT),
        (bad(NO_INPUT, BUG), BAD_DATA),
        ([GOOD, *bad(BAD_DATA, TRY_AGAIN)], TRY_AGAIN),
        ([GOOD, *bad(IO_ERROR)], IO_ERROR),
        (bad(NO_INPUT, IO_ERROR), IO_ERROR),
    ],
)
def test_the_exit_code(results, code):
    summary = Summary()
    for one in results:
        summary.add(one)
    assert summary.exit_code == code
    assert summary.record()["exit_code"] == code


def metrics(path):
    """Values by name and labels, as Prometheus' own parser reads them."""
    parser = pytest.importorskip("prometheus_client.parser", reason="needs prometheus-client")
    found = {}
    for family in parser.text_string_to_metric_families(path.read_text()):
        assert family.name.startswith("topt_run_")
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            key = (sample.name.removeprefix("topt_run_"), *sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


class TestBatch:
    @pytest.fixture
    def ended(self, mine, batch, tmp_path):
        """A batch with one city of every kind: what it said, its record and its metrics."""
        options = ("--on-bad-row", "quarantine", "--metrics-file", tmp_path / "x.prom", "--resume")
        assert batch(mine / "city=A", mine / "city=F", *options).code == DONE
        spoil(mine / "city=B")
        (mine / "city=C/mobility.parquet").unlink()
        began = time.time()
        said = batch(mine, *options, "--log-format", "json")
        assert said.code == PARTIAL
        return said, began, json.loads((tmp_path / "out" / "_run.json").read_text()), metrics(tmp_path / "x.prom")

    def test_says_the_same_everywhere(self, ended, mine):
        said, began, record, found = ended
        *cities, last = [json.loads(line) for line in said.out.splitlines()]
        assert last.keys() == {"event"} | record.keys()
        assert {k: v for k, v in record.items() if k != "seconds"}.items() <= last.items()
        assert record["exit_code"] == found[("exit_code",)] == PARTIAL
        assert record["cities"] == {"done": 2, "failed": 1, "partial": 1, "skipped": 2}
        for family in ("cities", "regions"):
            assert {key[1][1]: value for key, value in found.items() if key[0] == family} == record[family]
        aside = {key[1:]: value for key, value in found.items() if key[0] == "set_aside_rows"}
        assert {f"{table} {code}": v for ((_, code), (_, table)), v in aside.items()} == record["set_aside"]
        assert record["set_aside"]["regions bad_count"] == 1
        assert began - 1 <= found[("finished_timestamp_seconds",)] <= time.time()
        assert 0 < found[("duration_seconds",)] < 100
        (failed,) = record["failed"]
        assert (failed["city"], failed["exit_code"]) == ("C", NO_INPUT)
        assert failed["file"] == f"{mine}/city=C/regions.parquet"
        assert {line["city"] for line in cities} == set(NAMES)
        for status in ("ok", "extrapolated"):
            assert record["regions"].get(status, 0) == sum(line["regions"].get(status, 0) for line in cities)

    def test_every_line_is_the_same_for_every_city(self, ended):
        said, *_ = ended
        lines = [json.loads(line) for line in said.out.splitlines()[:-1]]
        keys = {"event", "city", "file", "status", "regions", "set_aside", "seconds"}
        assert all(line.keys() == keys | ({"error"} if line["status"] == "failed" else set()) for line in lines)
        assert all(math.isfinite(line["seconds"]) for line in lines)


class TestMetrics:
    def test_of_one_city(self, desk, topt_run):
        path = desk.folder / "x.prom"
        assert topt_run("predict", desk.regions, "--metrics-file", path).code == DONE
        found = metrics(path)
        assert found[("exit_code",)] == DONE
        assert found[("cities", ("status", "done"))] == 1
        assert found[("cities", ("status", "failed"))] == 0
        assert found[("regions", ("status", "ok"))] == 231

    @pytest.mark.parametrize("many", [False, True])
    def test_where_the_run_fails_as_a_whole(self, many, desk, topt_run):
        """A collector must not go on showing the last success."""
        path = desk.folder / "x.prom"
        inputs = [desk.regions] * (2 if many else 1)
        arguments = ("predict", *inputs, "--out", desk.folder / "out", "--metrics-file", path)
        assert topt_run(*arguments, "--bundle", desk.folder / "nowhere.topt").code == NO_INPUT
        assert metrics(path)[("exit_code",)] == NO_INPUT
        (desk.bundle / "MODEL_CARD.md").write_text("another")
        assert topt_run(*arguments).code == BAD_BUNDLE
        assert metrics(path)[("exit_code",)] == BAD_BUNDLE

    def test_where_no_bundle_is_found_or_no_input(self, desk, topt_run):
        path = desk.folder / "x.prom"
        bundle = desk.bundle.rename(desk.folder / "elsewhere")
        assert topt_run("predict", desk.regions, "--metrics-file", path).code == NO_INPUT
        assert metrics(path)[("exit_code",)] == NO_INPUT
        path.unlink()
        said = topt_run("predict", desk.folder / "no.parquet", "--bundle", bundle, "--metrics-file", path)
        assert said.code == NO_INPUT
        assert metrics(path)[("exit_code",)] == NO_INPUT

    def test_of_a_bug(self, desk, topt_run, monkeypatch):
        def fail(*_, **__):
            raise ZeroDivisionError

        monkeypatch.setattr("topt_deploy.runtime.predict_city.read_receipt", fail)
        path = desk.folder / "x.prom"
        assert topt_run("predict", desk.regions, "--resume", "--metrics-file", path).code == BUG
        assert metrics(path)[("exit_code",)] == BUG

    def test_the_process_of_a_bad_city(self, desk):
        spoil(desk.folder)
        said = shell("topt-run predict regions.parquet --metrics-file x.prom", desk.folder)
        assert said.code == BAD_DATA
        assert metrics(desk.folder / "x.prom")[("exit_code",)] == BAD_DATA

    def test_a_place_that_takes_none(self, desk, topt_run):
        said = topt_run("predict", desk.regions, "--metrics-file", desk.folder / "nowhere" / "x.prom")
        assert said.code == 73
        assert "x.prom" in said.err


def test_memory_grows_with_failures_alone():
    summary = Summary()
    for _ in range(1000):
        summary.add(GOOD)
    assert summary.failures == []
    assert summary.cities["done"] == 1000
    assert summary.text() == "1,000 cities: 1,000 done"
