"""Signs of what is wrong in a file: axes that are swapped, much on few coordinates, and an answer that was cut off."""

from pathlib import Path
from typing import Any

import numpy as np

from .locate import OUTSIDE, Locator
from .tally import Tally

Array = np.ndarray[Any, Any]

SAMPLE = 200_000
"""Positions that are looked at for what looks wrong in them."""
FEW = 10
ANSWER = 1000
MUCH = 0.2
"""That much of all on :data:`FEW` coordinates is said."""


class Suspicions:
    """Signs of what is wrong: swapped axes, many things on few coordinates, files that were cut off."""

    def __init__(self, locator: Locator, tally: Tally) -> None:
        self._locator, self._tally = locator, tally
        self._seen: list[Array] = []
        self._rows = self._swapped = self._outside = 0

    def at(self, lon: Array, lat: Array, region: Array) -> None:
        """Look at the first positions."""
        room = SAMPLE - self._rows
        if room <= 0 or len(lon) == 0:
            return
        lon, lat, region = lon[:room], lat[:room], region[:room]
        self._rows += len(lon)
        out = region == OUTSIDE
        self._outside += int(out.sum())
        self._swapped += int((self._locator.locate(lat[out], lon[out]).region != OUTSIDE).sum())
        self._seen.append(np.stack([lon[~out], lat[~out]], axis=1))

    def whole(self, path: Path, rows: int) -> None:
        """Warn of a file that ends where an interface ends its answers."""
        if rows == ANSWER:
            self._tally.warnings.append(
                f"{path.name} has exactly {ANSWER:,} rows, where Socrata's interfaces stop unless $limit asks for more:"
                " is it the whole file?"
            )

    def say(self) -> None:
        """Warn of it, with figures."""
        if self._swapped > self._outside / 2 > 0:
            self._tally.warnings.append(
                f"{self._swapped:,} of {self._outside:,} positions outside lie inside once longitude and latitude are"
                " swapped: name the columns the other way round"
            )
        points = np.concatenate(self._seen) if self._seen else np.empty((0, 2))
        if len(points) >= 10 * FEW:
            unique, counts = np.unique(points.view("c16").ravel(), return_counts=True)
            top = int(np.sort(counts)[-FEW:].sum())
            if len(unique) > FEW and top > MUCH * len(points):
                self._tally.warnings.append(
                    f"{top:,} of {len(points):,} rows ({top / len(points):.0%}) lie on {FEW} coordinates: their"
                    " publisher may put rows without an exact place there, such as at a precinct's station"
                )
