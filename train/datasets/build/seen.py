"""A set of the keys that have been seen before, in eight bytes a key.

Keys are hashed to 64 bits: among ten million, the chance that any two are taken for each other is 3 in a million.
"""

from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from .values import as_text

Array = np.ndarray[Any, Any]


class Seen:
    """Keys of rows, over all files of a source. The first row of a key is the one that counts."""

    def __init__(self) -> None:
        self._runs: list[Array] = []

    def again(self, columns: list[pa.ChunkedArray]) -> Array:
        """bool (P,): which rows have a key that was seen before, here or in an earlier call. Null is no key.

        Args:
            columns: The key's parts (P,).
        """
        texts = [as_text(column) for column in columns]
        rows = zip(*(text.to_pylist() for text in texts), strict=True)
        keys = np.array([_hash(row) for row in rows], np.uint64)
        blank = np.array([None in row for row in zip(*(text.to_pylist() for text in texts), strict=True)], bool)
        unique, first = np.unique(keys, return_index=True)
        again = np.ones(len(keys), bool)
        again[first[~self._known(unique)]] = False
        self._add(unique)
        return again & ~blank

    def _known(self, keys: Array) -> Array:
        known = np.zeros(len(keys), bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            known |= run[place] == keys
        return known

    def _add(self, keys: Array) -> None:
        """Runs grow by merging, so that there are few of them."""
        while self._runs and len(self._runs[-1]) <= 2 * len(keys):
            keys = np.union1d(self._runs.pop(), keys)
        if len(keys):
            self._runs.append(keys)


def _hash(row: tuple[str | None, ...]) -> int:
    return int.from_bytes(blake2b("\0".join(part or "" for part in row).encode(), digest_size=8).digest(), "little")
