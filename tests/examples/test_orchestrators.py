"""examples/airflow and examples/prefect, run by Airflow and Prefect themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from services import service

from topt_deploy.storage.locks import locked

pytestmark = pytest.mark.slow

TOPT_RUN = Path(sys.executable).with_name("topt-run")
HERE = Path(__file__).parent


@pytest.fixture
def where(home):
    """The parameters of both examples."""
    return {
        "topt_run": str(TOPT_RUN),
        "cities": str(home / "cities"),
        "bundle": str(home / "model.topt"),
        "out": str(home / "out"),
    }


def ran(command, folder, **variables):
    """What a driver prints last on standard error."""
    path = "/usr/bin:/bin"
    done = subprocess.run(
        command, cwd=folder, env={"PATH": path, "HOME": str(folder), **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stderr.splitlines()[-1])


@pytest.fixture
def airflow(examples, tmp_path):
    python = service("airflow/bin/python")
    variables = {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(examples / "airflow"),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    migrate = [python, "-m", "airflow", "db", "migrate"]
    subprocess.run(
        migrate, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **variables}, check=True, capture_output=True
    )

    def call(*cases):
        driver = [python, HERE / "airflow_dag.py", examples / "airflow", json.dumps(cases)]
        return ran(driver, tmp_path, **variables)

    return call


def test_airflow_retries_what_may_succeed_and_nothing_else(airflow, where, home, spoil):
    spoil()
    (home / "locked/city=A").mkdir(parents=True)
    with locked(home / "locked/city=A/predictions.parquet"):
        in_part, no_input, held, no_bundle = airflow(
            where,
            where | {"cities": str(home / "nowhere")},
            where | {"out": str(home / "locked")},
            where | {"bundle": str(home / "nothing.topt")},
        )
    assert in_part == {"state": "success", "tries": 1}
    assert len(list(home.glob("out/city=*/predictions.parquet"))) == 2
    assert no_input == no_bundle == {"state": "failed", "tries": 1}
    assert held == {"state": "failed", "tries": 3}


@pytest.fixture
def prefect(examples, tmp_path):
    python = service("prefect/bin/python")
    variables = {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "150",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "DO_NOT_TRACK": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def call(*cases):
        return ran([python, HERE / "prefect_flow.py", examples / "prefect", json.dumps(cases)], tmp_path, **variables)

    return call


def test_prefect_retries_what_may_succeed_and_nothing_else(prefect, where, home, spoil):
    spoil()
    counting = home / "topt-run"
    counting.write_text(f'#!/bin/sh\necho "$2" >> {home}/calls\nexec {TOPT_RUN} "$@"\n')
    counting.chmod(0o755)
    where |= {"topt_run": str(counting)}
    nowhere, others = str(home / "nowhere"), str(home / "cities/city=A")
    (home / "locked/city=A").mkdir(parents=True)
    with locked(home / "locked/city=A/predictions.parquet"):
        became = prefect(where, where | {"cities": nowhere}, where | {"cities": others, "out": f"{home}/locked/"})
    assert became == ["COMPLETED", "FAILED", "FAILED"]
    assert len(list(home.glob("out/city=*/predictions.parquet"))) == 2
    assert (home / "calls").read_text().split() == [where["cities"], nowhere, *[others] * 3]
