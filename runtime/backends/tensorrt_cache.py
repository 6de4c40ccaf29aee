"""Engines that were built on this machine, kept for the next start under a fingerprint of all that they depend on.

An entry is two files, the engine and a record of its fingerprint and hash, which is written last. It is used only if
both are this user's alone to write, the record is of this very fingerprint, and the engine has the record's hash;
anything else is built again, and never an error. Processes that need the same engine at once build it once.
"""

import json
import logging
import mmap
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from topt_deploy import __version__
from topt_deploy.errors import BadConfig, CannotCreate, TryAgain
from topt_deploy.storage.atomic import atomic_file, atomic_files, sweep
from topt_deploy.storage.hashed_file import sha256_bytes
from topt_deploy.storage.locks import locked
from topt_deploy.storage.os_errors import write_error, writing
from topt_deploy.storage.text_files import json_text
from topt_deploy.tensorrt.build import Built

log = logging.getLogger(__name__)

PLACE, LIMIT = "TOPT_CACHE", "TOPT_CACHE_GB"
"""Environment variables: another folder, and how many GB of engines are kept."""
LIMIT_GB = 20.0
ENGINE, RECORD, TIMING = ".engine", ".json", ".timing"
WAIT_S = 0.2
LEFT_S = 24 * 3600
"""The age at which files of a killed process are removed."""
_READ_LIMIT_BYTES = 1 << 20
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

Buffer = bytes | mmap.mmap


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything that an engine depends on.

    Attributes:
        graph, weights: SHA-256 of the files; "" for a graph without weights of its own.
        flavour, version: The library's (:class:`topt_deploy.tensorrt.library.Library`).
        cuda, driver, gpu, capability: :class:`topt_deploy.tensorrt.cuda_driver.Gpu`'s.
        precision: Of the weights.
        profile: Sizes of the free dimensions, as in a manifest.
        settings: Of the builder, and what else there may be.
    """

    graph: str
    weights: str
    flavour: str
    version: str
    cuda: str
    driver: str
    gpu: str
    capability: str
    precision: str
    profile: Mapping[str, list[int]]
    settings: Mapping[str, Any] = field(default_factory=lambda: {"topt-deploy": __version__, "types": "strong"})

    def as_record(self) -> dict[str, Any]:
        """As it stands in an entry's record."""
        return asdict(self)

    @property
    def key(self) -> str:
        """The name of the entry."""
        return sha256_bytes(json.dumps(self.as_record(), sort_keys=True).encode())

    @property
    def timing_key(self) -> str:
        """The name of the timing cache: measurements of one library on one kind of GPU."""
        facts = [self.flavour, self.version, self.cuda, self.gpu, self.capability]
        return sha256_bytes(json.dumps(facts).encode())

    def differing(self, record: Mapping[str, Any]) -> list[str]:
        """Names of the fields in which a record's fingerprint is another."""
        own = self.as_record()
        return [one.name for one in fields(self) if record.get(one.name) != own[one.name]]


class _Distrusted(Exception):
    """A file that is not taken, saying why."""


def cache_folder() -> Path:
    """The folder in which this user's engines are kept.

    Raises:
        CannotCreate: If no place is known.
    """
    if named := os.environ.get(PLACE):
        return Path(named) / "engines"
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError as error:
        raise CannotCreate("no place for engines", found="no home folder", fix=f"name one in ${PLACE}") from error
    return root / "topt-deploy" / "engines"


def cache_limit() -> int:
    """The limit of the bytes of engines that are kept.

    Raises:
        BadConfig: If the environment names no number.
    """
    text = os.environ.get(LIMIT, str(LIMIT_GB))
    try:
        limit = float(text)
        if not limit >= 0:
            raise ValueError
    except ValueError as error:
        raise BadConfig(f"${LIMIT} is not a size", expected="gigabytes, such as 20", found=repr(text)) from error
    return int(min(limit, 1e9) * 1e9)


