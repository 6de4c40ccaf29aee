"""One predictor, many threads: each gets the bytes that a single caller gets."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pyarrow as pa

from topt_deploy.data.parquet import write_parquet
from topt_deploy.runtime import load

CALLS = 24


def hashed(table: pa.Table, file: Path) -> str:
    write_parquet(file, table)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_24_calls_at_once_give_the_bytes_of_one(demo_bundle, tmp_path):
    files = [demo_bundle.with_name(f"{name}.parquet") for name in ("regions", "mobility")]
    alone = hashed(load(demo_bundle).predict(*files), tmp_path / "alone.parquet")
    predictor, start = load(demo_bundle), Barrier(CALLS)

    def call(number: int) -> str:
        start.wait()
        return hashed(predictor.predict(*files), tmp_path / f"{number}.parquet")

    with ThreadPoolExecutor(CALLS) as pool:
        assert set(pool.map(call, range(CALLS))) == {alone}


def test_the_first_calls_prepare_the_model_once(demo_bundle, tmp_path):
    from topt_deploy.runtime.predictor import open_predictor

    files = [demo_bundle.with_name(f"{name}.parquet") for name in ("regions", "mobility")]
    predictor, start = open_predictor(demo_bundle), Barrier(CALLS)  # its model is not prepared yet

    def call(_: int) -> tuple[int, pa.Table]:
        start.wait()
        table = predictor.predict(*files)
        return id(predictor.session), table

    with ThreadPoolExecutor(CALLS) as pool:
        sessions, tables = zip(*pool.map(call, range(CALLS)), strict=True)
    assert len(set(sessions)) == 1
    assert all(table.equals(tables[0]) for table in tables)
