"""Predictions of all cities every night, as a flow of Prefect 3.

topt-run's exit codes: 0 done. 3 done in part: the flow succeeds, and says so in its log. 74, 75 and a killed process
are the machine's fault or another run's: Prefect tries again; --resume passes over what is done. Any other needs a
person: the flow fails at once.

topt-run has a virtual environment of its own, for Prefect pins other versions of its packages. To have it run every
night, instead of once: topt_nightly.serve(cron="0 3 * * *", parameters={...}).
"""

import subprocess
import sys

from prefect import flow, get_run_logger, task

DONE, IN_PART = 0, 3
AGAIN = (74, 75, 143)


class ToptRunError(Exception):
    """topt-run failed.

    Args:
        code: Its exit code; negative where a signal killed it.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"topt-run: exit code {code}")
        self.code = code


async def can_be_tried_again(task, task_run, state) -> bool:
    """Decide if a failed task is worth another attempt."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, ToptRunError) and (error.code in AGAIN or error.code < 0)


@task(retries=2, retry_delay_seconds=600, retry_condition_fn=can_be_tried_again)
def predict(topt_run: str, cities: str, bundle: str, out: str) -> int:
    """Run topt-run, and let its exit code decide what becomes of the task."""
    command = [topt_run, "predict", cities, "--bundle", bundle, "--out", out]
    code = subprocess.run([*command, "--resume", "--on-bad-row", "quarantine", "--log-format", "json"]).returncode
    if code not in (DONE, IN_PART):
        raise ToptRunError(code)
    if code == IN_PART:
        get_run_logger().warning("done in part: see %s/_run.json", out)
    return code


@flow
def topt_nightly(topt_run: str, cities: str, bundle: str, out: str) -> int:
    """All cities."""
    return predict(topt_run, cities, bundle, out)


if __name__ == "__main__":
    topt_nightly(*sys.argv[1:])
