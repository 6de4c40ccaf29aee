"""The result of ``topt-run check --out``: predictions of this run's model against what was counted later."""

import json
import math
from pathlib import Path

from topt_deploy.errors import BadData
from topt_deploy.later_counts import Check
from topt_deploy.run_folder import Run
from topt_deploy.storage.os_errors import reading

MADE_BY = "make it with topt-run check PREDICTIONS --labels TABLE --out FILE"


def read_later_counts(file: Path, run: Run) -> Check:
    """Read a check of the run's own model: one that was promised the run's held-out errors, to the last digit.

    Raises:
        NoInput: If the file is missing.
        BadData: If it is no check's result, or one of another model.
    """
    with reading(file):
        text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = Check.from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(f"not a check's result ({error!r})", file=file, fix=MADE_BY) from error
    promised = {one.task: one.promised_mae for one in found.tasks}
    own = {task: report["held_out"]["mae"] for task, report in run.facts["reports"].items()}
    if not promised or not all(
        error is not None and task in own and math.isclose(error, own[task], rel_tol=1e-12)
        for task, error in promised.items()
    ):
        raise BadData(
            "this check is of another model, or of predictions whose bundle was not there", file=file,
            expected="the held-out errors of this run: " + ", ".join(f"{task} {mae:.6g}" for task, mae in own.items()),
            found=", ".join(f"{task} {mae}" for task, mae in promised.items()) or "no task",
            fix="name the run that the bundle was exported from, and its bundle: topt-run check --bundle",
        )  # fmt: skip
    return found
