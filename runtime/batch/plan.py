"""The cities of a batch: files, folders, globs and URIs in, one job per city out."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from topt_deploy.bundle.manifest import SUFFIX
from topt_deploy.data.city import hive_city
from topt_deploy.errors import NoInput, UsageError
from topt_deploy.storage.os_errors import reading
from topt_deploy.storage.table_parts import is_city_partition, is_part, stands_for_file, table_files

from ..addresses import is_uri, joined, parted, shown
from ..inputs import MOBILITY, PREDICTIONS, REGIONS
from ..predict_city import CityJob
from .object_stores import listing, sizes

OURS = ("predictions", "prompts", "mobility")
"""The names, up to the first dot, of tables that are not regions tables."""
# Here a table is a path or URI. That of a table in parts ends in "/". So does its name where it stands for a file; the
# name is empty where the folder is the city's own, so that flows lie in it.


def plan(inputs: Sequence[str], out: str, *, mobility: bool) -> list[CityJob]:
    """The jobs of a batch, the largest first: what takes longest must not be left for the end.

    Args:
        inputs: Regions tables; folders of any depth, Hive partitions ``city=…`` among them; globs; or URIs of either.
        out: The folder, or URI, that every city gets a folder ``city=…`` below.
        mobility: True if flows are read: ``NAME.mobility.parquet`` beside ``NAME.parquet``, or ``mobility.parquet``.

    Raises:
        NoInput: If an input is not there, or a folder holds no regions table.
        UsageError: If two cities have one name.
    """
    jobs: dict[str, CityJob] = {}
    for given in inputs:
        place, settings = parted(given)
        for regions, siblings in _tables(place, settings):
            name = _city(regions)
            if name in jobs and jobs[name].regions == regions + settings:
                continue
            if name in jobs:
                raise UsageError(
                    f"two inputs are the city {name!r}", file=shown(regions), found=shown(jobs[name].regions),
                    fix="rename a file or its folder; folders city=NAME say it best",
                )  # fmt: skip
            folder, table = _split(regions)
            size, flows = siblings[table], None
            if mobility:
                flows = next((f for file in _flows(table) for f in (f"{file}/", file) if f in siblings), None)
                size += 0 if flows is None else siblings[flows]
            jobs[name] = CityJob(
                name=name,
                regions=regions + settings,
                mobility=None if flows is None else folder + flows + settings,
                out=joined(out, f"city={_escaped(name)}/{PREDICTIONS}"),
                size=size,
            )
    return sorted(jobs.values(), key=lambda job: (-job.size, job.name))


def _tables(given: str, settings: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Regions tables, each with the sizes of tables in its folder, its flows' among them."""
    found: dict[str, int] = {}
    if is_uri(given):
        found = listing(given + settings)
    else:
        for place in sorted(glob.glob(given, recursive=True)) if not os.path.exists(given) else [given]:
            found |= _walk(place)
    folders: dict[str, dict[str, int]] = {}
    for file, size in found.items():
        folder, table = _split(_whole(file))
        tables = folders.setdefault(folder, {})
        tables[table] = tables.get(table, 0) + size
    count, city = 0, None
    for folder, files in sorted(folders.items()):
        if (city is not None and folder.startswith(city)) or SUFFIX + "/" in folder:
            continue  # what is below a city's own folder, its runs, or in a bundle, is no city
        own = [name for name in (REGIONS, f"{REGIONS}/", "regions/") if name in files]
        own = own[:1] or [""] * ("" in files and folder.rstrip("/").rpartition("/")[2] not in OURS)
        city = folder if own else city
        loose = [file for file in sorted(files) if _is_table(file) or folder + file == given]
        for table in own or loose:
            count += 1
            listed = is_uri(given) and given not in found
            yield folder + table, files if listed else files | _beside(folder + table, settings)
    if not count:
        raise NoInput(
            "no regions table found", file=shown(given), expected=f"{REGIONS} or other Parquet files, in it or below",
            fix="name files or folders that exist",
        )  # fmt: skip


def _whole(file: str) -> str:
    """The table that a file is, or is a part of."""
    steps = file.split("/")
    for depth, step in enumerate(steps[:-1], 1):
        if step.endswith(".parquet") and not any(map(is_city_partition, steps[depth:-1])):
            return "/".join(steps[:depth]) + "/"
    return ("/".join(steps[:-1]) or ".") + "/" if is_part(steps[-1]) else file


def _split(table: str) -> tuple[str, str]:
    """A table's folder, and its name there."""
    if table.endswith("/") and not stands_for_file(table[:-1].rpartition("/")[2]):
        return table, ""
    head, mark, name = table.removesuffix("/").rpartition("/")
    return head + mark, name + "/" * table.endswith("/")


def _walk(place: str) -> dict[str, int]:
    """Parquet files and their sizes, at or below a place. Hidden folders and links to others are not followed."""
    if os.path.isfile(place):
        whole = is_part(os.path.basename(place))  # of a table that is not predicted in part
        return _sizes(map(str, table_files(Path(place).parent))) if whole else _sizes([place])
    found: list[str] = []
    for folder, folders, files in os.walk(place, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        found += [os.path.join(folder, file) for file in files if _is_parquet(file)]
    return _sizes(found)


def _refuse(error: OSError) -> None:
    """Of a folder that cannot be listed: its cities must not be left out in silence."""
    with reading(Path(error.filename)):
        raise error


def _sizes(files: Iterable[str]) -> dict[str, int]:
    """Of what is no file, a link to nowhere, too: that is refused where it is read, and the other cities go on."""
    return {file: os.path.getsize(file) if os.path.isfile(file) else 0 for file in files}


def _beside(table: str, settings: str) -> dict[str, int]:
    """Sizes of the flows that may lie beside a table, and its own; a folder of thousands is not listed for each."""
    folder, name = _split(table)
    places = [folder + file for file in [name, *_flows(name)] if file]
    found = sizes(places, settings) if is_uri(table) else _sizes(p for p in places if p == table or os.path.lexists(p))
    return {_split(place)[1]: size for place, size in found.items()}


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith((".", "_"))


def _is_table(name: str) -> bool:
    name = name.removesuffix("/")
    return _is_parquet(name) and name.partition(".")[0] not in OURS and not name.endswith(f".{MOBILITY}")


def _city(table: str) -> str:
    """The name of a Hive partition, else of the file, else of the folder that its regions.parquet is in."""
    place = unquote(table) if is_uri(table) else os.path.abspath(table) + "/" * table.endswith("/")
    folder, name = _split(place)
    path = Path(folder, name or "part")
    own = name in ("", REGIONS, f"{REGIONS}/", "regions/")
    return hive_city(path) or (path.parent.name if own else path.stem)


def _escaped(name: str) -> str:
    """The name in a folder's, as Hive and Spark escape it: what a path or a partition's reader takes for its own."""
    return re.sub(r"[\x00-\x1f\x7f\"#%'*/:=?\\{\[\]^]", lambda found: f"%{ord(found[0]):02X}", name)


def _flows(table: str) -> list[str]:
    """Names that the flows of a table of this name may have."""
    stem = table.removesuffix("/").removesuffix(".parquet")
    return [f"{stem}.{MOBILITY}", MOBILITY] if stem else [MOBILITY]
