"""Points per region: of interest, by category, or incidents, by period."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from topt_deploy.data.geometry import geo_library
from topt_deploy.errors import BadConfig

from .categories import ALL, Categories
from .find import find, resolve
from .layers import to_lonlat
from .locate import OUTSIDE, Locator
from .match import Matcher
from .recipe import Source
from .rows import CATEGORY, LAT, LON, RowFile, Rows, open_rows
from .seen import Seen
from .suspicions import Suspicions
from .tally import Tally
from .values import Dates, as_text, decimal_of, numbers
from .where import Where

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Period:
    """From ``since`` until ``until``, without the latter, in the city's own time.

    Attributes:
        before: Where the period before it begins, where that is counted too.
        timezone: The city's.
    """

    since: datetime | None
    until: datetime | None
    before: datetime | None = None
    timezone: str | None = None

    @property
    def bounds(self) -> list[datetime]:
        """The ends of the periods, in order."""
        since, until = self.since or datetime.min, self.until or datetime.max
        return [since, until] if self.before is None else [self.before, since, until]

    @property
    def given(self) -> bool:
        """True if there is one."""
        return self.since is not None or self.until is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class Selected:
    """Rows of a file that are asked for, with what the filters tell of them. P rows.

    Attributes:
        table: Their columns.
        lines: int64 (P,), where they stand.
        period: int64 (P,), 0 for the first of the periods.
    """

    table: pa.Table
    lines: Array
    period: Array | None


class Selection:
    """The filters of a source, one after the other: condition, period, key.

    Args:
        source: With columns as its first file has them.
        file: An open file.
        period: What is asked for.
        tally: Where is written down what became of rows.
        needs_date: Whether a source without dates is refused where there is a period.
        seen: The keys of the source's other files.
    """

    def __init__(
        self, source: Source, file: RowFile, period: Period, tally: Tally, *, needs_date: bool, seen: Seen
    ) -> None:
        self.source, self.file, self.tally, self._seen = source, file, tally, seen
        self._where = None if source.where is None else Where(source.where, f"{tally.name}.where")
        self._dates: Dates | None = None
        if needs_date and period.given and source.date is None:
            raise BadConfig(
                "which column holds the dates is not stated, and a period is asked for", file=file.path,
                column=f"{tally.name}.date", found=", ".join(file.names),
                fix='name it: date = "…" in the recipe; without from and to all rows count',
            )  # fmt: skip
        if source.date is not None and period.given:
            self._dates = Dates(
                period.bounds, source.date_format, source.timezone, period.timezone, f"{file.path}: {source.date}"
            )
        self._renamed = {} if self._where is None else {c: find(c, file.names, file.path) for c in self._where.columns}

    def columns(self, more: list[str | None]) -> list[str]:
        """The columns to read: the filters', and ``more``."""
        own = [*self._renamed.values(), self.source.date if self._dates else None, *(self.source.key or ())]
        return list(dict.fromkeys(column for column in [*own, *more] if column is not None))

    def read(self, columns: list[str]) -> Iterator[Selected]:
        """The rows that are asked for; the others are counted."""
        for rows in self.file.read(columns):
            self.tally.read += len(rows.table)
            yield self._selected(rows)
        lines = np.array([line for line, _ in self.file.malformed], np.int64)
        self.tally.read += len(lines)
        self.tally.reject(self.file.path, lines, "bad_line", [told for _, told in self.file.malformed])

    def _selected(self, rows: Rows) -> Selected:
        table, lines = rows.table, np.arange(rows.first, rows.first + len(rows.table)) + self.file.line
        period = None
        if self._where is not None:
            asked = {written: table.column(actual) for written, actual in self._renamed.items()}
            keep = self._where(pa.table(asked))
            self.tally.reasons["filtered"] += int((~keep).sum())
            table, lines = table.filter(pa.array(keep)), lines[keep]
        if self._dates is not None and self.source.date is not None:
            column = table.column(self.source.date)
            period, missing = self._dates.periods(column)
            if missing.any():
                told = as_text(column.filter(pa.array(missing)))
                blank = pc.is_null(told).to_numpy()
                at = lines[missing]
                self.tally.reject(self.file.path, at[blank], "no_date", [None] * int(blank.sum()))
                self.tally.reject(
                    self.file.path, at[~blank], "bad_date", told.drop_null().to_pylist(), self.source.date
                )
            inside = (period >= 0) & (period < len(self._dates._bounds) - 1) & ~missing
            self.tally.reasons["other_period"] += int((~inside & ~missing).sum())
            table, lines, period = table.filter(pa.array(inside)), lines[inside], period[inside]
        if self.source.key is not None:
            again = self._seen.again([table.column(name) for name in self.source.key])
            if again.any():
                keys = as_text(table.column(self.source.key[0]).filter(pa.array(again))).to_pylist()
                self.tally.reject(self.file.path, lines[again], "duplicate", keys)
                table, lines = table.filter(pa.array(~again)), lines[~again]
                period = None if period is None else period[~again]
        return Selected(table=table, lines=lines, period=period)


