"""From a publisher's categories to the columns of a view: the shared vocabulary, the publisher's own, or a table."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.vocabulary import OTHER, Vocabulary, load_vocabulary
from topt_deploy.errors import BadConfig, BadData

from .values import as_text

Array = np.ndarray[Any, Any]

ALL = "all"
"""The one category of things that are not told apart."""
OWN_LIMIT = 500


class Categories:
    """The categories of a view, which grow as they are met unless they are the shared ones.

    Args:
        kind: Whose vocabulary it is: ``poi`` or ``land_use``.
        mode: ``shared``, ``own``, ``none``, or a table from the publisher's categories to others.
        publisher: Whose categories they are, of :data:`topt_deploy.data.vocabulary.PUBLISHERS`.
        place: What errors call them.

    Attributes:
        names: The categories, in the order of their codes.
        unknown: How many rows of each publisher's category are counted as other.
    """

    def __init__(self, kind: str, mode: str | Mapping[str, str] | None, publisher: str | None, place: str) -> None:
        self._kind, self._mode, self._publisher, self._place = kind, mode or "shared", publisher, place
        self._vocabulary: Vocabulary | None = None
        self._codes: dict[str | None, tuple[int, ...]] = {}
        self.unknown: dict[str, int] = {}
        self.names: list[str] = []
        self._places: dict[str, int] = {}
        if isinstance(self._mode, str) and self._mode not in ("shared", "own", "none"):
            raise BadConfig(
                "not a way to name categories", column=place, expected="shared, own, none or a table", found=self._mode
            )
        if self._mode == "none":
            self._code(ALL)
        if self._mode == "shared":
            self._vocabulary = load_vocabulary()
            for name in self._vocabulary.names(kind):
                self._code(name)
        if isinstance(self._mode, Mapping):
            for name in [*dict.fromkeys(self._mode.values()), OTHER]:
                self._code(column_name(name))

    def codes(self, column: pa.ChunkedArray, rows: int) -> tuple[Array | slice, Array]:
        """The categories of rows, pairs of a row and a code: a row that is several things counts once for each.

        Args:
            column: Texts, or lists of them (P,).
            rows: P.

        Returns:
            int64 (K,) and int64 (K,); in place of the first all rows, as a slice, where each has one code.
        """
        if self._mode == "none":
            return slice(None), np.zeros(rows, np.int64)
        if pa.types.is_list(column.type):
            return self._lists(column)
        column = column if pa.types.is_dictionary(column.type) else as_text(column).dictionary_encode()
        coded = [self._chunk(chunk) for chunk in column.chunks]
        codes = np.concatenate([codes for _, codes in coded]) if coded else np.empty(0, np.int64)
        if all(many is None for many, _ in coded):
            return slice(None), codes
        many = [
            np.ones(len(chunk), np.int64) if one is None else one
            for (one, _), chunk in zip(coded, column.chunks, strict=True)
        ]
        return np.repeat(np.arange(rows), np.concatenate(many)), codes

    def of(self, value: str | None) -> tuple[int, ...]:
        """The codes of one publisher's category."""
        if value not in self._codes:
            self._codes[value] = tuple(dict.fromkeys(self._code(name) for name in self._named(value)))
            if len(self.names) > OWN_LIMIT:
                raise BadData(
                    "too many categories for a view", column=self._place, expected=f"at most {OWN_LIMIT}",
                    found=", ".join(self.names[:5]), fix='name fewer, with a table: categories = { "…" = "…" }',
                )  # fmt: skip
        return self._codes[value]

    def _chunk(self, chunk: Any) -> tuple[Array | None, Array]:
        """How many codes each row has, None where it is one each, and the codes."""
        words = as_text(pa.chunked_array([chunk.dictionary])).to_pylist()  # blanks are None, in every kind of file
        index = chunk.indices.fill_null(len(words)).to_numpy(zero_copy_only=False)
        sets = [self.of(word) for word in [*words, None]]
        self._count_unknown([*words, None], sets, np.bincount(index, minlength=len(sets)))
        if all(len(codes) == 1 for codes in sets):
            return None, np.array([codes[0] for codes in sets])[index]
        many = np.array([len(codes) for codes in sets])[index]
        return many, np.array([c for i in index.tolist() for c in sets[i]], np.int64)

    def _lists(self, column: pa.ChunkedArray) -> tuple[Array, Array]:
        owners: list[int] = []
        codes: list[int] = []
        for row, words in enumerate(column.to_pylist()):
            found = dict.fromkeys(code for word in words or [None] for code in self.of(word))
            if len(found) > 1 and self._mode == "shared":
                found.pop(self._places[OTHER], None)  # a thing with a name of its own is not other as well
            owners += [row] * len(found)
            codes += found
        return np.array(owners, np.int64), np.array(codes, np.int64)

    def _count_unknown(self, words: Iterable[str | None], sets: list[tuple[int, ...]], counts: Array) -> None:
        other = self._places.get(OTHER)
        for word, codes, count in zip(words, sets, counts.tolist(), strict=True):
            if count and codes == (other,) and word is not None:
                self.unknown[word] = self.unknown.get(word, 0) + count

    def _named(self, value: str | None) -> tuple[str, ...]:
        if value is None:
            return (OTHER,)
        if isinstance(self._mode, Mapping):
            return (column_name(self._mode.get(value, OTHER)),)
        if self._vocabulary is not None:
            return self._vocabulary.categories(self._kind, self._publisher, value)
        return (column_name(value),)

    def _code(self, name: str) -> int:
        if name not in self._places:
            self._places[name] = len(self.names)
            self.names.append(name)
        return self._places[name]


def column_name(value: str) -> str:
    """A category as the end of a column's name: lower case, and ``_`` for what is no letter or digit of any script."""
    return re.sub(r"[^\w]+|_+", "_", value.lower()).strip("_") or OTHER
