"""Tables of every type that Arrow has: a city is read, or its table refused in words."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
from builders import tiny_city_tables
from fuzzing import SECONDS, contained, scratch
from hypothesis import given, settings
from hypothesis import strategies as st

from topt_deploy.data.city import infer_schema, read_city
from topt_deploy.data.columns import choose_rows
from topt_deploy.errors import BadData
from topt_deploy.prompts.table import read_regions
from topt_deploy.prompts.templates import load_templates
from topt_deploy.runtime.bad_rows import MASK, QUARANTINE, BadRowFilter

N = 8
EXAMPLES = 60 * SECONDS
REGIONS, MOBILITY = tiny_city_tables(N, prompts=["prompt_crime"], prompt_width=4)
SCHEMA = infer_schema(REGIONS, views=["poi", "land_use"], mobility=True, prompts=["prompt_crime"])
FILE = scratch() / "table.parquet"
WORDING = load_templates().wording

FLAT = [
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    *[(kind, st.integers(0, 100)) for kind in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.int64())],
    *[(kind, st.floats(width=16)) for kind in (pa.float16(), pa.float32(), pa.float64())],
    *[(kind, st.text(max_size=4)) for kind in (pa.string(), pa.large_string(), pa.string_view())],
    *[(kind, st.binary(max_size=4)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())],
    (pa.binary(2), st.binary(min_size=2, max_size=2)),
    (pa.decimal128(9, 2), st.integers(-99, 99).map(decimal.Decimal)),
    (pa.decimal256(40, 2), st.integers(-99, 99).map(decimal.Decimal)),
    (pa.date32(), st.dates()),
    (pa.timestamp("us", "UTC"), st.datetimes(datetime.datetime(1980, 1, 1), datetime.datetime(2100, 1, 1))),
    (pa.time64("us"), st.times()),
    (pa.duration("s"), st.integers(0, 9).map(lambda s: datetime.timedelta(seconds=s))),
    (pa.month_day_nano_interval(), st.just((1, 2, 3))),
]


@st.composite
def columns(draw, rows):
    """A column of any type: flat, in lists, structs and maps, as dictionary or run-end encoded, in chunks."""
    kind, values = draw(st.sampled_from(FLAT))
    values = values | st.none() if draw(st.booleans()) else values
    form = draw(st.integers(0, 9))
    if form == 1:
        kind, values = pa.list_(kind), st.lists(values, max_size=3)
    elif form == 2:
        kind, values = pa.large_list(kind), st.lists(values, max_size=3)
    elif form == 3:
        kind, values = pa.list_(kind, 4), st.lists(values, min_size=4, max_size=4)
    elif form == 4:
        kind, values = pa.struct({"x": kind}), st.fixed_dictionaries({"x": values})
    elif form == 5:
        kind, values = pa.map_(pa.string(), kind), st.lists(st.tuples(st.text(max_size=2), values), max_size=2)
    elif form == 6:
        kind, values = pa.list_view(kind), st.lists(values, max_size=3)
    data = draw(st.lists(values, min_size=rows, max_size=rows))
    array = pa.array(data, kind)
    try:
        if form == 7:
            array = array.dictionary_encode()
        elif form == 8:
            array = pa.compute.run_end_encode(array)
    except pa.ArrowException:
        pass
    cut = draw(st.integers(0, rows))
    return pa.chunked_array([array.slice(0, cut), array.slice(cut)]) if form == 9 else array


def table_with(table, name, column):
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def read(regions, mobility):
    """Read a city in every way that there is."""
    contained(lambda _: read_city(regions, mobility, SCHEMA, labels=["crime"]), b"")
    contained(lambda _: read_regions(regions, WORDING), b"")
    for policy in (MASK, QUARANTINE):
        sieve = BadRowFilter(regions, mobility, policy)
        contained(lambda _, sieve=sieve: (sieve.read(SCHEMA, id_col="region_id"), sieve.tables()), b"")


NAMES = [*REGIONS.column_names, "city_id", "geometry", "text", "address", "images", "poi", "land_use"]


@settings(deadline=None, max_examples=EXAMPLES)
@given(st.sampled_from(NAMES), columns(N), st.booleans())
def test_regions(name, column, written):
    regions = table_with(REGIONS, name, column)
    if written:
        try:
            pq.write_table(regions, FILE)
        except (pa.ArrowException, OSError):
            return
        regions = FILE
    read(regions, MOBILITY)


@settings(deadline=None, max_examples=EXAMPLES)
@given(st.sampled_from([*MOBILITY.column_names, "city_id", "target_flow"]), columns(12), st.booleans())
def test_mobility(name, column, written):
    mobility = table_with(MOBILITY.slice(0, 12), name, column)
    if written:
        try:
            pq.write_table(mobility, FILE)
        except (pa.ArrowException, OSError):
            return
        mobility = FILE
    read(REGIONS, mobility)


@settings(deadline=None, max_examples=EXAMPLES)
@given(st.integers(0, 2**32 - 1))
def test_types_that_hold_honest_counts(seed):
    """Whatever holds whole numbers gives the same city."""
    expected = read_city(REGIONS, None, infer_schema(REGIONS, views=["poi"], mobility=False))
    counts = np.array(REGIONS.column("poi_bar").to_pylist())
    kind = [pa.int16(), pa.uint32(), pa.float32(), pa.decimal128(9, 0)][seed % 4]
    values = [decimal.Decimal(int(c)) for c in counts] if pa.types.is_decimal(kind) else counts.tolist()
    table = table_with(REGIONS, "poi_bar", pa.array(values, kind))
    found = read_city(table, None, infer_schema(table, views=["poi"], mobility=False))
    assert np.array_equal(found.views["poi"], expected.views["poi"])


def test_rows_that_cannot_be_chosen_name_their_column():
    """Found by the tests above: pyarrow 26 chooses no rows of lists of string views."""
    views = pa.array([["a", "b", "c"]] * (N - 1) + [[]], pa.list_(pa.string_view()))
    regions = table_with(
        REGIONS.set_column(0, "region_id", pa.array([""] + [f"r{i}" for i in range(1, N)])), "x", views
    )
    with pytest.raises(BadData, match="rows cannot be chosen") as refused:
        choose_rows(regions, np.arange(N) > 0, "regions table")
    assert refused.value.column == "x"
    plain = choose_rows(regions.drop_columns(["x"]), np.array([2, 1]), "regions table")
    assert plain.column("region_id").to_pylist() == ["r2", "r1"]
