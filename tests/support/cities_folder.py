"""Several cities cut from the demo's, for batches. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path

from topt_deploy.data.parquet import read_parquet, write_parquet

TABLES = ("regions", "mobility")


def write_cities(folder: Path, demo: Path, sizes: Mapping[str, int], *, bad: str) -> None:
    """Write ``city=NAME/`` below ``folder`` for every city; ``bad`` has a region that lies nowhere.

    Args:
        demo: The folder of the demo's tables.
        sizes: Regions per city.
    """
    regions, mobility = (read_parquet(demo / f"{name}.parquet").drop_columns(["city_id"]) for name in TABLES)
    for name, size in sizes.items():
        place = folder / f"city={name}"
        place.mkdir(parents=True)
        some = regions.slice(0, size)
        if name == bad:
            at = some.column_names.index("lon")
            some = some.set_column(at, "lon", [[999.0, *some["lon"].to_pylist()[1:]]])
        ids = set(some["region_id"].to_pylist())
        inside = [row["origin_id"] in ids and row["dest_id"] in ids for row in mobility.to_pylist()]
        write_parquet(place / "regions.parquet", some)
        write_parquet(place / "mobility.parquet", mobility.filter(inside))
