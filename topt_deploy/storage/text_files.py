"""Text and JSON, written atomically."""

import json
from pathlib import Path
from typing import Any

from .atomic import atomic_file

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON atomically."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """A value as indented JSON; NaN and infinity are refused, for JSON has none."""
    text = _indented(value, "\n") + "\n"
    # What is not UTF-8 in a file's name is a lone surrogate in Python, and \udcff in JSON.
    return text.encode(errors="backslashreplace").decode()


def _indented(value: Any, newline: str) -> str:
    """The same text as ``json.dumps(value, indent=2)``, which is slower because indentation switches off its C code."""
    inner = f"{newline}  "
    if isinstance(value, dict) and value:
        names = [key if isinstance(key, str) else _JSON(key) for key in value]
        items = [f"{_JSON(name)}: {_indented(one, inner)}" for name, one in zip(names, value.values(), strict=True)]
        return f"{{{inner}{f',{inner}'.join(items)}{newline}}}"
    if isinstance(value, (list, tuple)) and value:
        return f"[{inner}{f',{inner}'.join([_indented(one, inner) for one in value])}{newline}]"
    return _JSON(value)
