"""The cities of a batch: files, folders, globs and URIs in, one job per city out."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from topt_deploy.bundle.manifest import SUFFIX
from topt_deploy.data.city import hive_city
from topt_deploy.data.parquet import is_part
from topt_deploy.errors import BadData, NoInput, UsageError
from topt_deploy.storage.os_errors import reading

from ..addresses import is_uri, joined, parted, shown
from ..inputs import MOBILITY, PREDICTIONS, REGIONS
from ..predict_city import CityJob
from .object_stores import listing, sizes

OURS = ("predictions", "prompts", "mobility")
"""The names, up to the first dot, of files that are not regions tables."""


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
            size, flows = siblings[_last(regions)], None
            if mobility:
                flows = next((f for f in (f"{_stem(regions)}.{MOBILITY}", MOBILITY) if f in siblings), None)
                size += siblings.get(flows or "", 0)
            jobs[name] = CityJob(
                name=name,
                regions=regions + settings,
                mobility=None if flows is None else regions.removesuffix(_last(regions)) + flows + settings,
                out=joined(out, f"city={_escaped(name)}/{PREDICTIONS}"),
                size=size,
            )
    return sorted(jobs.values(), key=lambda job: (-job.size, job.name))


def _tables(given: str, settings: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Regions tables, each with the sizes of files in its folder, its flows' among them."""
    found: dict[str, int] = {}
    if is_uri(given):
        found = listing(given + settings)
    else:
        for place in sorted(glob.glob(given, recursive=True)) if not os.path.exists(given) else [given]:
            found |= _walk(place)
    folders: dict[str, dict[str, int]] = {}
    for file, size in found.items():
        folders.setdefault(file.removesuffix(_last(file)), {})[_last(file)] = size
    count, city = 0, None
    for folder, files in sorted(folders.items()):
        if (city is not None and folder.startswith(city)) or SUFFIX + "/" in folder:
            continue  # what is below a city's own folder, its runs, or in a bundle, is no city
        city = folder if REGIONS in files else city
        parts = [file for file in sorted(files) if is_part(file)]
        if len(parts) > 1:
            raise BadData(
                f"a table in {len(parts)} parts, as Spark writes it", file=shown(folder), expected="one file",
                found=parts[0], fix="write one file per city, as with coalesce(1) in Spark",
            )  # fmt: skip
        loose = [file for file in sorted(files) if _is_table(file) or folder + file == given]
        tables = [REGIONS] if REGIONS in files else parts or loose
        for file in tables:
            count += 1
            listed = is_uri(given) and folder + file != given
            yield folder + file, files if listed else _beside(folder + file, settings)
    if not count:
        raise NoInput(
            "no regions table found", file=shown(given), expected=f"{REGIONS} or other Parquet files, in it or below",
            fix="name files or folders that exist",
        )  # fmt: skip


def _walk(place: str) -> dict[str, int]:
    """Parquet files and their sizes, at or below a place. Hidden folders and links to others are not followed."""
    if os.path.isfile(place):
        return _sizes([place])
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


def _beside(file: str, settings: str) -> dict[str, int]:
    """The table's size, and those of the flows that may lie beside it; a folder of thousands is not listed for each."""
    folder = file.removesuffix(_last(file))
    places = [folder + name for name in (_last(file), f"{_stem(file)}.{MOBILITY}", MOBILITY)]
    found = sizes(places, settings) if is_uri(file) else _sizes(p for p in places if p == file or os.path.lexists(p))
    return {_last(place): size for place, size in found.items()}


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith((".", "_"))


def _is_table(name: str) -> bool:
    return _is_parquet(name) and name.partition(".")[0] not in OURS and not name.endswith(f".{MOBILITY}")


def _city(regions: str) -> str:
    """The name of a Hive partition, else of the file, else of the folder that its regions.parquet is in."""
    path = Path(unquote(regions)) if is_uri(regions) else Path(regions).absolute()
    if path.name == REGIONS or is_part(path.name):
        inner = path.parent.name in (REGIONS, REGIONS.removesuffix(".parquet"))
        folder = path.parent.parent if inner else path.parent
        return hive_city(path) or folder.name.removesuffix(".parquet")
    return hive_city(path) or path.stem


def _escaped(name: str) -> str:
    """The name in a folder's, as Hive and Spark escape it: what a path or a partition's reader takes for its own."""
    return re.sub(r"[\x00-\x1f\x7f\"#%'*/:=?\\{\[\]^]", lambda found: f"%{ord(found[0]):02X}", name)


def _last(file: str) -> str:
    return file.rpartition("/")[2]


def _stem(file: str) -> str:
    return _last(file).removesuffix(".parquet")
