"""Conditions on rows, in the form of SQL: ``"Primary Type" in ('THEFT', 'BATTERY') and Arrest = 'true'``.

The part of SQL's WHERE that filters need: comparisons of a column with values, ``in``, ``like``, ``is null``, ``and``,
``or``, ``not`` and parentheses. Texts are compared as they stand; where a value is a number, the column is read as one.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from topt_deploy.errors import BadConfig

from .values import as_text, numbers

Test = Callable[[pa.Table], Any]

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*')|(?P<quoted>"(?:[^"]|"")*")|(?P<number>[+-]?\d+(?:\.\d+)?)|(?P<word>[^\W\d]\w*)"""
    r"""|(?P<sign><>|!=|<=|>=|=|<|>|\(|\)|,))""",
)
_COMPARE = {
    "=": pc.equal, "!=": pc.not_equal, "<>": pc.not_equal,
    "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal,
}  # fmt: skip
_WORDS = {"and", "or", "not", "in", "like", "is", "null"}


class Where:
    """A filter.

    Args:
        text: The condition.
        place: What errors call it.

    Attributes:
        columns: The columns that it reads, as they are written.

    Raises:
        BadConfig: Saying where it ceases to make sense.
    """

    def __init__(self, text: str, place: str) -> None:
        self._text, self._place = text, place
        self._tokens = self._split()
        self._next = 0
        self.columns: list[str] = []
        self._test = self._any()
        if self._next < len(self._tokens):
            raise self._wrong("the end, and or or")

    def __call__(self, table: pa.Table) -> Any:
        """bool (P,): which rows of a table it holds for. What is null holds for none."""
        return np.asarray(pc.fill_null(self._test(table), False))

    def _split(self) -> list[tuple[str, str]]:
        tokens, at = [], 0
        while self._text[at:].strip():
            found = _TOKEN.match(self._text, at)
            if found is None or found.lastgroup is None:
                raise BadConfig("not a condition", column=self._place, found=self._text[at:].strip()[:40])
            kind, value = found.lastgroup, found[found.lastgroup]
            if kind == "word" and value.lower() in _WORDS:
                kind, value = "sign", value.lower()
            elif kind in ("text", "quoted"):
                value = value[1:-1].replace(value[0] * 2, value[0])
            tokens.append((kind, value))
            at = found.end()
        return tokens

    def _wrong(self, expected: str) -> BadConfig:
        found = self._tokens[self._next][1] if self._next < len(self._tokens) else "the end"
        return BadConfig(
            "not a condition", column=self._place, expected=expected, found=repr(found),
            fix="columns in double quotes, texts in single ones: \"Primary Type\" = 'THEFT'",
        )  # fmt: skip

    def _take(self, *signs: str) -> bool:
        if self._next < len(self._tokens) and self._tokens[self._next] in [("sign", sign) for sign in signs]:
            self._next += 1
            return True
        return False

    def _need(self, sign: str) -> None:
        if not self._take(sign):
            raise self._wrong(sign)

    def _any(self) -> Test:
        tests = [self._all()]
        while self._take("or"):
            tests.append(self._all())
        return tests[0] if len(tests) == 1 else lambda table: _joined(pc.or_kleene, tests, table)

    def _all(self) -> Test:
        tests = [self._one()]
        while self._take("and"):
            tests.append(self._one())
        return tests[0] if len(tests) == 1 else lambda table: _joined(pc.and_kleene, tests, table)

    def _one(self) -> Test:
        if self._take("not"):
            inner = self._one()
            return lambda table: pc.invert(inner(table))
        if self._take("("):
            inner = self._any()
            self._need(")")
            return inner
        column = self._column()
        if self._take("is"):
            negative = self._take("not")
            self._need("null")
            check = pc.is_valid if negative else pc.is_null
            return lambda table: check(as_text(table.column(column)))
        negative = self._take("not")
        test = self._comparison(column, negative)
        return (lambda table: pc.invert(test(table))) if negative else test

    def _comparison(self, column: str, negated: bool) -> Test:
        if self._take("in"):
            self._need("(")
            values = [self._value()[1]]
            while self._take(","):
                values.append(self._value()[1])
            self._need(")")
            return lambda table: pc.and_(
                pc.is_in(as_text(table.column(column)), pa.array(values)),
                pc.is_valid(as_text(table.column(column))),
            )
        if self._take("like"):
            pattern = self._value()[1]
            return lambda table: pc.match_like(as_text(table.column(column)), pattern)
        for sign, compare in _COMPARE.items():
            if not negated and self._take(sign):
                kind, value = self._value()
                if kind == "number":
                    number = float(value)
                    return lambda table: compare(_numbers(table, column), number)
                return lambda table: compare(as_text(table.column(column)), value)
        raise self._wrong("=, <>, <, <=, >, >=, in, like or is null")

    def _column(self) -> str:
        if self._next < len(self._tokens) and self._tokens[self._next][0] in ("quoted", "word"):
            self.columns.append(self._tokens[self._next][1])
            self._next += 1
            return self.columns[-1]
        raise self._wrong("a column")

    def _value(self) -> tuple[str, str]:
        if self._next < len(self._tokens) and self._tokens[self._next][0] in ("text", "number", "word"):
            self._next += 1
            return self._tokens[self._next - 1]
        raise self._wrong("a value")


def _numbers(table: pa.Table, column: str) -> pa.Array:
    return pa.array(numbers(table.column(column))[0], pa.float64(), from_pandas=True)


def _joined(join: Any, tests: list[Test], table: pa.Table) -> Any:
    found = tests[0](table)
    for test in tests[1:]:
        found = join(found, test(table))
    return found
