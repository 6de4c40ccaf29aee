"""Small tables that stand for more than any machine holds. Each is shown to work on a reader that does not look."""

import os
import resource
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import environment, shell

from topt_deploy.data.parquet import COLUMN_LIMIT, FOOTER_LIMIT_BYTES, ParquetFile, read_parquet
from topt_deploy.errors import BadData
from topt_deploy.hardening.parquet_memory import memory, read_footer

BAD_DATA = 65
MANY = 2**31 - 1
"""The most values that a page can claim."""
LIMIT_BYTES = 2 << 30
I32, I64, TEXT, LIST, STRUCT = 5, 6, 8, 9, 12
INT32, DOUBLE, BYTES = 1, 5, 6
DATA, DICTIONARY = 0, 2
PLAIN, RLE, CODES = 0, 3, 8
UNCOMPRESSED, ZSTD = 0, 6


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def zigzag(value):
    return varint((value << 1) ^ (value >> 63))


def thrift(fields):
    """A struct in Thrift's compact protocol, of (number, type, value); a list is a type of items and the items."""
    out, last = b"", 0
    for number, kind, value in fields:
        out += bytes([(number - last) << 4 | kind])
        last = number
        if kind == LIST:
            inner, items = value
            out += bytes([0xF0 | inner]) + varint(len(items)) + b"".join(item(inner, v) for v in items)
        else:
            out += item(kind, value)
    return out + b"\0"


def item(kind, value):
    if kind == STRUCT:
        return thrift(value)
    return varint(len(value)) + value if kind == TEXT else zigzag(value)


def page(kind, values, encoding, content, unpacked=None):
    """A page with its header."""
    about = [(1, I32, values), (2, I32, encoding)]
    about += [(3, I32, RLE), (4, I32, RLE)] if kind == DATA else []
    size = len(content) if unpacked is None else unpacked
    header = [(1, I32, kind), (2, I32, size), (3, I32, len(content))]
    return thrift([*header, (5 if kind == DATA else 7, STRUCT, about)]) + content


def craft(path, pages, *, kind=DOUBLE, values, groups=1, codec=UNCOMPRESSED, listed=False, rows=None):
    """A Parquet file of one column ``x`` whose footer claims ``values`` of each of ``groups`` chunks of ``pages``."""
    chunk = b"".join(pages)
    body, offset, described = b"PAR1", 4, []
    leaf = [[(3, I32, 0), (4, TEXT, b"x")]]
    schema = [[(4, TEXT, b"schema"), (5, I32, 1)]]
    names = [b"x"]
    if listed:
        schema += [
            [(3, I32, 1), (4, TEXT, b"x"), (5, I32, 1), (6, I32, 3)],
            [(3, I32, 2), (4, TEXT, b"list"), (5, I32, 1)],
        ]
        names, leaf = [b"x", b"list", b"element"], [[(3, I32, 0), (4, TEXT, b"element")]]
    schema += [[(1, I32, kind), *leaf[0]]]
    rows = values if rows is None else rows
    for _ in range(groups):
        first = len(pages[0]) if len(pages) > 1 else 0
        about = [
            (1, I32, kind), (2, LIST, (I32, [PLAIN, RLE, CODES])), (3, LIST, (TEXT, names)), (4, I32, codec),
            (5, I64, values), (6, I64, len(chunk)), (7, I64, len(chunk)), (9, I64, offset + first),
            *([(11, I64, offset)] if first else []),
        ]  # fmt: skip
        columns = [[(2, I64, offset), (3, STRUCT, about)]]
        described.append([(1, LIST, (STRUCT, columns)), (2, I64, len(chunk)), (3, I64, rows)])
        body, offset = body + chunk, offset + len(chunk)
    footer = thrift([(1, I32, 2), (2, LIST, (STRUCT, schema)), (3, I64, rows * groups), (4, LIST, (STRUCT, described))])
    path.write_bytes(body + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def run_of(values):
    """Codes of a dictionary with one entry: no bits, one run."""
    return b"\0" + varint(values << 1)


def one_value_repeated(path):
    """17 billion rows in a kilobyte: 137 GB of one number."""
    pages = [page(DICTIONARY, 1, PLAIN, bytes(8)), page(DATA, MANY, CODES, run_of(MANY))]
    craft(path, pages, values=MANY, groups=8)


def a_footer_that_lies(path):
    """The footer says 77 rows of one number each; the page has two billion numbers, all in the first row's list."""
    begins = varint(1 << 1) + b"\0" + varint((MANY - 1) << 1) + b"\1"
    there = varint(MANY << 1) + b"\1"
    content = b"".join(len(run).to_bytes(4, "little") + run for run in (begins, there)) + run_of(MANY)
    pages = [page(DICTIONARY, 1, PLAIN, bytes(8)), page(DATA, MANY, CODES, content)]
    craft(path, pages, values=77, listed=True, rows=77)


def one_text_repeated(path):
    """A text of a megabyte, written once and named a million times: a terabyte."""
    text = b"x" * (1 << 20)
    pages = [page(DICTIONARY, 1, PLAIN, len(text).to_bytes(4, "little") + text)]
    pages += [page(DATA, 1 << 20, CODES, run_of(1 << 20))]
    craft(path, pages, kind=BYTES, values=1 << 20)


def pages_that_unpack(path):
    """A hundred pages of 64 MB zeros, packed to six kilobytes each: the file's metadata says nothing of it."""
    zeros = pa.compress(bytes(64 << 20), "zstd", asbytes=True)
    craft(path, [page(DATA, 8 << 20, PLAIN, zeros, 64 << 20)] * 100, values=800 << 20, codec=ZSTD)


def texts_that_share_a_beginning(path):
    """Each text says that it begins as the one before does, all of it: 1.6 GB from less than one MB."""
    batch = pa.table({"x": ["x" * (1 << 18)] * 100})
    with pq.ParquetWriter(
        path, batch.schema, compression="zstd", use_dictionary=False, column_encoding={"x": "DELTA_BYTE_ARRAY"}
    ) as writer:
        for _ in range(60):
            writer.write_table(batch)


BOMBS = [
    one_value_repeated,
    a_footer_that_lies,
    one_text_repeated,
    pages_that_unpack,
    texts_that_share_a_beginning,
]


def little_memory():
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))


