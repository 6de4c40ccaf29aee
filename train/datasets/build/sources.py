"""Reads every source of a recipe, or takes what an earlier build made of it where nothing has changed since."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy import __version__
from topt_deploy.data.vocabulary import FILE as VOCABULARY
from topt_deploy.storage.atomic import atomic_file
from topt_deploy.storage.hashed_file import sha256_bytes, sha256_file
from topt_deploy.storage.os_errors import reading

from .points import Period
from .recipe import Recipe, Source, files_of
from .tally import Tally, tally_of

Array = np.ndarray[Any, Any]

KEPT = ".build"
"""The folder of what earlier builds made, below the city's."""
COMPANIONS = (".dbf", ".shx", ".prj", ".cpg")
"""Files that belong to a shapefile."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The result of reading a source.

    Attributes:
        tally: What became of its rows.
        arrays: Arrays by name.
        names: Lists of texts by name, such as its categories.
    """

    tally: Tally
    arrays: Mapping[str, Array]
    names: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """A file as it was read."""

    path: Path
    size: int
    modified_ns: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """For the receipt."""
        return {"file": str(self.path), "bytes": self.size, "modified_ns": self.modified_ns, "sha256": self.sha256}


class Hashes:
    """Hashes of files; a file that has the size and the time of an earlier build's is not read again for it.

    Args:
        receipt: The earlier build's.
    """

    def __init__(self, receipt: Mapping[str, Any]) -> None:
        known = receipt.get("files")
        self._known = {}
        for one in known if isinstance(known, list) else []:
            if isinstance(one, dict) and isinstance(one.get("sha256"), str):
                self._known[one.get("file"), one.get("bytes"), one.get("modified_ns")] = one["sha256"]
        self.files: dict[Path, FileFacts] = {}

    def of(self, path: Path) -> list[FileFacts]:
        """The facts of a file and of those that belong to it."""
        return [self._one(file) for file in _with_companions(path)]

    def _one(self, path: Path) -> FileFacts:
        if path not in self.files:
            with reading(path):
                stat = path.stat()
            key = (str(path), stat.st_size, stat.st_mtime_ns)
            sha256 = self._known.get(key) or sha256_file(path)
            self.files[path] = FileFacts(path=path, size=stat.st_size, modified_ns=stat.st_mtime_ns, sha256=sha256)
        return self.files[path]


def _with_companions(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.suffix.lower() == ".shp":
        return [path, *(path.with_suffix(end) for end in COMPANIONS if path.with_suffix(end).exists())]
    return [path]


class Sources:
    """The sources of a recipe, read or taken from what is kept.

    Args:
        recipe: The recipe.
        out: The city's folder.
        regions: The hash of its regions.
        receipt: The earlier build's, or nothing.
        progress: Told how many bytes of how many are done.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        regions: str,
        receipt: Mapping[str, Any],
        progress: Callable[[int, int], None],
    ) -> None:
        self.recipe, self.hashes = recipe, Hashes(receipt)
        self.results: dict[str, Result] = {}
        self.taken: list[str] = []
        self._folder, self._regions, self._progress = out / KEPT, regions, progress
        self._done = self._total = 0

    def plan(self, sources: Sequence[Source]) -> None:
        """Add up how much there is to read."""
        for source in sources:
            self._total += sum(_size(path) for path in files_of(self.recipe, source.file))

    def make(
        self,
        name: str,
        source: Source,
        period: Period,
        make: Callable[[Tally, list[Path], Callable[[Path, float], None]], tuple[dict[str, Array], dict[str, Any]]],
    ) -> Result:
        """The rows that a source gives.

        Args:
            name: What it is called, such as ``points.poi``.
            source: The source.
            period: What is asked for.
            make: Reads its files; told of a file and the share of it that is done.
        """
        files = files_of(self.recipe, source.file)
        facts = [one for path in files for one in self.hashes.of(path)]
        key = self._key(name, source, period, facts)
        kept = self._kept(name, key)
        if kept is not None:
            self.taken.append(name)
        else:
            tally = Tally(name=name, fail=self.recipe.on_bad_row == "fail")
            before = self._done

            def told(path: Path, share: float) -> None:
                earlier = sum(_size(file) for file in files[: files.index(path)])
                self._progress(before + earlier + round(share * _size(path)), self._total)

            arrays, names = make(tally, files, told)
            kept = Result(tally=tally, arrays=arrays, names=names)
            self._keep(name, key, kept)
        self._done += sum(_size(path) for path in files)
        self.results[name] = kept
        return kept

    def _key(self, name: str, source: Source, period: Period, facts: Sequence[FileFacts]) -> str:
        """The hash of everything that a result depends on."""
        said = {
            "version": __version__,
            "vocabulary": sha256_file(VOCABULARY),
            "name": name,
            "source": asdict(replace(source, file=())),
            "period": [str(value) for value in asdict(period).values()],
            "bad": self.recipe.on_bad_row,
            "regions": self._regions,
            "files": [[str(one.path), one.sha256] for one in facts],
        }
        return sha256_bytes(json.dumps(said, sort_keys=True, default=str).encode())

    def _kept(self, name: str, key: str) -> Result | None:
        """A result that is kept; None where there is none, or it is another's or damaged."""
        try:
            with np.load(self._folder / f"{name}.npz", allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                if about["key"] != key:
                    return None
                arrays = {field.removeprefix("array_"): stored[field] for field in stored if field != "about"}
            tally = tally_of(about["tally"], self.recipe.on_bad_row == "fail")
            return Result(tally=tally, arrays=arrays, names=about["names"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError):
            return None

    def _keep(self, name: str, key: str, result: Result) -> None:
        from topt_deploy.storage.os_errors import writing

        about = json.dumps({"key": key, "tally": result.tally.saved(), "names": result.names})
        data = io.BytesIO()
        stored: dict[str, Any] = {f"array_{field}": array for field, array in result.arrays.items()}
        np.savez(data, about=np.array(about), **stored)
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        with atomic_file(self._folder / f"{name}.npz") as temporary:
            temporary.write_bytes(data.getbuffer())


def _size(path: Path) -> int:
    with reading(path):
        return sum(file.stat().st_size for file in _with_companions(path))
