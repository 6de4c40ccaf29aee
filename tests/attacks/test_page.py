"""The page on hardening names every guard, and tests that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
READER = "protobuf.py"
"""Reads the messages that two guards look at, and stops nothing by itself."""
PAGE = (ROOT / "docs" / "background" / "hardening.md").read_text(encoding="utf-8")


def test_every_guard_is_on_the_page():
    guards = {path.name for path in (ROOT / "topt_deploy" / "hardening").glob("*.py")} - {"__init__.py", READER}
    assert set(re.findall(r"^\| `(\w+\.py)` \|", PAGE, re.M)) == guards


def test_every_test_that_it_names_exists():
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", PAGE)
    assert len(named) >= 6
    for file, name in named:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{name}"
