"""``--on-bad-row``: what becomes of single rows that are not what the contract says, in a city predicted as a whole.

A region that is left out changes what every other one is predicted from: its neighbours lose it, and its flows.
So the default is to fail. ``quarantine`` leaves bad rows out; ``mask`` keeps the region where it is, with the others'
median for the value that is bad, and gives it no prediction of its own. Both write what they set aside to a file.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.city import City, Schema, add_prompts, read_city
from topt_deploy.data.columns import Given, choose_rows
from topt_deploy.data.parquet_parts import open_table
from topt_deploy.errors import BadData, BadRows

Array = np.ndarray[Any, Any]


FAIL, MASK, QUARANTINE = POLICIES = ("fail", "mask", "quarantine")


@dataclass(frozen=True, kw_only=True, eq=False)
class SetAside:
    """Rows of one table that were set aside for one reason.

    Attributes:
        rows: int64, counted from 0 in the table as it was given.
        code, reason: Why, as one word and as a sentence.
    """

    rows: Array
    code: str
    reason: str


@dataclass(eq=False)
class BadRowFilter:
    """The tables of a city, from which bad rows are taken until the rest is sound.

    Args:
        regions, mobility: The tables, or their files.
        policy: One of :data:`POLICIES`.
        city_id: The city's name, where neither the table nor its folder says.
    """

    regions: Given
    mobility: Given | None
    policy: str
    city_id: str | None = None
    aside: dict[str, list[SetAside]] = field(default_factory=lambda: {BadRows.REGIONS: [], BadRows.MOBILITY: []})

    def __post_init__(self) -> None:
        self._given = {BadRows.REGIONS: self.regions, BadRows.MOBILITY: self.mobility}
        self._left: dict[str, Array] = {}
        self._stood_in: dict[str, Array] = {}  # which rows of a column hold a stand-in by now

    def read(self, schema: Schema, *, id_col: str) -> City:
        """:func:`topt_deploy.data.city.read_city` of what is sound.

        Raises:
            BadData: If what is wrong is not a matter of single rows, or the policy cannot deal with it.
        """
        while True:
            try:
                return read_city(self.regions, self.mobility, schema, id_col=id_col, city_id=self.city_id)
            except BadRows as error:
                self.take(error)

    def read_prompts(self, city: City, schema: Schema, *, id_col: str) -> City:
        """:func:`topt_deploy.data.city.add_prompts` of what is sound; the whole city again where a row is not.

        Raises:
            BadData: As :meth:`read`.
        """
        try:
            return add_prompts(city, self.regions, schema)
        except BadRows as error:
            self.take(error)
        return self.read(schema, id_col=id_col)

    def take(self, error: BadRows) -> None:
        """Set the rows of an error aside, or raise it where the policy does not allow that."""
        bad = error.rows
        if self.policy == FAIL or bad.all():
            raise error
        table = in_memory(getattr(self, error.table))
        left = self._left.get(error.table, np.arange(len(table)))
        if self.policy == MASK and error.table == BadRows.REGIONS:
            if not error.fill:
                raise BadData(
                    f"{error.message}: there is no neutral value to replace it", file=error.file, column=error.column,
                    ids=error.ids, fix="--on-bad-row quarantine leaves these regions out",
                ) from error  # fmt: skip
            known = {column: self._stood_in.get(column, np.zeros(len(bad), bool)) for column in error.fill}
            self._stood_in |= {column: rows | bad for column, rows in known.items()}
            bad = bad & ~np.logical_and.reduce(list(known.values()))  # not what an earlier stand-in made of a row
            if not bad.any() or np.logical_or.reduce(list(self._stood_in.values())).all():
                raise error
            for column in error.fill:
                if (filled := _filled(table, column, self._stood_in[column])) is None:
                    raise error
                table = filled
        else:  # a flow is never masked: without its number it is no flow
            table = choose_rows(table, ~bad, error.file)
            self._left[error.table] = left[~bad]
        place = f"column {error.column!r}: " if error.column else ""
        self.aside[error.table].append(SetAside(rows=left[bad], code=error.code, reason=place + error.message))
        setattr(self, error.table, table)

    @property
    def masked(self) -> dict[int, str]:
        """Why a region got no prediction of its own, by its row in the regions table."""
        if self.policy != MASK:
            return {}
        reasons: dict[int, list[str]] = {}
        for aside in self.aside[BadRows.REGIONS]:
            for row in aside.rows.tolist():
                reasons.setdefault(row, []).append(aside.reason)
        return {row: "; ".join(several) for row, several in reasons.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """The number of rows of each table that were set aside, by reason code; tables without any are left out."""
        counted = {
            name: dict(sorted(sum((Counter({a.code: len(a.rows)}) for a in several), Counter()).items()))
            for name, several in self.aside.items()
        }
        return {name: codes for name, codes in counted.items() if codes}

    def tables(self) -> dict[str, pa.Table]:
        """The rows that were set aside, unchanged, with ``row``, ``reason_code`` and ``reason``; by table."""
        found = {}
        for name, several in self.aside.items():
            if not several:
                continue
            given = self._given[name]
            assert given is not None
            rows = np.concatenate([aside.rows for aside in several])
            table = choose_rows(in_memory(given), rows, f"{name} table")
            told: dict[str, Sequence[Any]] = {
                "row": rows.tolist(),
                "reason_code": [aside.code for aside in several for _ in aside.rows],
                "reason": [aside.reason for aside in several for _ in aside.rows],
            }
            for column, values in told.items():
                if column in table.column_names:
                    table = table.drop_columns([column])
                table = table.append_column(column, pa.array(values))
            found[name] = table
        return found


def in_memory(given: Given) -> pa.Table:
    """The table, read where it is a file; a native geometry keeps its description."""
    if isinstance(given, pa.Table):
        return given
    from topt_deploy.data.geometry import with_geo_key

    file = open_table(given)
    return with_geo_key(file.read(), file)


def _filled(table: pa.Table, column: str, bad: Array) -> pa.Table | None:
    """The table with the median of the good rows in the bad ones; of each entry, where the column holds lists.

    None where there is no median. Rows that will be found bad later are left out where that shows already.
    """
    place = table.schema.get_field_index(column)
    described: pa.Field = table.schema.field(place)
    kind, listed = pa.float64(), pa.types.is_nested(described.type)
    if listed and not (
        pa.types.is_floating(described.type.value_type) or pa.types.is_integer(described.type.value_type)
    ):
        return None
    values = table.column(place).to_pylist()
    if pa.types.is_decimal(described.type):
        values = [None if value is None else float(value) for value in values]
    good = np.array([v for v, wrong in zip(values, bad, strict=True) if not wrong and v is not None], np.float64)
    good = good[np.isfinite(good).reshape(len(good), -1).all(axis=1)]
    if not len(good):
        return None
    stand_in = np.median(good, axis=0).tolist()
    if listed:
        kind = described.type if pa.types.is_floating(described.type.value_type) else pa.list_(kind, len(stand_in))
    filled = [stand_in if wrong else value for value, wrong in zip(values, bad, strict=True)]
    return table.set_column(place, described.with_type(kind), pa.array(filled, kind))
