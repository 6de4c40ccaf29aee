"""Trips between regions: by the ids of zones, by positions, or by the blocks of a census; added up by pair."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from topt_deploy.errors import BadConfig

from .find import resolve
from .locate import OUTSIDE
from .match import Matcher
from .points import Positions, Selected, Selection
from .recipe import Source
from .rows import open_rows
from .seen import Seen
from .tally import Tally
from .values import as_text, numbers

if TYPE_CHECKING:
    from .city import CityInMaking

Array = np.ndarray[Any, Any]
Flows = tuple[Array, Array, Array]
"""Origins and destinations, int64 (E,), places in the regions, each pair once and sorted; trips, float64 (E,)."""
PAIRS_HELD = 1 << 22


def count_flows(
    source: Source, city: "CityInMaking", tally: Tally, files: Sequence[Path], told: Callable[[Path, float], None]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The trips of a source's files, by pair of regions.

    Args:
        source: As the recipe says.
        city: Its regions and period.
        tally: Where is written down what became of rows.
        files: The files.
        told: Told of a file and the share of it that is done.
    """
    counter = _Counter(source, city, tally)
    for path in files:
        for share in counter.add(path):
            told(path, share)
    origin, dest, flow = counter.result()
    return {"origin": origin, "dest": dest, "flow": flow}, {}


def add_up(parts: Sequence[Flows], regions: int) -> Flows:
    """Flows with each pair once, sorted by origin and destination."""
    key = np.concatenate([origin * regions + dest for origin, dest, _ in parts])
    flow = np.concatenate([flow for *_, flow in parts])
    keys, where = np.unique(key, return_inverse=True)
    return keys // regions, keys % regions, np.bincount(where, flow, len(keys)).astype(np.float64)


