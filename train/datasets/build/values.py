"""Numbers, texts and dates as publishers write them, a column at a time."""

import re
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from topt_deploy.errors import BadConfig

from .recipe import zone

Array = np.ndarray[Any, Any]

BLANK = ("", "null", "NULL", "Null", "NA", "N/A", "n/a", "nan", "NaN", "None", "(null)")
_CURRENCY = r"^[$€£¥]\s*|\s*[$€£¥]$"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_SAMPLE = 1000
ISO = "ISO 8601"
FORMATS = (
    ISO, "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%m/%d/%Y", "%Y/%m/%d %I:%M:%S %p",
    "%Y/%m/%d %H:%M:%S", "%Y/%m/%d", "%d/%m/%Y %I:%M:%S %p", "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d/%m/%Y",
    "%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y", "%Y%m%d", "%a %b %d %H:%M:%S %z %Y",
)  # fmt: skip
"""Formats of dates that are tried where none is named."""
_ISO_FORM = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?)?(Z|[+-]\d{2}:?\d{2})?$"
_OFFSET = r"(?P<sign>[+-])(?P<hours>\d{2}):?(?P<minutes>\d{2})"


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column out of its dictionary, where it has one."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as trimmed text; whole numbers that are stored as floats lose their ``.0``, and blanks are null."""
    column = plain(column)
    if pa.types.is_floating(column.type):
        whole = pc.equal(pc.floor(column), column)
        column = pc.if_else(
            pc.fill_null(whole, False), pc.cast(pc.cast(column, pa.int64(), safe=False), pa.string()),
            pc.cast(column, pa.string()),
        )  # fmt: skip
    elif not pa.types.is_string(column.type):
        column = column.cast(pa.string())
    column = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.is_in(column, pa.array(BLANK)), pa.scalar(None, pa.string()), column)


def numbers(column: pa.ChunkedArray, decimal: str | None = None) -> tuple[Array, Array]:
    """A column as float64 (P,), NaN where it is blank, and bool (P,): which are no numbers.

    Args:
        column: Numbers, or texts with thousands separators, a currency, blanks.
        decimal: The decimal separator; a point by default.
    """
    column = plain(column)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        values = column.cast(pa.float64()).to_numpy()
        return values, np.isinf(values)
    if decimal != ",":
        try:
            values = column.cast(pa.float64()).to_numpy()
            return values, np.isinf(values)
        except pa.ArrowInvalid:
            pass
    text = pc.utf8_trim_whitespace(column)
    blank = pc.fill_null(pc.is_in(text, pa.array(BLANK)), True)
    text = pc.replace_substring_regex(text, _CURRENCY, "")
    point, thousands = (",", r"\.") if decimal == "," else (".", ",")
    grouped = pc.match_substring_regex(text, rf"^[+-]?\d{{1,3}}([{thousands}'\s]\d{{3}})+(\{point}\d+)?$")
    text = pc.if_else(grouped, pc.replace_substring_regex(text, rf"[{thousands}'\s]", ""), text)
    text = pc.replace_substring(text, point, ".") if decimal == "," else text
    sound = pc.fill_null(pc.match_substring_regex(text, _NUMBER), False)
    values = pc.if_else(sound, text, None).cast(pa.float64()).to_numpy()
    bad = ~sound.to_numpy() & ~blank.to_numpy() | np.isinf(values)
    return values, bad


def decimal_of(column: pa.ChunkedArray) -> str:
    """The decimal separator of positions: a comma in degrees never separates thousands."""
    column = plain(column)
    if pa.types.is_string(column.type) and pc.any(pc.match_substring_regex(column, r"^\s*-?\d{1,3},\d+\s*$")).as_py():
        return ","
    return "."


