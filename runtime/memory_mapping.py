"""Files of a bundle that are checked, and then mapped by what runs them instead of being read: they must not change."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topt_deploy.bundle.manifest import Sealed
from topt_deploy.errors import BadBundle, UsageError


@contextmanager
def mapped(bundle: Sealed, files: frozenset[str]) -> Iterator[Path]:
    """The folder of files of a bundle, which are what its manifest says, before and after they are opened.

    Raises:
        UsageError: If the bundle is a zip.
        BadBundle: If a file is not the manifest's, or changes meanwhile.
    """
    if not bundle.path.is_dir():
        raise UsageError(
            "large weights are mapped, not unpacked", file=bundle.path, expected="a folder", found="a zip file",
            fix="unzip the bundle",
        )  # fmt: skip
    folder = bundle.path / bundle.inside
    before = [_stamp(folder / file) for file in files]
    bundle.verify(skip=frozenset(bundle.record["files"]) - files)
    yield folder
    if [_stamp(folder / file) for file in files] != before:
        raise BadBundle("files changed while they were read", file=bundle.path, fix="nothing may write to a bundle")


def _stamp(path: Path) -> tuple[int, ...]:
    facts = os.stat(path, follow_symlinks=False)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
