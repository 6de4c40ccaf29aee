"""Flows between a city's regions: read, checked, and put into canonical order."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from topt_deploy.errors import BadData

from .columns import (
    CITY_ID,
    FLOW_COLUMNS,
    TARGET_FLOW,
    TableReader,
    canonical,
    check_counts,
    checked_ids,
    city_names,
    floats,
    some,
    texts,
)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Flows:
    """Directed flows between regions, sparse; no pair occurs twice.

    Attributes:
        origin, dest: int64 (E,), positions in the city's ``region_id``, sorted by origin and then destination.
        flow: float64 (E,), trips or persons, what the mobility view is made of.
        target: float64 (E,), what stage 1 learns to reconstruct; ``flow`` unless the table has ``target_flow``.
    """

    origin: Array
    dest: Array
    flow: Array
    target: Array


def read_flows(source: TableReader, sorted_ids: Array, regions_name: str, city_id: str | None) -> Flows:
    """The flows of a city.

    Args:
        source: The mobility table.
        sorted_ids: str (N,), the regions' ids in canonical order.
        regions_name: What errors call the regions table.
        city_id: The city's name, where it is known.

    Raises:
        BadData: If a column is absent, the flows are several cities', or there is none.
        BadRows: If a row names a region that there is not, or its number is no flow.
    """
    columns = _columns(source)
    _choose_city(source, regions_name, city_id)
    ends = {role: _ends(source, columns[role], sorted_ids, regions_name) for role in ("origin_id", "dest_id")}
    pairs = np.stack([ends["origin_id"], ends["dest_id"]], axis=1)
    flow = _flow_values(source, columns["flow"], sorted_ids, pairs)
    target = _flow_values(source, TARGET_FLOW, sorted_ids, pairs) if source.has(TARGET_FLOW) else flow
    key = pairs[:, 0] * len(sorted_ids) + pairs[:, 1]
    if len(key) and (np.diff(key) > 0).all():  # as most tables are
        return Flows(origin=ends["origin_id"], dest=ends["dest_id"], flow=flow, target=target)
    # Sorted by value as well: duplicates are then summed in an order that no shuffling of rows changes.
    order = np.lexsort((target, flow, key))
    keys, start = np.unique(key[order], return_index=True)
    if len(keys) == 0:
        of_city = "" if city_id is None else f" of city {city_id!r}"
        raise BadData("no flow at all", file=source.name, expected=f"at least one row{of_city}", found="0 rows")
    return Flows(
        origin=keys // len(sorted_ids),
        dest=keys % len(sorted_ids),
        flow=np.add.reduceat(flow[order], start),
        target=np.add.reduceat(target[order], start),
    )


def _columns(source: TableReader) -> dict[str, str]:
    """The table's columns of origins, destinations and flows, each by one of its names."""
    columns = {}
    for role, aliases in FLOW_COLUMNS.items():
        present = [alias for alias in aliases if source.has(alias)]
        if len(present) != 1:
            raise BadData(
                f"expected exactly one {role} column",
                file=source.name,
                expected=f"one of {', '.join(aliases)}",
                found=f"columns {some(source.everything)}",
            )
        columns[role] = present[0]
    return columns


def _choose_city(source: TableReader, regions_name: str, city_id: str | None) -> None:
    """Go on with the flows of this city alone."""
    if source.has(CITY_ID):
        cities, places = city_names(source)
        if city_id is None and len(cities) > 1:
            raise BadData(
                "holds flows of several cities, and it is not known which one the regions are of",
                file=source.name,
                column=CITY_ID,
                expected=f"flows of one city, or a {CITY_ID!r} in {regions_name}",
                found=some([str(city) for city in cities]),
                fix=f"add a column {CITY_ID!r} to the regions, use a folder city=NAME, or keep one city's flows",
            )
        mine = np.array([city == city_id for city in cities], bool)[places]
        if city_id is not None and not mine.all():  # a table of this city alone is spared importing pyarrow.compute
            source.choose(mine)


def _ends(source: TableReader, column: str, sorted_ids: Array, regions_name: str) -> Array:
    """One end of every flow, int64 (E,), as its region's position in ``sorted_ids``."""
    values, places = texts(source, column, fix=f"write the ids as they stand in {regions_name}")
    names = checked_ids(source, column, [value or "" for value in values])
    position = np.minimum(np.searchsorted(sorted_ids, names), len(sorted_ids) - 1)
    unknown = sorted_ids[position] != names
    if unknown.any():
        _find_composed(sorted_ids, names, position, unknown)
    if unknown.any():
        source.refuse(
            "names regions that the regions table does not have",
            unknown[places],
            "unknown_region",
            column=column,
            ids=np.unique(names[unknown]),
            expected=f"ids of {regions_name}, such as {str(sorted_ids[0])!r}",
            fix="drop those flows, or add the regions",
        )
    return position[places]


def _find_composed(sorted_ids: Array, names: Array, position: Array, unknown: Array) -> None:
    """Find the regions whose ids are written with other characters for the same letters, as NFD is NFC's."""
    if all(name.isascii() for name in names[unknown].tolist()):
        return
    places: dict[str, int] = {}
    for place, region in enumerate(sorted_ids.tolist()):
        form = canonical(region)
        places[form] = -1 if form in places else place  # of two regions, neither
    for row in np.flatnonzero(unknown).tolist():
        place = places.get(canonical(str(names[row])), -1)
        if place >= 0:
            position[row], unknown[row] = place, False


def _flow_values(source: TableReader, column: str, sorted_ids: Array, pairs: Array) -> Array:
    origins = sorted_ids[pairs[:, 0]]
    values = floats(source, origins, column)
    check_counts(source, origins, column, values)
    return values