class _Counter:
    """Adds up trips by pair."""

    def __init__(self, source: Source, city: "CityInMaking", tally: Tally) -> None:
        self._source, self._city, self._tally = source, city, tally
        self._n = len(city.regions)
        self._matcher = Matcher(city.regions.ids)
        self._seen = Seen()
        none = np.empty(0, np.int64)
        self._parts: list[Flows] = [(none, none, np.empty(0))]
        self._held = 0

    def add(self, path: Path) -> Iterator[float]:
        """Add up a file's trips, and yield the share of it that is done now and then."""
        file = open_rows(path, self._source)
        source = resolve(self._source, file.names, path, role="flows", placed=file.placed)
        count = source.count if source.count in file.names else None
        ends = self._ends(source, path, file)
        select = Selection(source, file, self._city.period, self._tally, needs_date=_has_dates(source), seen=self._seen)
        columns = [column for end in ends for column in end.columns]
        for part in select.read(select.columns([*columns, count])):
            self._count(part, ends, count, source, path)
            yield file.done

    def _ends(self, source: Source, path: Path, file: Any) -> list["_Zone | _Place"]:
        if source.origin is not None and source.dest is not None:
            return [_Zone(source.origin, self), _Zone(source.dest, self)]
        if None not in (source.origin_lon, source.origin_lat, source.dest_lon, source.dest_lat):
            pairs = ((source.origin_lon, source.origin_lat), (source.dest_lon, source.dest_lat))
            return [
                _Place(Positions(Source(file=(), lon=lon, lat=lat, decimal=source.decimal), file), self._city.locator)
                for lon, lat in pairs
            ]
        raise BadConfig(
            "where trips begin and end is not stated", file=path, found=", ".join(file.names),
            expected="columns origin and dest, or origin_lon, origin_lat, dest_lon, dest_lat",
            fix='name them in the recipe: origin = "…" and dest = "…"',
        )  # fmt: skip

    def _count(
        self, part: Selected, ends: Sequence["_Zone | _Place"], count: str | None, source: Source, path: Path
    ) -> None:
        found = [end.regions(part) for end in ends]
        (origin, *_), (dest, *_) = found
        trips = np.ones(len(origin))
        if count is not None:
            trips, bad = numbers(part.table.column(count), source.decimal)
            bad |= np.isnan(trips) | (trips < 0)
            told = as_text(part.table.column(count)).to_numpy()[bad]
            self._tally.reject(path, part.lines[bad], "bad_number", told, count)
            origin = np.where(bad, OUTSIDE, origin)
            trips = np.where(bad, 0, trips)
            left = ~bad
        else:
            left = np.ones(len(origin), bool)
        self._reject(path, part, found, left)
        whole = np.flatnonzero((origin != OUTSIDE) & (dest != OUTSIDE))
        self._tally.assigned += len(whole)
        self._keep(origin[whole] * self._n + dest[whole], trips[whole])

    def _reject(self, path: Path, part: Selected, found: Sequence[tuple[Array, Array, Any]], left: Array) -> None:
        """Count trips of which an end is in no region, each once, by what is wrong with the first such end."""
        for region, reasons, values in found:
            for reason in ("bad_number", "blank", "null_island", "unknown_region", "outside"):
                rows = np.flatnonzero(left & (region == OUTSIDE) & (reasons == reason))
                self._tally.reject(path, part.lines[rows], reason, values(rows[:1000]))
            left = left & (region != OUTSIDE)

    def _keep(self, key: Array, trips: Array) -> None:
        if self._n * self._n <= PAIRS_HELD:
            flow = np.bincount(key, trips, self._n * self._n)
            key = np.flatnonzero(flow)
            flow = flow[key]
        else:
            key, where = np.unique(key, return_inverse=True)
            flow = np.bincount(where, trips, len(key))
        self._parts.append((key // self._n, key % self._n, flow))
        self._held += len(key)
        if self._held > 2 * PAIRS_HELD:
            self._parts = [add_up(self._parts, self._n)]
            self._held = len(self._parts[0][0])

    def result(self) -> Flows:
        """All trips by pair."""
        flows = add_up(self._parts, self._n)
        tally = self._tally
        unknown = tally.reasons["unknown_region"]
        if tally.read and not tally.assigned:
            tally.warnings.append(f"none of {tally.read:,} trips is between two regions")
        elif unknown > tally.assigned:
            tally.warnings.append(
                f"{unknown:,} of {tally.read:,} trips name regions that there are not: the regions may be of another"
                " year (LODES7 names blocks of 2010, LODES8 those of 2020), or of another kind"
            )
        if self._matcher.mended:
            tally.warnings.append(
                f"{self._matcher.mended:,} different ids had lost their leading zeros, and have them again"
            )
        return flows


class _Zone:
    """An end of trips that is named by a region's id."""

    def __init__(self, column: str, counter: _Counter) -> None:
        self.columns: list[str | None] = [column]
        self._column, self._matcher = column, counter._matcher

    def regions(self, part: Selected) -> tuple[Array, Array, Any]:
        """Regions (P,), why there is none (P,), and what stands there, by row."""
        region, text = self._matcher.places(part.table.column(self._column))
        blank = text.is_null().to_numpy()
        reasons = np.where(blank, "blank", "unknown_region")
        return region, reasons, lambda rows: text.take(pa.array(rows)).to_pylist()


class _Place:
    """An end of trips that is given by a position."""

    def __init__(self, positions: Positions, locator: Any) -> None:
        self.columns = positions.columns
        self._positions, self._locator = positions, locator

    def regions(self, part: Selected) -> tuple[Array, Array, Any]:
        """Regions (P,), why there is none (P,), and what stands there, by row."""
        lon, lat, bad = self._positions.read(part.table)
        region = self._locator.locate(lon, lat).region.astype(np.int64)
        zero = (lon == 0) & (lat == 0)
        region[zero] = OUTSIDE
        reasons = np.full(len(lon), "outside", dtype="<U14")
        reasons[zero] = "null_island"
        reasons[np.isnan(lon) | np.isnan(lat)] = "blank"
        reasons[bad] = "bad_number"
        return region, reasons, lambda rows: [f"{lon[row]!r}, {lat[row]!r}" for row in rows]


def _has_dates(source: Source) -> bool:
    """True if a table holds single trips, which have dates; a table of counts need not have any."""
    return source.count is None
