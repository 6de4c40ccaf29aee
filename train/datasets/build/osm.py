"""OpenStreetMap: extracts (PBF and XML) by GDAL's driver, and answers of the Overpass API.

Nodes, ways and relations that the vocabulary has a name for count once each. A multipolygon is its relation, not its
member ways; the corners of a way are no things of their own. An object with several tags, or several values of one, is
what each of them says: a restaurant that is a hotel too counts once as each.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.vocabulary import LAND_USE, OTHER, POI, load_vocabulary
from topt_deploy.errors import BadData
from topt_deploy.storage.os_errors import reading

from .layers import Features, read_features
from .rows import CATEGORY, LAT, LON, Rows, with_points

Array = np.ndarray[Any, Any]

CONFIG = Path(__file__).with_name("osmconf.ini")
LAND_CATEGORY = "class"
HEADER_MOST = 64 << 10
"""Bytes of a block's header, as the format has it."""
KEYS = ("amenity", "shop", "tourism", "leisure", "office", "healthcare", "historic", "highway", "railway", "aeroway",
        "public_transport", "craft", "man_made", "industrial", "landuse")  # fmt: skip
LINE_KEYS = tuple(key for key in KEYS if key not in ("highway", "landuse"))
AREA_KEYS = tuple(key for key in KEYS if key != "highway")
LAND_KEYS = ("landuse", "leisure", "natural", "amenity", "tourism", "aeroway", "waterway")
LAYERS = {"points": KEYS, "lines": LINE_KEYS, "multipolygons": AREA_KEYS}


class OsmRows:
    """The things of an extract that the vocabulary names, with a place each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = ["osm_id", "name", CATEGORY]
        self.placed, self.line, self.done = True, 0, 0.0
        self.malformed: list[tuple[int, str]] = []

    def read(self, columns: Sequence[str]) -> Iterator[Rows]:
        """The columns, with positions; CATEGORY is the list of a thing's tags, ``key=value``."""
        first = 1
        for layer, keys in LAYERS.items():
            for part in _layer(self.path, layer, ["osm_id", "name", *keys]):
                tags = _tags(part.table, keys, POI)
                keep = np.array([bool(tag) for tag in tags], bool)
                table = part.table.filter(pa.array(keep))
                table = table.append_column(CATEGORY, pa.array([t for t in tags if t], pa.list_(pa.string())))
                table = with_points(table.select(list(columns)), part.shapes[keep])
                yield Rows(first=first, table=table)
                first += len(table)


def read_land(path: Path) -> Iterator[Features]:
    """The areas of an extract whose use the vocabulary names; ``class`` is the list of their tags."""
    for part in _layer(path, "multipolygons", ["osm_id", *LAND_KEYS]):
        tags = _tags(part.table, LAND_KEYS, LAND_USE)
        keep = np.array([bool(tag) for tag in tags], bool)
        table = pa.table({LAND_CATEGORY: pa.array([tag for tag in tags if tag], pa.list_(pa.string()))})
        yield Features(first=part.first, table=table, shapes=part.shapes[keep])


def _layer(path: Path, layer: str, columns: Sequence[str]) -> Iterator[Features]:
    if path.suffix.lower() == ".pbf":
        _check_whole(path)
    return read_features(path, columns, layer=layer, CONFIG_FILE=str(CONFIG))


def _check_whole(path: Path) -> None:
    """Refuse a PBF file that was cut off, for GDAL takes its first blocks for all of it.

    A file is a row of blocks: four bytes with the length of a header, the header, and as many bytes as that says.
    """
    with reading(path), path.open("rb") as stream:
        size, at = os.fstat(stream.fileno()).st_size, 0
        while at < size:
            head = stream.read(4)
            length = int.from_bytes(head, "big")
            header = stream.read(length) if len(head) == 4 and length < HEADER_MOST else b""
            data = _datasize(header)
            at += 4 + length + data
            if not header or not data or at > size:
                raise BadData(
                    "not a whole OpenStreetMap extract", file=path, expected="PBF, up to its last block",
                    fix="fetch it again; a download may have been cut off",
                )  # fmt: skip
            stream.seek(at)
    if size == 0:
        raise BadData("the file is empty", file=path, expected="an OpenStreetMap extract")


def _datasize(header: bytes) -> int:
    """The third field of a block's header, a number; the others are texts. 0 where there is none."""
    at = 0
    while at < len(header):
        key, value, shift, at = header[at], 0, 0, at + 1
        while at < len(header):
            value |= (header[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if header[at - 1] < 128:
                break
        if key == 3 << 3:
            return value
        at += value if key & 7 == 2 else 0
    return 0


def _tags(table: pa.Table, keys: Sequence[str], kind: str) -> list[list[str]]:
    """Of every thing, the tags that the vocabulary has a name for, as ``key=value``."""
    vocabulary = load_vocabulary()
    found: list[list[str]] = [[] for _ in range(len(table))]
    for key in keys:
        known: dict[str, list[str]] = {}
        for row, value in enumerate(table.column(key).to_pylist()):
            if value is None:
                continue
            if value not in known:
                several = [f"{key}={one.strip()}" for one in value.split(";") if one.strip()]
                known[value] = [tag for tag in several if vocabulary.categories(kind, "osm", tag) != (OTHER,)]
            found[row] += known[value]
    return found


class OverpassRows:
    """An answer of the Overpass API as JSON: elements with a position or a centre."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = ["id", "name", CATEGORY]
        self.placed, self.line, self.done = True, 0, 0.0
        self.malformed: list[tuple[int, str]] = []

    def read(self, columns: Sequence[str]) -> Iterator[Rows]:
        """The columns, with positions."""
        with reading(self.path):
            try:
                elements = json.loads(self.path.read_text(encoding="utf-8"))["elements"]
                elements = [one for one in elements if isinstance(one.get("tags"), dict)]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise BadData(
                    f"not an answer of the Overpass API ({error!r})", file=self.path, expected='JSON with "elements"'
                ) from error
        keys = pa.table({key: pa.array([_text(one["tags"].get(key)) for one in elements], pa.string()) for key in KEYS})
        tags = _tags(keys, KEYS, POI)
        kept = [(one, tag) for one, tag in zip(elements, tags, strict=True) if tag]
        places = [one if "lon" in one else one.get("center", {}) for one, _ in kept]
        table = pa.table(
            {
                "id": pa.array([f"{one.get('type')}/{one.get('id')}" for one, _ in kept], pa.string()),
                "name": pa.array([_text(one["tags"].get("name")) for one, _ in kept], pa.string()),
                CATEGORY: pa.array([tag for _, tag in kept], pa.list_(pa.string())),
                LON: pa.array([place.get("lon") for place in places], pa.float64()),
                LAT: pa.array([place.get("lat") for place in places], pa.float64()),
            }
        )
        self.done = 1.0
        yield Rows(first=1, table=table.select([*columns, LON, LAT]))


def _text(value: object) -> str | None:
    return None if value is None else str(value)