@pytest.mark.parametrize("bomb", BOMBS)
def test_the_bomb_works_on_a_reader_that_does_not_look(bomb, tmp_path):
    """Else these tests would show nothing. Arrow reads as far as 2 GB of address space go."""
    bomb(tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 2 << 20
    code = (
        "import sys, pyarrow.parquet as pq\n"
        "try:\n    pq.read_table(sys.argv[1], use_threads=False)\n"
        "except MemoryError: print('out of memory')\n"
        "except Exception as error: print(type(error), error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "bomb.parquet"], preexec_fn=little_memory, capture_output=True,
        text=True, env=environment(OPENBLAS_NUM_THREADS="1"),
    )  # fmt: skip
    assert "out of memory" in done.stdout or "bad_alloc" in done.stderr, done
    with pytest.raises(BadData, match="would take a great deal of memory"):
        read_parquet(tmp_path / "bomb.parquet")


@pytest.mark.parametrize("role", ["regions", "mobility"])
@pytest.mark.parametrize("bomb", [one_value_repeated, a_footer_that_lies, one_text_repeated])
def test_the_command_refuses_it_as_any_table(bomb, role, desk, tmp_path):
    """The bomb's column under a name that is read, in little memory: exit 65, and nothing is written."""
    bomb(tmp_path / "bomb.parquet")
    table = {"regions": desk.regions, "mobility": desk.mobility}[role]
    name = {"regions": b"lon", "mobility": b"flow"}[role]
    data = (tmp_path / "bomb.parquet").read_bytes()
    assert data.count(b"\x01x") >= 1
    cut = data.rindex(b"PAR1") - 4
    start = cut - int.from_bytes(data[cut : cut + 4], "little")
    footer = data[start:cut].replace(b"\x01x", bytes([len(name)]) + name)
    table.write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert ParquetFile(table).names == [name.decode()]
    before = desk.state()
    said = shell("topt-run predict regions.parquet", desk.folder, little_memory, OPENBLAS_NUM_THREADS="1")
    assert said.code == BAD_DATA, said
    assert "Traceback" not in said.err
    assert desk.state() == before


def too_many_columns(path):
    """Each column costs Arrow a thousand times its bytes in the footer."""
    pq.write_table(pa.schema([(f"poi_{i}", pa.int8()) for i in range(COLUMN_LIMIT + 1)]).empty_table(), path)


def too_long_a_footer(path):
    """A footer is read and unpacked as a whole, before anything in it is believed or not."""
    table = pa.table({"region_id": ["a"]}).replace_schema_metadata({"x": "x" * (FOOTER_LIMIT_BYTES + 1)})
    pq.write_table(table, path)


def a_footer_longer_than_the_file(path):
    """Its length would have two gigabytes read."""
    path.write_bytes(b"PAR1" + bytes(100) + MANY.to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize(
    ("attack", "part"),
    [
        (too_many_columns, "at most 10,000 columns"),
        (too_long_a_footer, "bytes that describe the columns"),
        (a_footer_longer_than_the_file, "not a whole Parquet file"),
    ],
)
def test_what_describes_the_columns_is_bounded(attack, part, desk, refused):
    attack(desk.regions)
    refused(BAD_DATA, "regions.parquet", part)


def test_lists_of_absurd_width(tmp_path):
    """Arrow takes the width from its own schema in the metadata where it fits the column's: then it is counted."""
    path = tmp_path / "wide.parquet"
    wide = pa.table({"x": pa.array([None] * 64, pa.list_(pa.field("element", pa.float32()), 4096))})
    pq.write_table(wide, path)
    assert read_parquet(path).column("x").null_count == 64
    assert ParquetFile(path).schema.field("x").type.list_size == 4096
    kind = pa.list_(pa.float32(), 2**30)
    file = ParquetFile(path)
    assert memory(file._file, read_footer(file._file), 0, kind, 1 << 62) > 64 * 2**30 * 4


def a_code_beyond_the_dictionary(path):
    """A dictionary of one text, and codes for its 201st: Arrow hands such codes on, and reads whatever lies there."""
    pages = [page(DICTIONARY, 1, PLAIN, (2).to_bytes(4, "little") + b"aa")]
    pages += [page(DATA, 5, CODES, b"\x08" + varint(5 << 1) + b"\xc8")]
    craft(path, pages, kind=BYTES, values=5)


def test_codes_that_lead_beyond_the_dictionary(tmp_path):
    path = tmp_path / "t.parquet"
    a_code_beyond_the_dictionary(path)
    handed_on = pq.read_table(path, read_dictionary=["x"], use_threads=False).column("x").chunk(0)
    assert handed_on.indices.to_pylist() == [200] * 5
    with pytest.raises(BadData, match="out of bounds"):
        ParquetFile(path, coded=["x"]).read()
    with pytest.raises(BadData, match="not a whole Parquet file"):
        ParquetFile(path).read()


def test_any_damage_of_a_header_is_the_files(tmp_path):
    """The walk itself: no other exception and no endless loop, whatever the bytes."""
    path = tmp_path / "t.parquet"
    one_text_repeated(path)
    one_value_repeated(tmp_path / "n.parquet")
    draw = np.random.default_rng(0)
    for source in (path, tmp_path / "n.parquet"):
        data = source.read_bytes()
        heads = [*range(4, 60), *range(max(60, len(data) - 250), len(data) - 8)]
        for _ in range(60):
            damaged = bytearray(data)
            for place in draw.choice(heads, 2):
                damaged[place] = draw.integers(256)
            with suppress(BadData):
                ParquetFile(bytes(damaged)).read()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(BadData, match="a pipe or a device"):
        ParquetFile(tmp_path / "pipe.parquet")


class TestHonestTables:
    """Bounds that refuse no city: what is large in memory is large on disk, or repeats within reason."""

    def check(self, table, path, times):
        """The table's own writer, and the memory that is counted, against the limit of a small file."""
        pq.write_table(table, path, compression="zstd")
        assert read_parquet(path).num_rows == len(table)
        file = ParquetFile(path)
        kinds = [file.schema.field(p[0]).type for p in file._reader.column_paths]
        counted = sum(memory(file._file, read_footer(file._file), i, kind, 1 << 62) for i, kind in enumerate(kinds))
        assert counted < times * path.stat().st_size
        return counted

    def test_prompt_vectors(self, tmp_path):
        """3 × 4096 numbers per region: 100,000 regions have 5 GB, and so has their file. Here 500."""
        rng = np.random.default_rng(0)
        columns = {
            f"prompt_{task}": pa.FixedSizeListArray.from_arrays(
                pa.array(rng.normal(size=500 * 4096).astype(np.float32)), 4096
            )
            for task in "abc"
        }
        self.check(pa.table(columns), tmp_path / "t.parquet", 3)

    def test_a_dense_table_of_flows(self, tmp_path):
        """Every pair of 1,500 regions, sorted, small flows: ids that hardly take a bit."""
        ids = np.array([f"170310{i:05d}" for i in range(1500)])
        flow = np.random.default_rng(0).poisson(3, len(ids) ** 2)
        table = pa.table({"origin_id": np.repeat(ids, 1500), "dest_id": np.tile(ids, 1500), "flow": flow})
        assert self.check(table, tmp_path / "t.parquet", 1000) < 1 << 30

    def test_texts_and_shapes(self, tmp_path):
        rng = np.random.default_rng(0)
        table = pa.table({
            "region_id": [f"{i:06d}" for i in range(5000)],
            "city_id": ["Chicago"] * 5000,
            "text": [f"Region {i} has {i % 7} shops. " * (1 + i % 40) for i in range(5000)],
            "images": [[f"images/{i}_{k}.jpg" for k in range(i % 5)] for i in range(5000)],
            "geometry": [rng.bytes(int(rng.integers(100, 20_000))) for _ in range(5000)],
        })  # fmt: skip
        assert self.check(table, tmp_path / "t.parquet", 100) < 1 << 30
