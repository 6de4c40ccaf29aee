"""The bundle: a folder ``name.topt/`` (or one zip of it) that says what it holds and proves it.

``manifest.json`` lists every other file with size and SHA-256, and ``manifest.json.sha256`` seals the manifest.
A file that is missing, not listed, changed, a link, or named outside the folder is refused before any model is
opened. Bytes are hashed as they are read, and what was hashed is what is used: nothing can be swapped in between.
"""

import hashlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from topt_deploy.data.city import Schema
from topt_deploy.data.features import all_widths
from topt_deploy.errors import BadBundle, NoInput
from topt_deploy.hardening.onnx_operators import check_graph
from topt_deploy.intervals import FOLDS, LEVERAGE
from topt_deploy.storage.atomic import reading, sha256_bytes, write_text
from topt_deploy.tensorrt.library import FLAVOURS
from topt_deploy.tensorrt.profile import read_profile

if TYPE_CHECKING:
    import zipfile

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "manifest.json.sha256"
SIGNATURE = "manifest.json.sig"
CARD = "MODEL_CARD.md"
SUFFIX = ".topt"
ENCODER = "encoder/"
"""The folder of a prompt encoder inside a city's bundle: a sealed folder of its own."""
GRAPH_SUFFIX = ".onnx"
"""Of every graph, so that none is opened that was not looked through."""
ENGINE_SUFFIX = ".engine"
"""Of what TensorRT or TensorRT-RTX built of a graph."""
MANIFEST_LIMIT_BYTES = 16 << 20
SEAL_LIMIT_BYTES = 200
"""Of seal and signature."""
READ_LIMIT_BYTES = 1 << 30
"""Of what is read into memory; an encoder's weights are mapped."""
TOTAL_LIMIT_BYTES = 64 << 30
FILE_COUNT_LIMIT = 10_000
UNPACKED_RATIO_LIMIT = 100
"""The limit of a zip's unpacked size, in times its size. Weights shrink by a tenth, tables and texts to a fifth."""
DIRECTORY_LIMIT_BYTES = 4 << 20
"""Of a zip's directory, which Python's reader makes objects of: ten times a directory of as many files as may be."""
BLOCK_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z")


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """The manifest of a bundle.

    Attributes:
        schema_version: Version of this record; another one is refused.
        version: topt-deploy's, that wrote it.
        source: What it was made from: run, city, number of regions, hashes of the tables.
        tasks: By name: the prompt column (or null), the run's figures, its held-out scores, which intervals are made
            of, with their scale; and ``fold_scores``, the same by fold, where the graph puts out the folds' fits.
        views: Categories of every count view, in order.
        mobility: Whether flows are read.
        prompts: By column: ``width``, and ``encoder``, ``template`` (its hash) and ``precision`` where the training
            table named them.
        ranges: Smallest and largest training value of every count and total flow.
        inputs: Names of the graph's inputs, in order. Its outputs are the tasks, in order.
        leverage: ``threshold``, beyond which a region is extrapolated; null where the graph puts out no leverage, and
            the ranges tell instead.
        opset: ONNX operator set.
        variants: By name: graph, weights and where each initialiser lies in them, providers, tolerance and what the
            parity gate measured. One for TensorRT (docs/how-to/tensorrt.md) has ``flavour``, ``precision``, ``profile``
            (:mod:`topt_deploy.tensorrt.profile`), ``library`` and ``engines`` by compute capability where they were
            built, and ``checked``, what looked through the graph.
        golden: Base names of the golden cities under ``golden/``.
        encoder: The prompt encoder that goes with it, if any: ``identity``, ``sha256`` of its manifest, and ``bundle``,
            the name of its own bundle, or null where it is inside.
        files: Every other file: size in bytes and SHA-256.
    """

    schema_version: int
    version: str
    source: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    views: Mapping[str, tuple[str, ...]]
    mobility: bool
    prompts: Mapping[str, Mapping[str, Any]]
    ranges: Mapping[str, tuple[float, float]]
    inputs: tuple[str, ...]
    opset: int
    variants: Mapping[str, Mapping[str, Any]]
    golden: tuple[str, ...]
    encoder: Mapping[str, Any] | None = None
    leverage: Mapping[str, Any] | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs, in order."""
        folds = [task + FOLDS for task, facts in self.tasks.items() if "fold_scores" in facts]
        return [*self.tasks, *folds, *([LEVERAGE] if self.leverage else [])]

    @property
    def schema(self) -> Schema:
        """The tables and columns of a city that the model reads."""
        return Schema(
            views={view: tuple(names) for view, names in self.views.items()},
            mobility=self.mobility,
            prompts={column: int(facts["width"]) for column, facts in self.prompts.items()},
        )


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
    def is_encoder(self) -> bool:
        """True for a prompt encoder's own bundle (:mod:`topt_deploy.bundle.encoder_manifest`), and not a city's."""
        return "spec" in self.record

    def read(self, name: str) -> bytes:
        """The bytes of a file, which are what the manifest says.

        Raises:
            BadBundle: If they are not.
        """
        if name not in self.record["files"]:
            raise _refuse(self.path, f"{name!r} is not among its files")
        facts = self.record["files"][name]
        if facts["size"] > READ_LIMIT_BYTES:
            raise _refuse(self.path, f"{name} is larger than the {READ_LIMIT_BYTES >> 30} GB that are read at once")
        with _Files(self.path, self.inside) as files:
            data = files.read(name, int(facts["size"]))
        if len(data) != facts["size"] or sha256_bytes(data) != facts["sha256"]:
            raise _changed(self.path, name)
        if name.endswith(GRAPH_SUFFIX):
            self._check_graph(name, data)
        return data

    def _check_graph(self, name: str, data: bytes) -> None:
        folder = name.rpartition("/")[0]
        parts = ((file.rpartition("/"), facts["size"]) for file, facts in self.record["files"].items())
        try:
            check_graph(data, {base: size for (place, _, base), size in parts if place == folder})
        except (ValueError, RecursionError) as error:
            raise _refuse(self.path, f"{name} is refused: {error}") from error

    def verify(self, *, skip: frozenset[str] = frozenset()) -> None:
        """Hash every listed file, and look through every graph, but those in ``skip``.

        Raises:
            BadBundle: If one is not what the manifest says, or a graph is not what an exporter writes.
        """
        with _Files(self.path, self.inside) as files:
            for name, facts in self.record["files"].items():
                if name in skip:
                    continue
                if name.endswith(GRAPH_SUFFIX):
                    self.read(name)
                elif files.digest(name, facts["size"]) != facts["sha256"]:
                    raise _changed(self.path, name)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle(Sealed):
    """An opened bundle.

    Attributes:
        manifest: Its manifest.
    """

    manifest: Manifest


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check its manifest, its list of files and their sizes.

    Raises:
        NoInput: If there is nothing at ``path``.
        BadBundle: If it is not a sound bundle.
    """
    sealed = open_sealed(path, SCHEMA_VERSION)
    if sealed.is_encoder:
        raise BadBundle(
            "a prompt encoder's bundle, not a city's",
            file=path,
            fix="name the city's; this one goes to --encoder-bundle",
        )
    with well_formed(sealed.path):
        manifest = Manifest(**sealed.record)
        _check_form(manifest)
        manifest = replace(manifest, inputs=tuple(manifest.inputs), golden=tuple(manifest.golden))
    return Bundle(**vars(sealed), manifest=manifest)


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
    with _Files(path, inside) as files:
        sizes = files.sizes()
        if MANIFEST not in sizes or SEAL not in sizes:
            raise _refuse(path, f"{MANIFEST if MANIFEST not in sizes else SEAL} is missing: not a whole bundle")
        data = files.read(MANIFEST, MANIFEST_LIMIT_BYTES)
        seal = files.read(SEAL, SEAL_LIMIT_BYTES)
        signature = files.read(SIGNATURE, SEAL_LIMIT_BYTES) if SIGNATURE in sizes else None
    digest = sha256_bytes(data)
    if seal != _seal(digest):
        raise _refuse(path, "the manifest is not the one that was sealed")
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
            raise _refuse(path, f"files {problem}: {', '.join(names[:5])}")
    return Sealed(path=path, inside=inside, record=record, sha256=digest, data=data, signature=signature)


@contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong in taking a manifest apart into the error for the user."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _refuse(path, f"the manifest cannot be read ({error})") from error


def require(held: bool, key: str) -> None:
    """Refuse a manifest's value.

    Raises:
        TypeError: Naming the key.
    """
    if not held:
        raise TypeError(f"{key} is not of the right form")


def seal_bundle(folder: Path, manifest: Any) -> None:
    """Write the manifest, a dataclass, of everything in ``folder``, and its seal: the last step of making a bundle."""
    with _Files(folder) as files:
        listing = {
            name: {"size": size, "sha256": files.digest(name, size)}
            for name, size in sorted(files.sizes().items())
            if name != SIGNATURE
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
    return _refuse(path, f"{name} is not the file that the manifest describes")


def _refuse(path: Path, reason: str) -> BadBundle:
    return BadBundle(reason, file=path, fix="copy or export the bundle again; do not edit its files")


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(v) in (int, float) for v in value)


def _check_form(manifest: Manifest) -> None:
    """Refuse a manifest whose values are not of the kinds that its readers rely on.

    Raises:
        TypeError: Naming the key.
    """

    def names(value: object) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)

    def size(value: object, low: int = 0) -> bool:
        return type(value) is int and value >= low

    for key in ("source", "tasks", "views", "prompts", "ranges", "variants", "files"):
        require(isinstance(getattr(manifest, key), dict), key)
    for key in ("tasks", "prompts", "variants", "files"):
        require(all(isinstance(v, dict) for v in getattr(manifest, key).values()), key)
    for key in ("inputs", "golden"):
        require(names(getattr(manifest, key)), key)
    require(all(names(v) for v in manifest.views.values()), "views")
    for facts in manifest.tasks.values():
        scores = facts.get("scores")
        require(_numbers(scores), "tasks")
        folds = facts.get("fold_scores", [scores])
        require(isinstance(folds, list) and bool(folds) and all(map(_numbers, folds)), "tasks")
        require("fold_scores" not in facts or manifest.leverage is not None, "leverage")
    if manifest.leverage is not None:
        require(isinstance(manifest.leverage, dict), "leverage")
        threshold = manifest.leverage.get("threshold")
        require(isinstance(threshold, int | float) and not isinstance(threshold, bool), "leverage")
        require(not math.isnan(manifest.leverage["threshold"]), "leverage")
    require(isinstance(manifest.mobility, bool), "mobility")
    if manifest.encoder is not None:
        require(isinstance(manifest.encoder, dict), "encoder")
        require(all(isinstance(manifest.encoder.get(key), str) for key in ("identity", "sha256")), "encoder")
        require(
            manifest.encoder.get("bundle") is None or _NAME.match(manifest.encoder["bundle"]) is not None, "encoder"
        )
    require(all(size(facts.get("width"), 1) for facts in manifest.prompts.values()), "prompts")
    require({*manifest.inputs} <= {*all_widths(manifest.schema), *manifest.prompts}, "inputs")
    ranged = {f"{view}_{name}" for view, categories in manifest.views.items() for name in categories}
    ranged |= {"outflow", "inflow"} if manifest.mobility else set()
    require(ranged <= set(manifest.ranges), "ranges")
    for ends in manifest.ranges.values():
        require(isinstance(ends, list) and len(ends) == 2 and all(type(x) in (int, float) for x in ends), "ranges")
    for variant in manifest.variants.values():
        require({variant.get("graph"), variant.get("weights")} <= set(manifest.files), "variants")
        require(variant["graph"].endswith(GRAPH_SUFFIX), "variants")
        require(isinstance(variant.get("initializers"), dict), "variants")
        require(type(variant.get("tolerance")) in (int, float), "variants")
        for place in variant["initializers"].values():
            require(isinstance(place, list) and len(place) == 2 and size(place[0]), "variants")
            require(isinstance(place[1], list) and all(size(n) for n in place[1]), "variants")
        if "flavour" in variant:
            require(isinstance(variant.get("precision"), str), "variants")
            check_engines(variant, manifest.files, "variants")


