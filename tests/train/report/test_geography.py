"""Where regions are drawn and which flows are known: the run's own bytes, or a sentence that says why not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shapely
from builders import replaced, tiny_city_tables, tiny_config

from topt_deploy.data.city import Schema, read_city
from topt_deploy.data.features import local_position_m
from topt_deploy.data.geometry import geo_metadata
from topt_deploy.data.parquet import write_parquet
from topt_deploy.drawing.outlines import point_outlines, project_m
from topt_deploy.run_folder import Run
from topt_deploy.storage.hashed_file import sha256_file
from topt_deploy.train.report.geography import read_place

N = 9


def run_of(folder: Path, regions: pa.Table, *, mobility: bool = True) -> tuple[Run, np.ndarray]:
    """A record of a run on a city in ``folder``, and the positions that a run keeps."""
    write_parquet(folder / "regions.parquet", regions)
    write_parquet(folder / "mobility.parquet", tiny_city_tables(N)[1])
    run = Run(
        path=folder / "run",
        config=tiny_config(mobility=mobility),
        city_dir=folder,
        regions_sha256=sha256_file(folder / "regions.parquet"),
        mobility_sha256=sha256_file(folder / "mobility.parquet") if mobility else None,
        finished=True,
    )
    city = read_city(folder / "regions.parquet", None, Schema(views={}, mobility=False))
    return run, local_position_m(city.lonlat).astype(np.float32).astype(np.float64)


def test_the_citys_own_longitude_and_latitude(tmp_path: Path) -> None:
    regions, _ = tiny_city_tables(N)
    place = read_place(*run_of(tmp_path, regions))
    ids = np.array(regions["region_id"].to_pylist())
    lonlat = np.stack([regions["lon"].to_numpy(), regions["lat"].to_numpy()], axis=1)[np.argsort(ids)]
    assert place.outlines.paths == point_outlines(project_m(lonlat, centre=lonlat[0])).paths
    assert "no geometry" in place.outlines_note
    assert place.flows is not None
    assert place.no_flows == ""


def test_polygons_are_their_own_regions_whatever_the_order_of_rows(tmp_path: Path) -> None:
    """Row r has r + 1 parts, and the regions are drawn sorted by id."""
    regions, _ = tiny_city_tables(N)
    lon, lat = regions["lon"].to_numpy(), regions["lat"].to_numpy()
    shapes = [
        shapely.MultiPolygon([shapely.box(x + 0.01 * k, y, x + 0.01 * k + 0.002, y + 0.002) for k in range(r + 1)])
        for r, (x, y) in enumerate(zip(lon, lat, strict=True))
    ]
    table = replaced(regions, geometry=pa.array(shapely.to_wkb(shapes), pa.binary()))
    table = table.replace_schema_metadata({b"geo": geo_metadata(["MultiPolygon"])})
    place = read_place(*run_of(tmp_path, table))
    assert not place.outlines.points
    order = np.argsort(np.array(regions["region_id"].to_pylist()))
    assert list(order) != sorted(order)
    assert [path.count("M") for path in place.outlines.paths] == [row + 1 for row in order]


def test_in_a_row_the_table_tells_what_positions_alone_do_not(tmp_path: Path) -> None:
    """Nine regions along a parallel lie on one circle: nothing but the table tells on which side of it north is."""
    regions = replaced(tiny_city_tables(N)[0], lat=[41.0] * N)
    run, position = run_of(tmp_path, regions)
    assert "turned" not in read_place(run, position).outlines_note
    gone = read_place(replace(run, city_dir=tmp_path / "gone"), position)
    assert "the map may be turned" in gone.outlines_note
    assert "regions.parquet is not where the run found it" in gone.outlines_note


def test_positions_that_do_tell_where_north_is(tmp_path: Path) -> None:
    run, position = run_of(tmp_path, tiny_city_tables(N)[0])
    known = read_place(run, position).outlines
    write_parquet(tmp_path / "regions.parquet", tiny_city_tables(N, seed=1)[0])
    changed = read_place(run, position)
    assert changed.outlines_note == (
        "The city's regions.parquet has changed since the run, so regions are drawn as points."
    )
    assert changed.outlines.points
    assert changed.outlines.height == pytest.approx(known.height, rel=0.02)
    assert changed.flows is None
    assert "regions.parquet has changed" in changed.no_flows


@pytest.mark.parametrize("change", ["missing", "other"])
def test_without_the_runs_flows_the_outlines_stay(tmp_path: Path, change: str) -> None:
    run, position = run_of(tmp_path, tiny_city_tables(N)[0])
    if change == "missing":
        (tmp_path / "mobility.parquet").unlink()
    else:
        write_parquet(tmp_path / "mobility.parquet", tiny_city_tables(N, seed=2)[1])
    place = read_place(run, position)
    assert place.flows is None
    assert "mobility.parquet" in place.no_flows
    assert ("not where" if change == "missing" else "has changed") in place.no_flows
    assert "no geometry" in place.outlines_note


def test_a_run_that_reads_no_flows(tmp_path: Path) -> None:
    place = read_place(*run_of(tmp_path, tiny_city_tables(N)[0], mobility=False))
    assert (place.flows, place.no_flows) == (None, "this model reads no flows")
