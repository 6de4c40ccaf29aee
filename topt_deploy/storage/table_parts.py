"""Tables that are folders: what Spark, Dask and DuckDB write in parts, which are joined in the order of their names.

A folder whose name ends in ``.parquet`` stands for a file of that name: every Parquet file in it is a part. Any other
folder is a table if files ``part-….parquet`` lie in it, as in a Hive partition ``city=A``. Names that begin with a dot
or an underscore, such as ``_SUCCESS``, are passed over.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from topt_deploy.errors import BadData, NoInput

from .os_errors import reading

SUFFIX = ".parquet"
REGIONS = ("regions.parquet", "regions")
"""Names of a city's regions table in its folder; the second is that of a folder of parts alone."""
CITY_KEYS = ("city", "city_id")
"""Keys of a Hive partition's folder, ``city=A``, that give the city its name."""
PART_LIMIT = 10_000


def is_part(name: str) -> bool:
    """Tell if a file's name is that of a part of a table, in whatever folder it lies."""
    return name.startswith("part-") and name.endswith(SUFFIX)


def stands_for_file(folder: str) -> bool:
    """Tell if a folder of this name takes the place of a file, so that its neighbours are the table's."""
    return folder.endswith(SUFFIX) or folder in REGIONS


def is_city_partition(folder: str) -> bool:
    """Tell if a folder of this name is a Hive partition that names a city."""
    return folder.partition("=")[0] in CITY_KEYS and "=" in folder


def part_names(folder: str, files: Iterable[str], folders: Iterable[str]) -> list[str]:
    """The names of a table's parts, in order.

    Args:
        folder: The table's folder, for its name and for messages.
        files, folders: Names of what is in it.

    Raises:
        NoInput: If there is none.
        BadData: If there are too many, or the table is divided further by folders.
    """
    hidden = (".", "_")
    whole = folder.rstrip("/").endswith(SUFFIX)
    names = sorted(n for n in files if is_part(n) or (whole and n.endswith(SUFFIX) and not n.startswith(hidden)))
    inner = sorted(n for n in folders if not n.startswith(hidden) and (whole or "=" in n))
    if inner:
        raise BadData(
            "a table in parts has no folders inside, whose names would be columns", file=folder, found=inner[0],
            expected="files part-….parquet alone", fix="write it without partitions, or one folder city=NAME per city",
        )  # fmt: skip
    if not names:
        raise NoInput("a folder without a part of a table", file=folder, expected="files part-….parquet in it")
    if len(names) > PART_LIMIT:
        raise BadData("too many parts", file=folder, expected=f"at most {PART_LIMIT:,}", found=f"{len(names):,}")
    return names


def table_files(table: Path) -> list[Path]:
    """The files of a table: itself, or its parts.

    Raises:
        NoInput, BadData: As :func:`part_names`.
    """
    if not os.path.isdir(table):  # unlike pathlib's, no error for a name that is too long
        return [table]
    with reading(table), os.scandir(table) as entries:
        kinds = {entry.name: entry.is_dir() for entry in entries}
    names = part_names(
        str(table), [n for n, folder in kinds.items() if not folder], [n for n, folder in kinds.items() if folder]
    )
    return [table / name for name in names]


def is_table_folder(folder: Path) -> bool:
    """Tell if an existing folder is one table, and not a place where cities lie."""
    with reading(folder), os.scandir(folder) as entries:
        kinds = {entry.name: entry.is_dir() for entry in entries}
    if any(inner and is_city_partition(name) for name, inner in kinds.items()):
        return False
    whole = folder.name.endswith(SUFFIX) and any(name.endswith(SUFFIX) or "=" in name for name in kinds)
    return whole or any(is_part(name) for name, inner in kinds.items() if not inner)


def find_table(place: Path) -> Path | None:
    """The regions table that a path means: a file, a folder of parts, or the table in a city's folder.

    One part of several means the whole table, as a city is never predicted in part.

    Returns:
        Its path; None for a folder without one, which may hold many cities.
    """
    if not os.path.isdir(place):
        several = is_part(place.name) and os.path.isfile(place) and len(table_files(place.parent)) > 1
        return place.parent if several else place
    for inner in (place / name for name in REGIONS):
        if is_table_folder(inner) if os.path.isdir(inner) else os.path.exists(inner) and inner.suffix:
            return inner
    return place if is_table_folder(place) else None


def home_of(table: Path) -> Path:
    """The folder that a table's flows, images and predictions lie in: its own, where it is a city's folder of parts."""
    return table if os.path.isdir(table) and not stands_for_file(table.name) else table.parent