def own_folder(folder: Path) -> Path:
    """Make a folder for this user alone, unless it is there and is one.

    Raises:
        CannotCreate, IOFailure: If there can be no such folder, or others may write to it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        facts = os.lstat(folder)
    except OSError as error:
        raise write_error(folder, error) from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & _OTHERS_MAY_WRITE:
        raise CannotCreate(
            "engines are not kept where others may write", file=folder, expected="a folder of this user's alone",
            found=f"owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):04o}",
            fix=f"chmod 700 it, or name another place in ${PLACE}",
        )  # fmt: skip
    return folder


class EngineCache:
    """Engines in a folder of this user's own.

    Args:
        folder: Of :func:`own_folder`.
        limit: Bytes; what was used longest ago is removed when there is more.

    Raises:
        CannotCreate, IOFailure: Likewise.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = own_folder(folder), limit

    def engine(self, fingerprint: Fingerprint, build: Callable[[bytes | None], Built]) -> Buffer:
        """The engine of a fingerprint, kept or built; the log says which, and why.

        Args:
            fingerprint: Of everything that it depends on.
            build: Builds it, given the timing cache of earlier builds; not called where the engine is there.

        Raises:
            ToptError: As ``build`` does, and where the engine cannot be written.
        """
        found, reason = self._look(fingerprint)
        if found is None:
            place = self._path(fingerprint.key, ENGINE)
            with self._alone(place):
                found, now = self._look(fingerprint)
                if found is not None:
                    log.info("engine %s: hit, built by another process meanwhile", fingerprint.key[:16])
                    return found
                log.info("engine %s: miss (%s); building, which can take minutes", fingerprint.key[:16], now)
                return self._build(fingerprint, build)
        log.info("engine %s: hit (%s)", fingerprint.key[:16], reason)
        return found

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}{suffix}"

    def _look(self, fingerprint: Fingerprint) -> tuple[Buffer | None, str]:
        """The engine, if there is one to be trusted, and what to say of it."""
        record_path, path = (self._path(fingerprint.key, suffix) for suffix in (RECORD, ENGINE))
        if not record_path.exists():
            return None, self._nearest(fingerprint)
        try:
            record = _read_record(record_path)
            differing = fingerprint.differing(record["fingerprint"])
            if differing:
                raise _Distrusted(f"its record is of another {', '.join(differing)}")
            engine = _open(path)
            if sha256_bytes(memoryview(engine)) != record["sha256"]:
                raise _Distrusted("the engine is not the record's: changed or cut off")
        except _Distrusted as why:
            return None, f"not trusted: {why}"
        with suppress(OSError):
            os.utime(record_path)  # used now
        return engine, f"{len(engine)} bytes"

    def _nearest(self, fingerprint: Fingerprint) -> str:
        """The differences from the entry that differs least."""
        best: list[str] | None = None
        for path in sorted(self.folder.glob(f"*{RECORD}")):
            with suppress(_Distrusted):
                differing = fingerprint.differing(_read_record(path)["fingerprint"])
                best = differing if best is None or len(differing) < len(best) else best
        return "nothing is kept" if best is None else f"the nearest entry differs in {', '.join(best)}"

    @contextmanager
    def _alone(self, place: Path) -> Iterator[None]:
        """Be the only one that builds an engine; wait for whoever does."""
        said = False
        while True:
            with suppress(TryAgain):
                with locked(place):
                    yield
                return
            if not said:
                log.info("engine %s: another process is building it; waiting", place.stem[:16])
                said = True
            time.sleep(WAIT_S)

    def _build(self, fingerprint: Fingerprint, build: Callable[[bytes | None], Built]) -> Buffer:
        timing_path = self._path(fingerprint.timing_key, TIMING)
        timing: bytes | None = None
        with suppress(_Distrusted):
            timing = bytes(_open(timing_path))
        began = time.monotonic()
        built = build(timing)
        log.info("engine %s: built in %.1f s", fingerprint.key[:16], time.monotonic() - began)
        record = {
            "fingerprint": fingerprint.as_record(),
            "sha256": sha256_bytes(built.engine),
            "size": len(built.engine),
        }
        places = [self._path(fingerprint.key, suffix) for suffix in (ENGINE, RECORD)]  # the record vouches: it is last
        for place in places:
            sweep(place)
        for place in (*places, timing_path):
            if place.is_symlink() or (place.exists() and not place.is_file()):
                place.unlink()  # a link or a pipe is not trusted, and makes way
        with atomic_files(places) as temporaries:
            for temporary, data in zip(temporaries, (built.engine, json_text(record).encode()), strict=True):
                with writing(places[0]):
                    _write(temporary, data)
        if built.timing_cache:
            with atomic_file(timing_path) as temporary, writing(timing_path):
                _write(temporary, built.timing_cache)
        self._make_room(fingerprint.key)
        return built.engine

    def entries(self) -> list[tuple[float, int, str]]:
        """When each entry was last used, its size in bytes, and its key; the one used longest ago first."""
        found = []
        for path in self.folder.glob(f"*{ENGINE}"):
            with suppress(OSError):
                record = path.with_suffix(RECORD)
                used = (record if record.exists() else path).stat().st_mtime
                found.append((used, path.stat().st_size, path.stem))
        return sorted(found)

    def remove(self, key: str) -> None:
        """Remove an entry; whoever has opened its engine keeps it."""
        for suffix in (RECORD, ENGINE):
            with suppress(OSError):
                self._path(key, suffix).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything that is kept here."""
        for key in {path.name.partition(".")[0] for path in self.folder.iterdir() if not path.name.startswith(".")}:
            self.remove(key)
            for path in (self._path(key, TIMING), self._path(key, "")):
                if path.is_dir() and not path.is_symlink():  # of ONNX Runtime's provider
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with writing(path):
                        path.unlink(missing_ok=True)

    def _make_room(self, keep: str) -> None:
        entries = self.entries()
        size = sum(one for _, one, _ in entries)
        for _, one, key in entries:
            if size > self.limit and key != keep:
                log.info("engine %s: removed, for more than %.1f GB are kept", key[:16], self.limit / 1e9)
                self.remove(key)
                size -= one
        for path in self.folder.glob(".*"):  # of processes that were killed; what is being written is younger
            with suppress(OSError):
                if not path.name.endswith(".lock") and time.time() - path.stat().st_mtime > LEFT_S:
                    path.unlink()


def _write(path: Path, data: bytes) -> None:
    path.chmod(0o600)  # whatever the umask is: what others may write to is not trusted
    path.write_bytes(data)


def _open(path: Path) -> mmap.mmap:
    """A file that is this user's alone to write, mapped.

    Raises:
        _Distrusted: If it is not.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _Distrusted(f"{path.suffix} cannot be opened ({error.strerror})") from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise _Distrusted(f"{path.suffix} is no plain file")
        if facts.st_uid != os.geteuid():
            raise _Distrusted(f"{path.suffix} is another user's ({facts.st_uid})")
        if facts.st_mode & _OTHERS_MAY_WRITE:
            raise _Distrusted(f"others may write to {path.suffix} (mode {stat.S_IMODE(facts.st_mode):04o})")
        if not facts.st_size:
            raise _Distrusted(f"{path.suffix} is empty")
        return mmap.mmap(descriptor, facts.st_size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _Distrusted(f"{path.suffix} cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)


def _read_record(path: Path) -> dict[str, Any]:
    with _open(path) as data:
        try:
            if len(data) > _READ_LIMIT_BYTES:
                raise ValueError
            record = json.loads(data[:])
            if not isinstance(record["fingerprint"], dict) or not isinstance(record["sha256"], str):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _Distrusted("its record cannot be read") from error
    return record