class Dates:
    """Reads a column of dates and tells which period each belongs to.

    Args:
        bounds: The periods' ends in order, in the city's own time: period k is from ``bounds[k]`` until
            ``bounds[k + 1]``, without the latter.
        form: The format; found where it is None.
        source_zone: The zone of dates that name none; the city's by default.
        city_zone: The city's zone.
        place: What errors call the column.
    """

    def __init__(
        self, bounds: list[datetime], form: str | None, source_zone: str | None, city_zone: str | None, place: str
    ) -> None:
        self._bounds, self._form, self._place = bounds, form, place
        self._source_zone, self._city_zone = source_zone or city_zone, city_zone

    def periods(self, column: pa.ChunkedArray) -> tuple[Array, Array]:
        """The period of every date, int64 (P,): -1 before them and K after; and bool (P,): which are no dates.

        A blank is no date.
        """
        moments, aware = self._moments(plain(column))
        missing = np.isnat(moments)
        ends = np.array([np.datetime64(bound, "us") for bound in self._in_frame(aware)])
        return np.where(missing, -1, np.searchsorted(ends, moments, side="right") - 1), missing

    def _in_frame(self, aware: bool) -> list[datetime]:
        """The bounds as the column's own clock shows them."""
        if not aware and self._source_zone == self._city_zone:
            return self._bounds
        if self._city_zone is None:
            raise BadConfig(
                "the dates name their zone, and the city's is not known", column=self._place,
                fix='name the city\'s: timezone = "America/Chicago"',
            )  # fmt: skip
        other = "UTC" if aware else self._source_zone
        assert other is not None
        local = zone(self._city_zone)
        return [b.replace(tzinfo=local).astimezone(zone(other)).replace(tzinfo=None) for b in self._bounds]

    def _moments(self, column: pa.ChunkedArray) -> tuple[Array, bool]:
        """datetime64[us] (P,), NaT where there is no date, and whether they are UTC."""
        kind = column.type
        if pa.types.is_timestamp(kind):
            return column.cast(pa.timestamp("us", kind.tz), safe=False).to_numpy().astype("M8[us]"), kind.tz is not None
        if pa.types.is_date(kind):
            return column.cast(pa.timestamp("us")).to_numpy().astype("M8[us]"), False
        text = as_text(column)
        form = self._form = self._form or self._found(text)
        if form == ISO:
            return _iso(text)
        if "%z" in form:
            return _with_offset(text, form)
        return _parsed(text, form).to_numpy().astype("M8[us]"), False

    def _found(self, text: pa.ChunkedArray) -> str:
        """The one format that fits the first dates."""
        sample = pc.drop_null(text).slice(0, _SAMPLE)
        if len(sample) == 0:
            return ISO
        fitting = [form for form in FORMATS if not np.isnat(_try(sample, form)).any()]
        found = f"{sample[0].as_py()!r}"
        if not fitting:
            best = max(FORMATS, key=lambda form: int((~np.isnat(_try(sample, form))).sum()))
            if np.isnat(_try(sample, best)).mean() > 0.5:
                raise BadConfig(
                    "dates of an unknown format", column=self._place, found=found,
                    fix='name it as strptime has it: date_format = "%d/%m/%Y"',
                )  # fmt: skip
            return best
        days_first = [form for form in fitting if form.startswith("%d/")]
        if days_first and any(form.startswith("%m/") for form in fitting):
            raise BadConfig(
                "dates may begin with the month or with the day", column=self._place, found=found,
                fix=f'say which: date_format = "{fitting[0]}" or "{days_first[0]}"',
            )  # fmt: skip
        return fitting[0]


def _try(text: pa.ChunkedArray, form: str) -> Array:
    if form == ISO:
        return _iso(text)[0]
    if "%z" in form:
        return _with_offset(text, form)[0]
    return np.asarray(_parsed(text, form).to_numpy().astype("M8[us]"))


def _parsed(text: pa.ChunkedArray, form: str) -> pa.ChunkedArray:
    return pc.strptime(text, format=form, unit="us", error_is_null=True)


def _iso(text: pa.ChunkedArray) -> tuple[Array, bool]:
    sound = pc.fill_null(pc.match_substring_regex(text, _ISO_FORM), False)
    text = pc.if_else(sound, text, None)
    zoned = pc.match_substring_regex(text, r"[T ]\d{2}:\d{2}.*(Z|[+-]\d{2}:?\d{2})$")
    aware = bool(pc.any(zoned).as_py())
    if aware:
        text = pc.if_else(zoned, text, None)  # a file whose dates have zones here and none there: the latter are bad
    text = pc.replace_substring_regex(text, r"(\.\d{6})\d+", r"\1")
    try:
        stamps = text.cast(pa.timestamp("us", "UTC" if aware else None))
    except pa.ArrowInvalid:  # one is no date, such as February 30
        stamps = pa.chunked_array([pa.array([_one(value, aware) for value in text.to_pylist()], pa.timestamp("us"))])
    return stamps.to_numpy().astype("M8[us]"), aware


def _one(value: str | None, aware: bool) -> datetime | None:
    try:
        moment = None if value is None else datetime.fromisoformat(value)
    except ValueError:
        return None
    return moment if moment is None or not aware else (moment - moment.utcoffset()).replace(tzinfo=None)  # type: ignore[operator]


def _with_offset(text: pa.ChunkedArray, form: str) -> tuple[Array, bool]:
    """Dates with an offset such as +0000, as UTC."""
    parts = pc.extract_regex(text, _OFFSET)
    offset = np.zeros(len(text), "m8[us]")
    for i, part in enumerate(parts.to_pylist()):
        if part:
            size = timedelta(hours=int(part["hours"]), minutes=int(part["minutes"]))
            offset[i] = np.timedelta64(size if part["sign"] == "+" else -size)
    bare = pc.replace_substring_regex(text, r"\s*[+-]\d{2}:?\d{2}", "")
    local = _parsed(bare, re.sub(r"\s*%z", "", form)).to_numpy().astype("M8[us]")
    return local - offset, True
