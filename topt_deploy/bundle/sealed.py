"""Sealed folders: a manifest that lists every file with size and SHA-256, and a seal on the manifest."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from topt_deploy.errors import BadBundle, BadConfig, BadData, NoInput
from topt_deploy.hardening.onnx_operators import check_graph
from topt_deploy.storage.hashed_file import sha256_bytes
from topt_deploy.storage.text_files import write_text

from .archive import Archive, unsound

Data = TypeVar("Data", bytes, memoryview)
MANIFEST = "manifest.json"
SEAL = "manifest.json.sha256"
SIGNATURE = "manifest.json.sig"
GRAPH_SUFFIX = ".onnx"
"""Of every graph, so that none is opened that was not looked through."""
MANIFEST_LIMIT_BYTES = 16 << 20
SEAL_LIMIT_BYTES = 200
"""Of seal and signature."""
READ_LIMIT_BYTES = 1 << 30
"""Of what is read into memory; an encoder's weights are mapped."""
GRAPH_LIMIT_BYTES = 64 << 20
"""Of a graph, whose weights lie beside it; it is looked through byte by byte."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sealed:
    """A sealed folder, or zip of one, whose names and sizes agree with its manifest.

    Attributes:
        path: The folder or zip file.
        inside: The folder within it that is meant, ending in a slash; "" for all of it.
        record: The manifest's values, as they stand in the file.
        sha256: Hash of the manifest, and through it of everything.
        data: The manifest's bytes.
        signature: Those of ``manifest.json.sig`` (:mod:`.signature`), if there is one; not yet checked.
    """

    path: Path
    inside: str
    record: Mapping[str, Any]
    sha256: str
    data: bytes = field(repr=False)
    signature: bytes | None

    @property
    def facts(self) -> dict[str, Any]:
        """The attributes above, for what is made of it."""
        return {one.name: getattr(self, one.name) for one in fields(Sealed)}

    @property
    def is_encoder(self) -> bool:
        """True for a prompt encoder's own bundle (:mod:`topt_deploy.bundle.encoder_manifest`), and not a city's."""
        return "spec" in self.record

    def read(self, name: str) -> bytes:
        """The bytes of a file, which are what the manifest says.

        Raises:
            BadBundle: If they are not.
        """
        with Archive(self.path, self.inside) as files:
            return self._read(name, files.read)

    def weights(self, name: str) -> memoryview:
        """:meth:`read` for a large file."""
        with Archive(self.path, self.inside) as files:
            return self._read(name, files.read_large)

    def _read(self, name: str, how: Callable[[str, int], Data]) -> Data:
        if name not in self.record["files"]:
            raise unsound(self.path, f"{name!r} is not among its files")
        facts = self.record["files"][name]
        limit = GRAPH_LIMIT_BYTES if name.endswith(GRAPH_SUFFIX) else READ_LIMIT_BYTES
        if facts["size"] > limit:
            raise unsound(self.path, f"{name} is larger than the {limit >> 20:,} MB that such a file may have")
        data = how(name, int(facts["size"]))
        if len(data) != facts["size"] or sha256_bytes(data) != facts["sha256"]:
            raise _changed(self.path, name)
        if name.endswith(GRAPH_SUFFIX):
            self._check_graph(name, bytes(data))
        return data

    def _check_graph(self, name: str, data: bytes) -> None:
        try:
            check_graph(data, self._sizes[name.rpartition("/")[0]])
        except (ValueError, RecursionError) as error:
            raise unsound(self.path, f"{name} is refused: {error}") from error

    @cached_property
    def _sizes(self) -> dict[str, dict[str, int]]:
        """Sizes of the files of every folder."""
        folders: dict[str, dict[str, int]] = {}
        for file, facts in self.record["files"].items():
            folder, _, base = file.rpartition("/")
            folders.setdefault(folder, {})[base] = facts["size"]
        return folders

    def verify(self, *, skip: frozenset[str] = frozenset()) -> None:
        """Hash every listed file, and look through every graph, but those in ``skip``.

        Raises:
            BadBundle: If one is not what the manifest says, or a graph is not what an exporter writes.
        """
        with Archive(self.path, self.inside) as files:
            for name, facts in self.record["files"].items():
                if name in skip:
                    continue
                if name.endswith(GRAPH_SUFFIX):
                    self._read(name, files.read)
                elif files.digest(name, facts["size"]) != facts["sha256"]:
                    raise _changed(self.path, name)


def open_sealed(path: Path, schema_version: int, inside: str = "") -> Sealed:
    """Open any sealed folder and check its seal, its list of files and their sizes.

    Args:
        path: The folder or zip file.
        schema_version: Of its manifest.
        inside: The folder within it that is meant, ending in a slash.

    Raises:
        NoInput: If there is nothing at ``path``.
        BadBundle: If it is not sound.
    """
    path = Path(path)
    if not path.exists():
        raise NoInput("no such bundle", file=path, fix="export one with topt-deploy export, or name it with --bundle")
    with Archive(path, inside) as files:
        sizes = files.sizes()
        if MANIFEST not in sizes or SEAL not in sizes:
            raise unsound(path, f"{MANIFEST if MANIFEST not in sizes else SEAL} is missing: not a whole bundle")
        data = files.read(MANIFEST, MANIFEST_LIMIT_BYTES)
        seal = files.read(SEAL, SEAL_LIMIT_BYTES)
        signature = files.read(SIGNATURE, SEAL_LIMIT_BYTES) if SIGNATURE in sizes else None
    digest = sha256_bytes(data)
    if seal != _seal(digest):
        raise unsound(path, "the manifest is not the one that was sealed")
    with well_formed(path):
        record = _record(data)
        if record["schema_version"] != schema_version:
            raise BadBundle(
                "the bundle is of another schema version",
                file=path,
                expected=schema_version,
                found=record["schema_version"],
                fix="use the topt-deploy that wrote it, or export again",
            )
        listed = {name: facts["size"] for name, facts in record["files"].items()}
        sound = all(type(f["size"]) is int and isinstance(f["sha256"], str) for f in record["files"].values())
        require(sound and all(size >= 0 for size in listed.values()), "files")
    found = {name: size for name, size in sizes.items() if name not in (MANIFEST, SEAL, SIGNATURE)}
    for problem, names in (
        ("not listed in the manifest", sorted(set(found) - set(listed))),
        ("missing", sorted(set(listed) - set(found))),
        (
            "of another size than listed",
            sorted(n for n in found.keys() & listed.keys() if found[n] != listed[n]),
        ),
    ):
        if names:
            raise unsound(path, f"files {problem}: {', '.join(names[:5])}")
    return Sealed(path=path, inside=inside, record=record, sha256=digest, data=data, signature=signature)


@contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong in taking a manifest apart into the error for the user."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise unsound(path, f"the manifest cannot be read ({error})") from error


@contextmanager
def blamed(path: Path, what: str) -> Iterator[None]:
    """Turn whatever goes wrong with what a bundle holds into an error of the bundle: no data of the user's is at fault.

    Args:
        path: The bundle.
        what: The part of it, for the error.
    """
    try:
        yield
    except (BadData, BadConfig) as error:
        raise BadBundle(
            f"{what}: {error.message}", file=path, column=error.column, ids=error.ids, expected=error.expected,
            found=error.found, fix="export the bundle again",
        ) from error  # fmt: skip
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise unsound(path, f"{what} cannot be used ({str(error).partition(chr(10))[0]})") from error
    except RecursionError as error:
        raise unsound(path, f"{what} is nested too deeply") from error


def require(held: bool, key: str) -> None:
    """Refuse a manifest's value.

    Raises:
        TypeError: Naming the key.
    """
    if not held:
        raise TypeError(f"{key} is not of the right form")


def seal_bundle(folder: Path, manifest: Any, *, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write the manifest of everything in ``folder``, and its seal, in place of older ones: the last step of making a
    bundle.

    Args:
        folder: The bundle's folder.
        manifest: A dataclass with a field ``files``, which is filled in.
        known: Sizes and SHA-256 of files that need not be read once more.
    """
    known = known or {}
    with Archive(folder) as files:
        listing = {
            name: dict(known[name]) if name in known else {"size": size, "sha256": files.digest(name, size)}
            for name, size in sorted(files.sizes().items())
            if name not in (MANIFEST, SEAL, SIGNATURE)
        }
    text = json.dumps(asdict(manifest) | {"files": listing}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(folder / MANIFEST, text)
    write_text(folder / SEAL, _seal(sha256_bytes(text.encode())).decode())


def _record(data: bytes) -> Any:
    """A manifest's values. No key is read where another reader may find another value, and no number that is none.

    Raises:
        ValueError: If a key occurs twice, or a number is no finite one of a machine's.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            raise ValueError("a key occurs twice")
        return record

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:20]} is not a number")
        return value

    def whole(text: str) -> int:
        if len(text) > 19:
            raise ValueError(f"{text[:20]}… is too large a number")
        return int(text)

    return json.loads(data, object_pairs_hook=once, parse_float=number, parse_int=whole, parse_constant=number)


def _seal(digest: str) -> bytes:
    return f"{digest}  {MANIFEST}\n".encode()  # the format of sha256sum -c


def _changed(path: Path, name: str) -> BadBundle:
    return unsound(path, f"{name} is not the file that the manifest describes")
