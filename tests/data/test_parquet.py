"""Our Parquet face against pyarrow.parquet, whose classes it works on: the same tables both ways."""

import datetime
import decimal
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from topt_deploy.data.parquet import ParquetFile, read_parquet, write_parquet
from topt_deploy.errors import BadData, CannotCreate, NoInput

ELEMENT = "element"  # as Parquet's specification names it; Arrow's own default comes back under this name


def list_of(kind):
    return pa.list_(pa.field(ELEMENT, kind))


COLUMNS = {
    "text": pa.array(["a", None, "ü", "", "a" * 300]),
    "large_text": pa.array(["a", None, "b", "", "c"], pa.large_string()),
    "dictionary": pa.array(["x", "y", None, "x", "x"]).dictionary_encode(),
    "int8": pa.array([1, None, -3, 4, 5], pa.int8()),
    "int64": pa.array([2**62, None, -3, 4, 5]),
    "float32": pa.array([1.5, None, float("nan"), float("inf"), -0.0], pa.float32()),
    "float64": pa.array([1.5, None, float("nan"), float("-inf"), 5e-324]),
    "bool": pa.array([True, None, False, True, True]),
    "binary": pa.array([b"\0\xff", None, b"", b"x", b"y"]),
    "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-2.00"), None, None], pa.decimal128(10, 2)),
    "date": pa.array([datetime.date(2026, 1, 1), None, datetime.date(1, 1, 1), None, None]),
    "timestamp": pa.array([1, None, 2, 3, 4], pa.timestamp("us", tz="UTC")),
    "fixed_list": pa.array(
        [[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], pa.list_(pa.field(ELEMENT, pa.float32()), 2)
    ),
    "list": pa.array([[1.0], None, [], [None, 2.0], [3.0] * 50], list_of(pa.float64())),
    "list_of_lists": pa.array([[["a"], []], None, [], [None], [["b", None]]], list_of(list_of(pa.string()))),
    "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": None}, {"a": 2, "b": "y"}, {"a": 3, "b": "z"}]),
    "null": pa.nulls(5),
}


def everything():
    fields = [
        pa.field(name, array.type, metadata={"encoder": f"of {name}"} if name == "fixed_list" else None)
        for name, array in COLUMNS.items()
    ]
    return pa.table(
        list(COLUMNS.values()), schema=pa.schema(fields, metadata={"geo": '{"version": "1.1.0"}', "ü": "é"})
    )


def same(a, b):
    """Equal in values, types, and metadata of the table and of its fields."""
    assert a.schema.equals(b.schema, check_metadata=True)
    for name in a.column_names:
        left, right = a.column(name), b.column(name)
        if pa.types.is_floating(left.type):  # NaN is not itself
            kind = {pa.float32(): np.int32, pa.float64(): np.int64}[left.type]
            assert left.is_null().equals(right.is_null())
            left, right = (column.fill_null(0).to_numpy().view(kind) for column in (left, right))
            assert (left == right).all(), name
        else:
            assert left.to_pylist() == right.to_pylist(), name


