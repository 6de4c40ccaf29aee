"""The one check of every path that a command is told to write to, made before the work whose result would go there."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from topt_deploy.errors import UsageError

from .os_errors import check_place
from .table_parts import is_part, is_table_folder, stands_for_file, table_files

TABLES = (".parquet", ".pq", ".parq", ".geoparquet", "")
"""Suffixes of a Parquet file; a name without one claims nothing."""
METRICS = (".prom",)
"""Names of the files that node_exporter reads in a folder."""
INPUTS = ("regions.parquet", "mobility.parquet")
"""Names of a city's own tables, wherever they lie: no result is written under these names."""
SEALS = ("manifest.json", "manifest.json.sha256")
"""By which a folder is known for a bundle."""


def check_outputs(
    written: Iterable[Path],
    *,
    read: Iterable[Path] = (),
    bundles: Iterable[Path] = (),
    ours: Callable[[Path], bool] | None = None,
) -> None:
    """Refuse outputs that cannot be written, or would take the place of something else than an older output.

    Args:
        written: All files that will be written, derived ones too.
        read: All files that are read.
        bundles: Bundles that are used, folders or zips.
        ours: Of a command that makes cities: tells of a file that stands there whether the same command wrote it. Then
            outputs may be called like a city's tables.

    Raises:
        CannotCreate: If one is a folder, a device, a pipe or a link, or has no folder.
        UsageError: If one is an input or is called like one, lies in a bundle, or is someone else's file.
    """
    folders: dict[Path, str] = {}  # where they are, links followed, is found out once for all the files in them

    def real(file: Path) -> str:
        if os.path.islink(file):
            return os.path.realpath(file)
        if file.parent not in folders:
            folders[file.parent] = os.path.realpath(file.parent)
        return os.path.join(folders[file.parent], file.name)

    inputs = list(read)
    taken = {real(file): file for table in inputs for file in {table, *_files(table)}}
    taken |= {real(bundle): bundle for bundle in bundles}
    parted = {os.path.realpath(table): table for table in inputs if os.path.isdir(table)}
    for target in written:
        if target.name == "-":
            raise UsageError("results go to files, not to standard output", found="-", fix="name a file with --out")
        if file := taken.get(real(target)) or _same(target, taken.values()):
            raise UsageError("the output would overwrite an input", file=file, fix="name another place with --out")
        if ours is None and target.name in INPUTS:
            raise UsageError(
                "an output is not called like an input", file=target, found=target.name,
                fix="name another file with --out",
            )  # fmt: skip
        table = parted.get(os.path.dirname(real(target)))
        if table is not None and (stands_for_file(table.name) or is_part(target.name)):
            raise UsageError(
                "the output would become a part of an input", file=target, found=f"in the table {table}",
                fix="name another place with --out",
            )  # fmt: skip
        check_place(target)
        if ours is not None and os.path.lexists(target) and not ours(target):
            raise UsageError(
                "a file that this command did not write would be replaced", file=target,
                fix="name another folder with --out, or move the file away",
            )  # fmt: skip
    for folder in folders.values():
        _check_outside(folder, bundles)


def _files(table: Path) -> list[Path]:
    return table_files(table) if os.path.isdir(table) and is_table_folder(table) else [table]


def _same(target: Path, files: Iterable[Path]) -> Path | None:
    """The file that a target is another name of: a hard link, or a name that differs in what a file system ignores."""
    try:
        facts = os.lstat(target)
    except OSError:
        return None
    for file in files:
        try:
            if os.path.samestat(facts, os.stat(file)):
                return file
        except OSError:
            continue
    return None


def check_suffix(path: Path, suffixes: Sequence[str], option: str) -> None:
    """Refuse a name that says another format than what is written.

    Raises:
        UsageError: Naming those that fit.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            f"{option} is a {suffixes[0]} file", file=path, expected=f"a name with {suffixes[0]}",
            found=repr(path.suffix or path.name), fix=f"name a file such as {path.stem or 'out'}{suffixes[0]}",
        )  # fmt: skip


def check_outside(out: Path, bundles: Iterable[Path] = ()) -> None:
    """Refuse a file or folder in a bundle, which a file that its manifest does not list would make unusable.

    Raises:
        UsageError: Naming the output.
    """
    _check_outside(os.path.realpath(out), bundles)


def _check_outside(folder: str, bundles: Iterable[Path]) -> None:
    """Of a real path: in these bundles, or in whatever else has a bundle's seal."""
    inside = any(os.path.join(folder, "").startswith(os.path.join(os.path.realpath(b), "")) for b in bundles)
    above = folder
    while not inside and above != os.path.dirname(above):
        inside = all(os.path.isfile(os.path.join(above, name)) for name in SEALS)
        above = os.path.dirname(above)
    if inside:
        raise UsageError("the output would go into the bundle", file=folder, fix="name another place with --out")
