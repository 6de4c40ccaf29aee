"""Vectors of places as others publish them (PDFM, AlphaEarth, TESSERA): by region id, or by polygon.

A view holds numbers that are not negative, and a vector's numbers may be. Each becomes two columns, what it is above
zero and what it is below: ``v = v_up - v_down``. Nothing is lost, and nothing is fitted to one city.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.geometry import geo_library
from topt_deploy.errors import BadConfig, BadData

from .areas import EqualArea, unwrapped_like
from .find import find
from .layers import GIS_SUFFIXES, is_parquet, layer_columns, polygons, read_features
from .locate import OUTSIDE
from .match import Matcher
from .recipe import Source
from .regions import Regions
from .rows import open_rows
from .tally import Tally
from .values import as_text, numbers

Array = np.ndarray[Any, Any]


def read_embedding(
    source: Source, regions: Regions, tally: Tally, files: Sequence[Path], told: Callable[[Path, float], None]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The vectors of all regions.

    Args:
        source: As the recipe says: ``id`` names a column of region ids; without it the file's polygons are used.
        regions: N regions.
        tally: Where is written down what became of rows.
        files: The files.
        told: Told of a file and the share of it that is done.

    Raises:
        BadData: If a region has no vector.
    """
    total = weight = None
    names: list[str] = []
    for path in files:
        reader = _by_id if source.id is not None else _by_polygon
        found, values, held = reader(source, regions, tally, path)
        if total is None or weight is None:
            names, total, weight = found, values, held
        elif found == names:
            total, weight = total + values, weight + held
        else:
            raise BadData("has other columns than the source's first file", file=path, expected=names, found=found)
        told(path, 1.0)
    assert total is not None
    assert weight is not None
    lacking = weight == 0
    if lacking.any():
        raise BadData(
            "regions without a vector", file=files[0], ids=regions.ids[lacking], expected="one for every region",
            fix="leave these regions out, or take a table that covers them",
        )  # fmt: skip
    mean = total / weight[:, None]
    columns = [f"{name.lower()}_{side}" for name in names for side in ("up", "down")]
    split = np.stack([np.maximum(mean, 0), np.maximum(-mean, 0)], axis=2).reshape(len(mean), -1)
    return {"values": split}, {"categories": columns}


def _chosen(source: Source, columns: Sequence[str], path: Path) -> list[str]:
    pattern = source.columns or "*"
    known = {source.id, "lon", "lat", "longitude", "latitude"}
    chosen = [name for name in columns if fnmatchcase(name, pattern) and name not in known]
    if not chosen:
        raise BadConfig("no column fits", file=path, column="columns", expected=pattern, found=", ".join(columns))
    return chosen


def _by_id(source: Source, regions: Regions, tally: Tally, path: Path) -> tuple[list[str], Array, Array]:
    assert source.id is not None
    file = open_rows(path, source)
    id_col = find(source.id, file.names, path)
    names = [name for name in _chosen(source, file.names, path) if name != id_col]
    matcher = Matcher(regions.ids)
    total, weight = np.zeros((len(regions), len(names))), np.zeros(len(regions))
    for part in file.read([id_col, *names]):
        tally.read += len(part.table)
        lines = np.arange(part.first, part.first + len(part.table)) + file.line
        region = matcher.match(part.table.column(id_col), lines, path, tally)
        held = region != OUTSIDE
        values = _values(part.table, names, source, path)[held]
        np.add.at(total, region[held], values)
        np.add.at(weight, region[held], 1)
        tally.assigned += int(held.sum())
    return names, total, weight


def _by_polygon(source: Source, regions: Regions, tally: Tally, path: Path) -> tuple[list[str], Array, Array]:
    if path.suffix.lower() not in GIS_SUFFIXES and not is_parquet(path):
        raise BadConfig(
            "whose vectors these are is not stated", file=path, column=f"{tally.name}.id",
            expected="a column of region ids, or a file of polygons", fix='name it: id = "…"',
        )  # fmt: skip
    shapely = geo_library("shapely")
    names = _chosen(source, layer_columns(path, source.layer), path)
    project = EqualArea(regions)
    ground = project.of(regions.shapes)
    tree = shapely.STRtree(ground)
    total, weight = np.zeros((len(regions), len(names))), np.zeros(len(regions))
    for part in read_features(path, names, layer=source.layer, crs=source.crs):
        tally.read += len(part.table)
        shapes, _ = polygons(unwrapped_like(regions, part.shapes))
        moved = project.of(shapes)
        area, region = tree.query(moved, predicate="intersects")
        common = shapely.area(shapely.intersection(ground[region], moved[area]))
        values = _values(part.table, names, source, path)
        np.add.at(total, region, common[:, None] * values[area])
        np.add.at(weight, region, common)
        tally.assigned += len(np.unique(area[common > 0]))
    return names, total, weight


def _values(table: pa.Table, names: Sequence[str], source: Source, path: Path) -> Array:
    """float64 (P, W), all finite."""
    columns = []
    for name in names:
        values, bad = numbers(table.column(name), source.decimal)
        wrong = bad | ~np.isfinite(values)
        if wrong.any():
            raise BadData(
                "a vector's numbers are missing, or are none", file=path, column=name, expected="a number in every row",
                found=as_text(table.column(name))[int(np.flatnonzero(wrong)[0])].as_py(),
                fix='name the columns of numbers: columns = "feature*"',
            )  # fmt: skip
        columns.append(values)
    return np.stack(columns, axis=1)
