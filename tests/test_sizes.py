"""No file above 400 lines without a reason in its first lines, no function above 60, no two classes of one name."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("topt_deploy", "train", "export", "runtime")
FILE_LINES, FUNCTION_LINES = 400, 60
LONG_FILES = {"dev/benchmarks/gpu_check.py": "One file: every part of the check is a process of this very file"}
"""Longer files, with the reason that stands in their docstring."""
LONG_FUNCTIONS = {
    "dev/benchmarks/chicago.py:main": "a command line and the page that it writes",
    "dev/benchmarks/gpu_check.py:train": "one check after the other, each a few lines",
}


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` on, without the docstring: arguments and errors are described at any length."""
    first = function.body[0]
    described = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    text = (first.end_lineno or 0) - first.lineno + 1 if described else 0
    return (function.end_lineno or 0) - function.lineno + 1 - text


def long_functions(source: str) -> list[str]:
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [function.name for function in found if code_lines(function) > FUNCTION_LINES]


@pytest.mark.parametrize("path", modules(*PRODUCT, "dev", "scripts"), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    name, source = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    if name in LONG_FILES:
        assert LONG_FILES[name] in (ast.get_docstring(ast.parse(source)) or ""), "the reason stands in the file"
    else:
        assert source.count("\n") <= FILE_LINES
    assert [
        f"{name}:{function}" for function in long_functions(source) if f"{name}:{function}" not in LONG_FUNCTIONS
    ] == []


def test_every_exception_is_one_still():
    for name in LONG_FILES:
        assert (ROOT / name).read_text(encoding="utf-8").count("\n") > FILE_LINES
    for name in LONG_FUNCTIONS:
        file, _, function = name.partition(":")
        assert function in long_functions((ROOT / file).read_text(encoding="utf-8"))


def test_a_long_function_is_found_and_its_docstring_is_not_counted():
    body = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
    assert long_functions(f"def f():\n{body}\n") == ["f"]
    assert long_functions(f'def f():\n    """{"text" + chr(10) * FUNCTION_LINES}"""\n    return 1\n') == []


def test_no_two_public_classes_have_one_name():
    places = defaultdict(list)
    for path in modules(*PRODUCT):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path.relative_to(ROOT).as_posix())
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