@pytest.mark.parametrize("name", COLUMNS)
def test_each_type_comes_back_to_both(name, tmp_path):
    table = everything().select([name])
    write_parquet(tmp_path / "t.parquet", table)
    same(read_parquet(tmp_path / "t.parquet"), table)
    same(pq.read_table(tmp_path / "t.parquet"), table)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 2},
        {"compression": "zstd", "version": "1.0"},
        {"use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "none", "write_statistics": False},
        {"use_dictionary": True, "row_group_size": 1},
        {"store_schema": False},
        {"write_page_checksum": True},
        {
            "compression": {"text": "gzip", "int64": "brotli"},
            "use_byte_stream_split": ["float32"],
            "use_dictionary": ["text"],
        },
    ],
    ids=repr,
)
def test_reads_what_pyarrow_writes_as_pyarrow_does(options, tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(everything(), path, **options)
    same(read_parquet(path), pq.read_table(path))
    same(ParquetFile(path.read_bytes()).read(), pq.read_table(path))
    file = ParquetFile(path)
    assert file.rows == 5
    assert file.names == list(COLUMNS)
    assert file.schema.equals(pq.read_schema(path), check_metadata=True)
    assert file.metadata == (pq.read_metadata(path).metadata or {})


@pytest.mark.parametrize("columns", [["text"], ["list", "text"], ["struct"], ["list_of_lists"], ["text", "absent"]])
def test_reads_the_columns_that_are_asked_for(columns, tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(everything(), path, row_group_size=2)
    found = read_parquet(path, columns)
    assert set(found.column_names) == set(columns) - {"absent"}
    same(found, pq.read_table(path).select(found.column_names))
    assert ParquetFile(path).read(["text"]).schema.metadata == everything().schema.metadata


def test_a_column_whose_name_holds_a_dot_is_no_struct(tmp_path):
    table = pa.table({"a.b": [1], "a": [{"b": 2}], "ab": [3]})
    write_parquet(tmp_path / "t.parquet", table)
    same(read_parquet(tmp_path / "t.parquet"), table)
    assert read_parquet(tmp_path / "t.parquet", ["ab"]).to_pydict() == {"ab": [3]}


@pytest.mark.parametrize("rows", [0, 1, 70_000])
def test_any_number_of_rows(rows, tmp_path):
    table = pa.table({"id": [f"{i:06d}" for i in range(rows)], "x": np.arange(rows, dtype=float)})
    table = pa.concat_tables([table.slice(0, rows // 3), table.slice(rows // 3)]).cast(
        pa.schema([("id", pa.string()), ("x", pa.float64())])
    )
    write_parquet(tmp_path / "t.parquet", table)
    same(pq.read_table(tmp_path / "t.parquet"), table)
    same(read_parquet(tmp_path / "t.parquet"), table)


def test_no_columns_at_all(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(everything(), path)
    assert ParquetFile(path).read([]).column_names == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.none() | st.text(max_size=5), max_size=20),
    lists=st.lists(st.none() | st.lists(st.none() | st.integers(-(2**31), 2**31), max_size=4), max_size=20),
    metadata=st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=3),
)
def test_any_texts_lists_and_metadata(texts, lists, metadata, tmp_path):
    n = min(len(texts), len(lists))
    columns = [pa.array(texts[:n], pa.string()), pa.array(lists[:n], list_of(pa.int64()))]
    table = pa.table(columns, names=["texts", "lists"]).replace_schema_metadata(metadata or None)
    write_parquet(tmp_path / "t.parquet", table)
    same(read_parquet(tmp_path / "t.parquet"), table)
    same(pq.read_table(tmp_path / "t.parquet"), table)


def test_the_same_table_gives_the_same_bytes(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write_parquet(tmp_path / name, everything())
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_text_alone_is_dictionary_encoded(tmp_path):
    write_parquet(tmp_path / "t.parquet", everything().select(["text", "float64", "fixed_list"]))
    group = pq.read_metadata(tmp_path / "t.parquet").row_group(0)
    encodings = {group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)}
    dictionaries = {path for path, used in encodings.items() if "RLE_DICTIONARY" in used}
    assert dictionaries == {"text"}


def test_logical_types_are_parquets_own(tmp_path):
    write_parquet(tmp_path / "t.parquet", everything().select(["text", "binary"]))
    found = {name: json.loads(text) for name, text in ParquetFile(tmp_path / "t.parquet").logical_types().items()}
    assert found == {"text": {"Type": "String"}, "binary": {"Type": "None"}}


def test_a_missing_or_damaged_file_is_the_users_error(tmp_path):
    with pytest.raises(NoInput):
        ParquetFile(tmp_path / "t.parquet")
    with pytest.raises(BadData, match="is a folder"):
        ParquetFile(tmp_path)
    (tmp_path / "t.parquet").write_text("no")
    with pytest.raises(BadData, match="not a whole Parquet file"):
        ParquetFile(tmp_path / "t.parquet")
    with pytest.raises(BadData, match=r"golden/x\.parquet"):
        ParquetFile(b"no", "golden/x.parquet")


def test_a_page_that_does_not_unpack_is_the_users_error(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"x": list(range(1000))}), path, use_dictionary=False, compression="gzip")
    data = bytearray(path.read_bytes())
    data[100:400] = b"\xff" * 300
    path.write_bytes(data)
    file = ParquetFile(path)
    with pytest.raises(BadData, match="not a whole Parquet file"):
        file.read()


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(CannotCreate):
        write_parquet(tmp_path / "nowhere" / "t.parquet", everything())
    (tmp_path / "t.parquet").write_bytes(b"older")
    with pytest.raises(pa.ArrowException):
        write_parquet(tmp_path / "t.parquet", pa.table({"x": pa.array([1], pa.month_day_nano_interval())}))
    assert (tmp_path / "t.parquet").read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_importing_it_spares_the_clouds():
    code = "import sys, topt_deploy.data.parquet, topt_deploy.data.city; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "pyarrow._parquet" in loaded
    dear = {"pyarrow.parquet", "pyarrow.fs", "pyarrow._fs", "pyarrow._s3fs", "pyarrow.compute", "pyarrow.dataset"}
    assert not loaded & (dear | {"torch", "onnxruntime"})
    assert "pandas" not in loaded or pandas_comes_with_arrow()


def pandas_comes_with_arrow():
    """pyarrow itself imports pandas where it is installed; topt-run prevents that (its main does, not our import)."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, pyarrow; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return "pandas" in done.stdout.split()


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 4096), list_of(pa.float64()), pa.large_list(pa.int16())])
def test_vectors_that_are_read_in_pieces_are_those_of_the_file(kind, tmp_path):
    """In the file's order, between other columns, over row groups and with nulls among them."""
    numbers = np.random.default_rng(0)
    vectors = [None if row % 9 == 4 else numbers.integers(0, 99, 4096).tolist() for row in range(100)]
    table = pa.table({
        "first": [str(row) for row in range(100)], "vector": pa.array(vectors, kind), "last": range(100),
        "short": pa.array([[row, None] for row in range(100)], pa.list_(pa.int64())),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=70)
    found = ParquetFile(tmp_path / "t.parquet").read()
    assert found.column("vector").num_chunks > 2
    assert found.equals(pq.read_table(tmp_path / "t.parquet"), check_metadata=True)
    assert ParquetFile(tmp_path / "t.parquet").read(["vector", "last"]).column_names == ["vector", "last"]
    assert ParquetFile(tmp_path / "t.parquet").read(["vector"]).num_rows == 100