class Positions:
    """Reads where rows are: degrees, another system, WKT or the file's own geometry.

    Args:
        source: With columns as the file has them.
        file: The file.
    """

    def __init__(self, source: Source, file: RowFile) -> None:
        self._source, self._file = source, file
        self._move = None
        self._decimal = source.decimal
        if source.x is not None and source.y is not None:
            self._pair = (source.x, source.y)
            self._move = to_lonlat(file.path, None, source.crs)
        elif source.lon is not None and source.lat is not None:
            self._pair = (source.lon, source.lat)
        else:
            self._pair = (LON, LAT)

    @property
    def columns(self) -> list[str | None]:
        """The columns that it reads."""
        return [self._source.point] if self._source.point else [c for c in self._pair if c not in (LON, LAT)]

    def read(self, table: pa.Table) -> tuple[Array, Array, Array]:
        """Longitudes and latitudes, float64 (P,), NaN where they are blank; bool (P,): which cannot be read."""
        if self._source.point:
            return _of_shapes(table.column(self._source.point))
        first, second = (table.column(name) for name in self._pair)
        if self._decimal is None:
            self._decimal = max(decimal_of(first), decimal_of(second), key=lambda sign: sign == ",")
        (x, bad_x), (y, bad_y) = numbers(first, self._decimal), numbers(second, self._decimal)
        bad = bad_x | bad_y
        if self._move is not None:
            x, y = self._move(x, y)
            lost = np.isinf(x) | np.isinf(y)
            x, y = np.where(lost, np.nan, x), np.where(lost, np.nan, y)
            bad |= lost & ~(np.isnan(numbers(first, self._decimal)[0]) | np.isnan(numbers(second, self._decimal)[0]))
        return x, y, bad


