"""Cities behind URIs: the same bytes as on the disk, and errors that name what the user has named.

``file://`` is the one scheme that is run here; of the object stores what happens when there is none. Stores themselves
are run by test_stores.py.
"""

import json
import shutil

import pytest
from batch import NAMES, outputs, spoil

DONE, USAGE, PARTIAL, BAD_DATA, NO_INPUT, IO_ERROR = 0, 2, 3, 65, 66, 74


def test_in_and_out(cities, apart, batch, tmp_path):
    out = tmp_path / "here and there"
    said = batch(cities.as_uri(), out=out.as_uri(), TMPDIR=str(tmp_path))
    assert said.code == DONE, said
    assert outputs(out) == apart
    assert json.loads((out / "_run.json").read_text())["cities"] == {"done": 6}
    assert {path.name for path in (out / "city=A").iterdir()} == {"predictions.parquet", "predictions.receipt.json"}
    assert not list(tmp_path.glob("topt-run-*")), "nothing stays in the folder for temporary files"


@pytest.mark.slow
@pytest.mark.parametrize("side", ["in", "out"])
def test_in_or_out(side, cities, apart, batch, tmp_path):
    out = tmp_path / "out"
    given, place = (cities.as_uri(), "out") if side == "in" else (cities, out.as_uri())
    assert batch(given, out=place).code == DONE
    assert outputs(out) == apart


def test_the_receipt_names_what_was_given(cities, batch, tmp_path):
    assert batch(f"{cities.as_uri()}/city=A", out=(tmp_path / "out").as_uri()).code == DONE
    receipt = json.loads((tmp_path / "out/city=A/predictions.receipt.json").read_text())
    assert receipt["inputs"]["regions"]["file"] == f"{cities.as_uri()}/city=A/regions.parquet"
    assert receipt["inputs"]["mobility"]["file"] == f"{cities.as_uri()}/city=A/mobility.parquet"
    assert receipt["output"]["file"] == "predictions.parquet"


def test_a_city_without_a_name_has_none_here_either(cities, batch, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(cities / "city=A/regions.parquet", flat / "Oslo.parquet")
    shutil.copy(cities / "city=A/mobility.parquet", flat / "Oslo.mobility.parquet")
    assert batch(flat).code == DONE
    assert batch(flat.as_uri(), out="far").code == DONE
    assert outputs(tmp_path / "far") == outputs(tmp_path / "out")


@pytest.mark.slow
def test_resume(mine, apart, batch, tmp_path):
    out = tmp_path / "out"
    assert batch(mine.as_uri(), "--resume", out=out.as_uri()).code == DONE
    stamp = (out / "city=A/predictions.parquet").stat().st_mtime_ns
    (out / "city=B/predictions.parquet").write_bytes(b"torn")
    (out / "city=C/predictions.receipt.json").unlink()
    said = batch(mine.as_uri(), "--resume", out=out.as_uri())
    assert said.out.splitlines()[0] == "6 cities: 2 done, 4 skipped"
    assert outputs(out) == apart
    assert (out / "city=A/predictions.parquet").stat().st_mtime_ns == stamp
    said = batch(mine, "--resume", out="out")
    assert said.out.splitlines()[0] == "6 cities: 6 skipped", "the same place by its path"


def test_rows_set_aside_come_and_go(mine, cities, batch, tmp_path):
    spoil(mine / "city=B")
    out, aside = tmp_path / "out", tmp_path / "out/city=B/predictions.quarantine.parquet"
    assert batch(mine.as_uri(), "--on-bad-row", "quarantine", out=out.as_uri()).code == PARTIAL
    assert aside.exists()
    shutil.copy(cities / "city=B/regions.parquet", mine / "city=B")
    assert batch(mine.as_uri(), "--on-bad-row", "quarantine", out=out.as_uri()).code == DONE
    assert not aside.exists()


@pytest.mark.slow
def test_a_bad_city_is_named_as_it_was_given(mine, apart, batch, tmp_path):
    spoil(mine / "city=B")
    (mine / "city=C/mobility.parquet").unlink()
    said = batch(mine.as_uri(), "--log-format", "json", out=(tmp_path / "out").as_uri())
    assert said.code == PARTIAL
    failed = {line["city"]: line["error"] for line in map(json.loads, said.out.splitlines()[:-1]) if "error" in line}
    assert {name: error["exit_code"] for name, error in failed.items()} == {"B": BAD_DATA, "C": NO_INPUT}
    for name, error in failed.items():
        assert error["file"] == f"{mine.as_uri()}/city={name}/regions.parquet"
    assert outputs(tmp_path / "out") == {k: v for k, v in apart.items() if k[5] not in "BC"}


@pytest.mark.slow
def test_all_fail(mine, batch, tmp_path):
    for name in NAMES:
        spoil(mine / f"city={name}")
    assert batch(mine.as_uri(), out=(tmp_path / "out").as_uri()).code == BAD_DATA
    assert json.loads((tmp_path / "out/_run.json").read_text())["cities"] == {"failed": 6}


NO_STORE = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_REGION": "eu-north-1", "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip


class TestNoStore:
    """Nobody listens on port 9."""

    def test_in(self, batch, tmp_path):
        said = batch("s3://bucket/cities", **NO_STORE)
        assert said.code == IO_ERROR, said
        assert said.err.startswith("error: s3://bucket/cities: the object store failed")
        assert "credentials" in said.err
        assert "Traceback" not in said.err
        assert not (tmp_path / "out").exists()

    def test_out(self, cities, batch):
        said = batch(cities / "city=A", out="s3://bucket/out", **NO_STORE)
        assert said.code == IO_ERROR, said
        assert "s3://bucket/out" in said.err
        assert "Traceback" not in said.err

    def test_azure_without_an_account(self, batch):
        said = batch("az://container/cities")
        assert said.code == USAGE
        assert "AZURE_STORAGE_ACCOUNT" in said.err

    @pytest.mark.parametrize("uri", ["s3://", "s3:///x", "file://host/x", "s3://b/a b", "gs://%zz"])
    def test_no_uri_at_all(self, uri, batch):
        said = batch(uri, **NO_STORE)
        assert said.code in (USAGE, NO_INPUT, IO_ERROR), said
        assert said.err.startswith("error: ")
        assert "Traceback" not in said.err