def check_engines(record: Mapping[str, Any], files: Mapping[str, Any], key: str) -> None:
    """Refuse what a manifest says of engines where it is not of the kinds that its readers rely on.

    Args:
        record: With flavour, profile, library, engines and checked.
        files: The bundle's.
        key: Of the manifest, for the error.

    Raises:
        TypeError: Naming the key.
    """
    require(record.get("flavour") in FLAVOURS, key)
    require(isinstance(record.get("profile"), dict) and bool(read_profile(record["profile"])), key)
    require(record.get("library") is None or isinstance(record["library"], str), key)
    require(isinstance(record.get("checked"), list) and all(isinstance(by, str) for by in record["checked"]), key)
    engines = record.get("engines")
    require(isinstance(engines, dict) and set(engines.values()) <= set(files), key)
    require(all(name.endswith(ENGINE_SUFFIX) for name in record["engines"].values()), key)
    require(not engines or record["library"] is not None, key)


class _Files:
    """The files of a folder or of a zip, or of one folder within, by safe relative names."""

    def __init__(self, path: Path, inside: str = "") -> None:
        self.path, self.inside = path, inside
        self._zip: zipfile.ZipFile | None = None

    def __enter__(self) -> "_Files":
        if not self.path.is_dir():
            import zipfile

            with reading(self.path):
                self._stream = _Bounded(_open_plain(self.path))
                try:
                    self._zip = zipfile.ZipFile(self._stream)
                except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
                    self._stream.close()
                    raise _refuse(self.path, f"neither a folder nor a zip file ({error})") from error
            self._stream.limit = -1
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()
            self._stream.close()

    def sizes(self) -> dict[str, int]:
        """Sizes by name; anything but plain files under plain names is refused."""
        found: dict[str, int] = {}
        limit, total, count = TOTAL_LIMIT_BYTES, 0, 0
        if self._zip is not None:
            limit = min(limit, UNPACKED_RATIO_LIMIT * os.fstat(self._stream.fileno()).st_size)
        for entry, size in self._entries():
            total, count = total + size, count + 1
            if total > limit or count > FILE_COUNT_LIMIT:
                raise _refuse(self.path, "too large, or too many files, for a bundle")
            if not entry.startswith(self.inside):
                continue
            name = entry.removeprefix(self.inside)
            if not _NAME.match(name):
                raise _refuse(self.path, f"a file has the name {name!r}, which no bundle has")
            if name in found:
                raise _refuse(self.path, f"two files have the name {name!r}")
            found[name] = size
        return found

    def _entries(self) -> Iterator[tuple[str, int]]:
        if self._zip is not None:
            for info in self._zip.infolist():
                if info.compress_type not in (0, 8):  # stored, deflated: the others' decoders fail in ways of their own
                    raise _refuse(self.path, f"{info.filename} is compressed in a way that no bundle uses")
                if not info.filename.endswith("/"):
                    yield info.filename, info.file_size
            return
        folders = [self.path]
        while folders:
            folder = folders.pop()
            with reading(folder), os.scandir(folder) as entries:
                for entry in entries:
                    name = Path(entry.path).relative_to(self.path).as_posix()
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        yield name, entry.stat(follow_symlinks=False).st_size
                    else:
                        raise _refuse(self.path, f"{name} is a link or a special file")

    def read(self, name: str, limit: int) -> bytes:
        """At most ``limit`` bytes of a file, and one more where it has more."""
        with self._open(name) as stream:
            return stream.read(limit + 1)

    def digest(self, name: str, limit: int) -> str:
        """SHA-256 of what :meth:`read` would give, a block at a time."""
        hashed, left = hashlib.sha256(), limit + 1
        with self._open(name) as stream:
            while left and (block := stream.read(min(left, BLOCK_BYTES))):
                hashed.update(block)
                left -= len(block)
        return hashed.hexdigest()

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self._zip is not None:
            import zipfile
            import zlib

            try:
                with self._zip.open(self.inside + name) as packed:
                    yield packed
                return
            except (
                zipfile.BadZipFile,
                zlib.error,
                RuntimeError,
                NotImplementedError,
                EOFError,
                OSError,
                OverflowError,
                ValueError,
            ) as error:
                raise _refuse(self.path, f"{name} cannot be unpacked ({error})") from error
        path = self.path / (self.inside + name)
        with reading(path), os.fdopen(_open_plain(path, os.O_NOFOLLOW), "rb") as stream:
            yield stream


class _Bounded(io.FileIO):
    """A file of which at most ``limit`` bytes are read at once, where that is not negative."""

    limit = DIRECTORY_LIMIT_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to ``size`` bytes; what asks for the rest of the file gets no more than the limit."""
        if self.limit >= 0:
            size = self.limit if size is None or size < 0 else size
            if size > self.limit:
                raise ValueError("its directory is too large")
        return super().read(size) or b""


def _open_plain(path: Path, flags: int = 0) -> int:
    """A descriptor of a plain file; no pipe is waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refuse(path, "neither a folder nor a plain file")
    return descriptor
