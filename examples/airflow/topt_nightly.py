"""Predictions of all cities every night, as a DAG of Airflow 3.

topt-run's exit codes: 0 done. 3 done in part: the task succeeds, and says so in its log. 74, 75 and a killed process
are the machine's fault or another run's: the task fails, and Airflow tries again; --resume passes over what is done.
Any other needs a person: the task fails for good.

topt-run has a virtual environment of its own, for Airflow pins other versions of its packages.
"""

import subprocess
from datetime import datetime, timedelta

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException

DONE, IN_PART = 0, 3
AGAIN = (74, 75, 143)


@dag(
    schedule="0 3 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    params={
        "topt_run": "/opt/topt/bin/topt-run",
        "cities": "/srv/topt/cities",
        "bundle": "/srv/topt/model.topt",
        "out": "/srv/topt/out",
    },
)
def topt_nightly():
    """All cities, every night."""

    @task(retries=2, retry_delay=timedelta(minutes=10))
    def predict(params: dict | None = None) -> int:
        """Run topt-run, and let its exit code decide what becomes of the task."""
        command = [
            params["topt_run"],
            "predict",
            params["cities"],
            "--bundle",
            params["bundle"],
            "--out",
            params["out"],
        ]
        code = subprocess.run([*command, "--resume", "--on-bad-row", "quarantine", "--log-format", "json"]).returncode
        if code == IN_PART:
            print(f"done in part: see {params['out']}/_run.json")
        elif code in AGAIN or code < 0:
            raise AirflowException(f"topt-run: exit code {code}, to be tried again")
        elif code != DONE:
            raise AirflowFailException(f"topt-run: exit code {code}")
        return code

    predict()


topt_nightly()
