"""The places of a run's regions and the flows between them, if the city's folder still holds the same files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.city import City, Schema
from topt_deploy.data.columns import GEOMETRY
from topt_deploy.data.flows import Flows
from topt_deploy.data.geometry import geo_library, read_shapes
from topt_deploy.drawing.outlines import Outlines, east_north_m, point_outlines, polygon_outlines, project_m
from topt_deploy.errors import BadData, NoInput
from topt_deploy.run_folder import Run
from topt_deploy.storage.hashed_file import Held

from ..cities import read_placed
from ..datasets.city_files import MOBILITY, REGIONS
from .plain_words import sentence_case

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A run's regions on the ground.

    Attributes:
        outlines: The shapes that maps are drawn with.
        outlines_note: Where the outlines come from, in a sentence.
        flows: Flows between the regions; None where the run reads none, or its table is gone.
        no_flows: Why there are none, in words; empty where there are.
    """

    outlines: Outlines
    outlines_note: str
    flows: Flows | None
    no_flows: str


def read_place(run: Run, position: Array) -> Place:
    """Read the tables that the run was trained on, where they still stand unchanged.

    Args:
        run: A finished run.
        position: float64 (N, 3), metres: the run's own record of where its regions are.
    """
    regions, mobility = run.city_dir / REGIONS, run.city_dir / MOBILITY
    no_flows = "this model reads no flows"
    if run.mobility_sha256 is not None:
        no_flows = _lost(mobility, run.mobility_sha256)
    no_city = _lost(regions, run.regions_sha256)
    if no_city:
        outlines, note = _from_position(position, no_city)
        return Place(outlines=outlines, outlines_note=note, flows=None, no_flows=no_flows or no_city)
    schema = Schema(views={}, mobility=not no_flows)
    city = read_placed(regions, mobility if schema.mobility else None, schema, say=lambda text: None)
    outlines, note = _from_table(city)
    return Place(outlines=outlines, outlines_note=note, flows=city.flows, no_flows=no_flows)


def _lost(file: Path, recorded: str) -> str:
    """Why a file is not the run's own any more, in words; empty where it still is."""
    try:
        return "" if Held(file).sha256 == recorded else f"the city's {file.name} has changed since the run"
    except NoInput:
        return f"the city's {file.name} is not where the run found it"


def _from_table(city: City) -> tuple[Outlines, str]:
    """Polygons, or else points in longitude and latitude and a sentence that says why."""
    try:
        polygons = _polygons(city)
    except BadData as error:
        points = point_outlines(project_m(city.lonlat, centre=city.lonlat[0]))
        return points, f"Regions are drawn as points: {error.message}."
    return polygon_outlines(polygons), "Outlines are those of the city's table, simplified for the screen."


def _from_position(position: Array, reason: str) -> tuple[Outlines, str]:
    """Points from the run's own record, and a sentence that says why."""
    points, north_up = east_north_m(position)
    turned = "" if north_up else ", and the map may be turned: so few positions do not tell where north is"
    return point_outlines(points), sentence_case(f"{reason}, so regions are drawn as points{turned}.")


def _polygons(city: City) -> Array:
    """The regions' polygons (N,), sorted by id.

    Raises:
        BadData: If the table has none, or they cannot be used.
    """
    if city.geometry is None:
        raise BadData("the city's table has no geometry")
    column, described = city.geometry
    table = pa.table({GEOMETRY: column}).replace_schema_metadata({b"geo": described} if described else None)
    in_input_order = city.region_id[np.argsort(city.input_row)]
    found = read_shapes(table, REGIONS, in_input_order)[city.input_row]
    shapely = geo_library("shapely")
    polygons = [shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON]
    if not np.isin(shapely.get_type_id(found), polygons).all():
        raise BadData("the city's geometry is not made of polygons")
    return found
