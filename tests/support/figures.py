"""Figures of tests that dev/benchmarks/reliability.py runs at full length for docs/background/reliability.md."""

import json
import os
from pathlib import Path
from typing import Any

FILE = "TOPT_RELIABILITY_FIGURES"
FULL = os.environ.get(FILE) is not None


def record(part: str, **facts: Any) -> None:
    """Add a line to the file that the environment names, if it does."""
    if FULL:
        with Path(os.environ[FILE]).open("a") as file:
            file.write(json.dumps({"part": part, **facts}) + "\n")
