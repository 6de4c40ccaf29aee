"""From the region ids that tables of others name to the city's regions."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .locate import OUTSIDE
from .tally import Tally
from .values import as_text

Array = np.ndarray[Any, Any]

CENSUS = (2, 5, 11, 12, 15)
"""Digits of the ids of US states, counties, tracts, block groups and blocks, each of which begins the next one's."""


class Matcher:
    """Finds regions by id: as it stands, without a float's ``.0``, with zeros that were lost, or of a larger area.

    Args:
        ids: str (N,), sorted.
    """

    def __init__(self, ids: Array) -> None:
        self._place = {str(region): place for place, region in enumerate(ids)}
        lengths = {len(region) for region in self._place}
        digits = all(region.isascii() and region.isdigit() for region in self._place)
        self._width = lengths.pop() if len(lengths) == 1 and digits else 0
        self._bare = {} if self._width else self._without_zeros()
        self._known: dict[str, int] = {}
        self.mended = 0
        """How many different ids had lost their zeros."""

    def match(self, column: pa.ChunkedArray, lines: Array, path: Path, tally: Tally | None) -> Array:
        """The regions of ids (P,), int64, places in the regions; ids that there are not are counted."""
        region, known = self.places(column)
        if tally is not None:
            lost = region == OUTSIDE
            if lost.any():
                at = np.flatnonzero(lost)
                told = known.take(pa.array(at[:1000])).to_pylist()
                blank = pc.is_null(known).to_numpy()[at]
                for reason, rows in (("blank", blank), ("unknown_region", ~blank)):
                    values = [value for value, is_one in zip(told, rows[:1000], strict=False) if is_one]
                    tally.reject(path, lines[at[rows]], reason, values)
        return region

    def places(self, column: pa.ChunkedArray) -> tuple[Array, pa.ChunkedArray]:
        """The regions of ids, and the ids as text."""
        text = as_text(column)
        coded = text.combine_chunks().dictionary_encode()
        if isinstance(coded, pa.ChunkedArray):
            coded = coded.combine_chunks()
        words = coded.dictionary.to_pylist()
        found = np.array([*(self.place(word) for word in words), OUTSIDE], np.int64)
        return found[coded.indices.fill_null(len(words)).to_numpy(zero_copy_only=False)], text

    def place(self, word: str) -> int:
        """The region of one id, or :data:`OUTSIDE`."""
        if word not in self._known:
            self._known[word] = self._find(word)
        return self._known[word]

    def _find(self, word: str) -> int:
        if word in self._place:
            return self._place[word]
        number = word
        if "e+" in word.lower() or word.endswith(".0"):  # as a spreadsheet writes long numbers
            try:
                number = str(int(float(word)))
            except ValueError:
                return OUTSIDE
        if not (number.isascii() and number.isdigit()):
            return OUTSIDE
        if self._width:
            short = number.lstrip("0") if len(number) > self._width and self._width not in CENSUS[1:] else number
            for whole in (short.zfill(length) for length in self._lengths(number) if len(short) <= length):
                if whole[: self._width] in self._place:
                    self.mended += whole != number
                    return self._place[whole[: self._width]]
            return OUTSIDE
        return self._bare.get(number.lstrip("0") or "0", OUTSIDE)

    def _lengths(self, number: str) -> list[int]:
        """The lengths that a number may have had before it lost its zeros: an id's own, or a smaller area's."""
        if self._width not in CENSUS or self._width < CENSUS[1]:
            return [self._width]
        return [length for length in CENSUS if length >= self._width and length - 1 <= len(number) <= length]

    def _without_zeros(self) -> dict[str, int]:
        """Regions by their number without leading zeros, where that tells them apart."""
        bare: dict[str, int] = {}
        twice = set()
        for region, place in self._place.items():
            if region.isascii() and region.isdigit():
                short = region.lstrip("0") or "0"
                twice |= {short} & bare.keys()
                bare[short] = place
        return {short: place for short, place in bare.items() if short not in twice}
