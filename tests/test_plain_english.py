"""Docstrings say what a thing is or does: none opens with What, Whether or Which, as a riddle does."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("topt_deploy", "train", "export", "runtime", "dev", "examples")
RIDDLES = ("What", "Whether", "Which")


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every text that stands alone as a statement, by line: docstrings, and those below an attribute or constant."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_opens_with_a_riddle(folder: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text.strip().splitlines()[0]}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(ast.parse(file.read_text(encoding="utf-8")))
        if text.split()[:1] and text.split()[0] in RIDDLES
    ]
    assert not found, "say what it is or does:\n" + "\n".join(found)
