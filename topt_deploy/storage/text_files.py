"""Text and JSON, written atomically."""

import json
from pathlib import Path
from typing import Any

from .atomic import atomic_file


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON atomically."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """A value as indented JSON; NaN and infinity are refused, for JSON has none."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # What is not UTF-8 in a file's name is a lone surrogate in Python, and \udcff in JSON.
    return text.encode(errors="backslashreplace").decode()
