"""Object stores, by emulators on this machine: the same bytes as on the disk, ``--resume``, and their refusals."""

import json
from collections.abc import Iterator

import pytest
from batch import outputs, spoil
from stores import PROGRAMS, Store, running

DONE, USAGE, PARTIAL, BAD_DATA, NO_INPUT, CANNOT_CREATE, NO_PERMISSION = 0, 2, 3, 65, 66, 73, 77


@pytest.fixture(scope="module", params=PROGRAMS)
def store(request, tmp_path_factory) -> Iterator[Store]:
    with running(request.param, tmp_path_factory.mktemp(request.param)) as store:
        yield store


@pytest.fixture
def fetched(store, tmp_path):
    """What a batch has left in the store."""

    def call(path):
        store.get(path, tmp_path / path)
        return tmp_path / path

    return call


def test_in_out_and_again(store, cities, apart, batch, fetched):
    store.put(cities, "cities")
    given, out = store.uri("cities"), store.uri("out-1")
    said = batch(given, out=out, **store.environment)
    assert said.code == DONE, said
    found = fetched("out-1")
    assert outputs(found) == apart
    assert json.loads((found / "_run.json").read_text())["cities"] == {"done": 6}
    assert {path.name for path in (found / "city=A").iterdir()} == {"predictions.parquet", "predictions.receipt.json"}
    receipt = (found / "city=A/predictions.receipt.json").read_text()
    assert json.loads(receipt)["inputs"]["regions"]["file"] == f"{store.root}/cities/city=A/regions.parquet"
    store.write("out-1/city=B/predictions.parquet", b"torn")
    store.delete("out-1/city=C/predictions.receipt.json")
    said = batch(given, "--resume", out=out, **store.environment)
    assert said.code == DONE, said
    assert said.out.splitlines()[0] == "6 cities: 2 done, 4 skipped"
    assert outputs(fetched("out-1")) == apart


@pytest.mark.slow
def test_rows_set_aside_come_and_go(store, mine, batch, fetched):
    whole = (mine / "city=B/regions.parquet").read_bytes()
    spoil(mine / "city=B")
    store.put(mine / "city=B", "aside/city=B")
    out, name = store.uri("out-aside"), "city=B/predictions.quarantine.parquet"
    assert batch(store.uri("aside"), "--on-bad-row", "quarantine", out=out, **store.environment).code == PARTIAL
    assert (fetched("out-aside") / name).unlink() is None
    store.write("aside/city=B/regions.parquet", whole)
    assert batch(store.uri("aside"), "--on-bad-row", "quarantine", out=out, **store.environment).code == DONE
    assert not (fetched("out-aside") / name).exists()


@pytest.mark.slow
def test_what_is_not_there(store, cities, batch, tmp_path):
    nowhere = store.uri("").replace("bucket/", "no-bucket/")
    for given in (store.uri("nowhere"), nowhere):
        said = batch(given, **store.environment)
        assert said.code == NO_INPUT, said
        assert said.err.startswith(f"error: {given.partition('?')[0].rstrip('/')}")
        assert not (tmp_path / "out").exists()
    said = batch(cities / "city=A", out=nowhere, **store.environment)
    assert said.code == CANNOT_CREATE, said
    assert "no such bucket" in said.err
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_no_permission(store, cities, batch):
    if store.refused is None:
        pytest.skip("this emulator lets everyone in")
    more = {**store.environment, **store.refused}
    settings = more.pop("settings", store.settings)
    for given, out in ((f"{store.root}/cities{settings}", "out"), (cities / "city=A", f"{store.root}/out{settings}")):
        said = batch(given, out=out, **more)
        assert said.code == NO_PERMISSION, said
        assert "credentials" in said.err
        assert "Traceback" not in said.err


def test_a_setting_that_there_is_not(store, batch):
    said = batch(f"{store.root}/cities?colour=green", **store.environment)
    assert said.code == USAGE, said
    assert "colour" in said.err


@pytest.mark.slow
def test_s3_by_the_environment_alone_and_secrets_stay_secret(store, cities, apart, batch, fetched):
    if not store.root.startswith("s3:"):
        pytest.skip("of S3 alone")
    store.put(cities, "cities")
    address = store.settings.partition("=")[2].partition("&")[0]
    there = {"AWS_ENDPOINT_URL": f"http://{address}", "AWS_REGION": "eu-north-1", "AWS_EC2_METADATA_DISABLED": "true"}
    given, out = "s3://key:very-secret@bucket/cities", "s3://key:very-secret@bucket/out-2"
    said = batch(given, "--log-format", "json", out=out, **there)
    assert said.code == DONE, said
    found = fetched("out-2")
    assert outputs(found) == apart
    told = said.out + said.err + "".join(file.read_text() for file in found.rglob("*.json"))
    assert "s3://key@bucket/cities/city=A/regions.parquet" in told
    assert "very-secret" not in told
