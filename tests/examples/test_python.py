"""examples/python, run as it says."""

import subprocess
import sys

import pyarrow.parquet as pq

from topt_deploy.runtime import load


def run(examples, home, *cities):
    script = examples / "python/predict.py"
    arguments = [sys.executable, script, "model.topt", "tables", *cities]
    return subprocess.run(arguments, cwd=home, capture_output=True, text=True)


def test_it_predicts_as_topt_run_does(examples, home, spoil):
    (home / "tables").mkdir()
    done = run(examples, home, "cities/city=A", "cities/city=B")
    assert done.returncode == 0, done.stderr
    city = home / "cities/city=A"
    expected = load(home / "model.topt").predict(city / "regions.parquet", city / "mobility.parquet", wide=True)
    for name in "AB":
        found = pq.ParquetFile(home / f"tables/city={name}.parquet").read()
        assert found.column("crime") == expected.column("crime")
    spoil()
    done = run(examples, home, "cities/city=A", "cities/city=B")
    assert done.returncode == 3
    assert "counts must be finite and not negative" in done.stderr
    assert run(examples, home, "cities/city=B").returncode == 65
