"""Other people's programs that the product works with: ``make services`` installs each in a place of its own."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("TOPT_SERVICES", Path(__file__).resolve().parents[2] / ".services"))


def service(program: str) -> str:
    """A program below the folder of services; the test is skipped where it is not installed."""
    path = FOLDER / program
    if not path.exists():
        pytest.skip(f"{path} is absent: make services installs it")
    return str(path)