def _of_shapes(column: pa.ChunkedArray) -> tuple[Array, Array, Array]:
    shapely = geo_library("shapely")
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        blank = column.is_null().to_numpy()
        shapes = shapely.from_wkb(column.to_numpy(), on_invalid="ignore")
    else:
        text = as_text(column)
        blank = text.is_null().to_numpy()
        shapes = shapely.from_wkt(text.to_numpy(), on_invalid="ignore")
    shapes = np.where(shapely.get_type_id(shapes) == 0, shapes, None)
    return shapely.get_x(shapes), shapely.get_y(shapes), shapely.is_missing(shapes) & ~blank


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Counts per region. N regions, K categories.

    Attributes:
        names: The categories.
        values: float64 (N, K).
        before: float64 (N,), the period before, all categories together; None where it is not counted.
        unknown: The publisher's categories that count as other, and how many rows each has.
    """

    names: list[str]
    values: Array
    before: Array | None
    unknown: dict[str, int]


class PointCounter:
    """Counts the rows of a source's files by region and category.

    Args:
        source: As the recipe says.
        locator: Of the city's regions.
        period: What is asked for.
        tally: Where is written down what became of rows.
        role: ``points`` or ``labels``.
        kind: Whose vocabulary the categories are of.
    """

    def __init__(
        self, source: Source, locator: Locator, period: Period, tally: Tally, *, role: str, kind: str = "poi"
    ) -> None:
        self._source, self._locator, self._period, self._tally = source, locator, period, tally
        self._role, self._kind = role, kind
        self._seen = Seen()
        self._matcher = Matcher(locator.regions.ids)
        self._categories: Categories | None = None
        self._cells: dict[int, Array] = {}
        self._n = len(locator.regions)
        self._looked = Suspicions(locator, tally)

    def add(self, path: Path) -> Iterator[float]:
        """Count a file's rows, and yield the share of it that is done now and then."""
        file = open_rows(path, self._source)
        source = resolve(self._source, file.names, path, role=self._role, placed=file.placed)
        needs_date = self._role == "labels"
        select = Selection(source, file, self._period, self._tally, needs_date=needs_date, seen=self._seen)
        positions = None if source.region is not None else Positions(source, file)
        category = source.category if self._role == "points" else None
        if self._role == "points" and CATEGORY in file.names and source.category is None:
            category = CATEGORY
        if self._categories is None:
            mode = "none" if category is None else source.categories
            vocabulary = source.vocabulary or ("osm" if category == CATEGORY else None)  # Overture is recognised
            self._categories = Categories(self._kind, mode, vocabulary, f"{self._tally.name}.categories")
        wanted = [source.region] if positions is None else positions.columns
        before = self._tally.read
        for part in select.read(select.columns([*wanted, category, source.weight])):
            self._count(part, source, positions, category, path)
            yield file.done
        self._looked.whole(path, self._tally.read - before)

    def _count(
        self, part: Selected, source: Source, positions: Positions | None, category: str | None, path: Path
    ) -> None:
        if positions is None:
            assert source.region is not None
            region = self._matcher.match(part.table.column(source.region), part.lines, path, self._tally)
        else:
            region = self._locate(part, positions, path)
        weight = None
        if source.weight is not None:
            weight, bad = numbers(part.table.column(source.weight), source.decimal)
            bad |= np.isnan(weight)
            lost = bad & (region != OUTSIDE)
            told = as_text(part.table.column(source.weight)).to_numpy()[lost]
            self._tally.reject(path, part.lines[lost], "bad_number", told, source.weight)
            region = np.where(bad, OUTSIDE, region)
        assigned = region != OUTSIDE
        if part.period is not None and self._period.before is not None:
            earlier = assigned & (part.period == 0)
            self._tally.reasons["period_before"] += int(earlier.sum())
            self._tally.assigned -= int(earlier.sum())
        self._tally.assigned += int(assigned.sum())
        assert self._categories is not None
        column = None if category is None else part.table.column(category)
        place: Any = slice(None)
        code: Array | int = 0
        if column is not None:
            place, code = self._categories.codes(column, len(region))
        periods = [0] if part.period is None else np.unique(part.period[assigned]).tolist()
        for period in periods:
            here = region if part.period is None else np.where(part.period == period, region, OUTSIDE)
            self._accumulate(int(period), here[place], code, None if weight is None else weight[place])

    def _accumulate(self, period: int, region: Array, code: Array | int, weight: Array | None) -> None:
        many = max(len(self._categories.names) if self._categories else 1, 1)
        cell = (region.astype(np.int64) + 1) * many + code
        found = np.bincount(cell, weights=weight, minlength=(self._n + 1) * many)
        found = found.reshape(self._n + 1, many)[1:].astype(np.float64)
        before = self._cells.get(period)
        if before is not None:
            found[:, : before.shape[1]] += before
        self._cells[period] = found

    def _locate(self, part: Selected, positions: Positions, path: Path) -> Array:
        lon, lat, bad = positions.read(part.table)
        located = self._locator.locate(lon, lat)
        region, tally = located.region, self._tally
        tally.on_border += located.on_border
        low_x, low_y, high_x, high_y = self._locator.bounds
        if low_x <= 0 <= high_x and low_y <= 0 <= high_y:  # else no region has the place where nothing is
            region = np.where((lon == 0) & (lat == 0), OUTSIDE, region)
        out = np.flatnonzero(region == OUTSIDE)
        if len(out):
            x, y = lon[out], lat[out]
            unreadable = bad[out]
            blank = (np.isnan(x) | np.isnan(y)) & ~unreadable
            zero = (x == 0) & (y == 0)
            beyond = ~blank & ~unreadable & ~((np.abs(x) <= 360) & (np.abs(y) <= 90))
            lines = part.lines[out]
            for reason, rows in (
                ("bad_number", unreadable), ("bad_position", beyond), ("blank", blank), ("null_island", zero),
                ("outside", ~(unreadable | beyond | blank | zero)),
            ):  # fmt: skip
                if rows.any():
                    tally.reject(path, lines[rows], reason, _Pairs(x[rows], y[rows]), "/".join(positions._pair))
        self._looked.at(lon, lat, region)
        return region

    def result(self) -> Counts:
        """The counts of all files."""
        tally = self._tally
        self._looked.say()
        if tally.read and not tally.assigned:
            tally.warnings.append(f"none of {tally.read:,} rows counts for a region")
        categories = self._categories
        names = categories.names if categories else [ALL]
        many = max(len(names), 1)
        empty = np.zeros((self._n, many))
        current = 0 if self._period.before is None else 1
        values = {period: _wide(cells, many) for period, cells in self._cells.items()}
        before = None if self._period.before is None else values.get(0, empty).sum(axis=1)
        unknown = dict(sorted((categories.unknown if categories else {}).items(), key=lambda item: (-item[1], item[0])))
        counts = values.get(current, empty)
        if "other" in names:
            tally.other = round(float(counts[:, names.index("other")].sum()))
        if unknown and tally.other > counts.sum() / 2:
            tally.warnings.append(
                f"{tally.other:,} of {round(float(counts.sum())):,} count as other, such as {next(iter(unknown))!r}:"
                ' the vocabulary does not know them. Name another (vocabulary = "…"), or keep them: categories = "own"'
            )
        return Counts(names=names, values=counts, before=before, unknown=dict(list(unknown.items())[:50]))


def _wide(values: Array, many: int) -> Array:
    wide = np.zeros((len(values), many))
    wide[:, : values.shape[1]] = values[:, :many]
    return wide


class _Pairs(Sequence[str]):
    """Positions as text, made of those alone that are asked for."""

    def __init__(self, x: Array, y: Array) -> None:
        self._x, self._y = x, y

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, part: Any) -> Any:
        """The texts of a slice."""
        return [f"{x!r}, {y!r}" for x, y in zip(self._x[part].tolist(), self._y[part].tolist(), strict=True)]
