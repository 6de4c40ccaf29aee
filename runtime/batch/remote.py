"""Tables in object stores: fetched into a folder of this machine, predicted there, and put back whole.

pyarrow's file systems do the work. A store shows an object once all of it is there, so the order of the
uploads, receipt last, is what renaming is on a disk. Nothing locks an object.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa

from topt_deploy.errors import IOFailure, NoInput, ToptError, UsageError
from topt_deploy.fileio import scratch_folder
from topt_deploy.table import hive_city

from ..city import Job, aside_path
from ..receipt import receipt_path

SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "file")
"""``az://CONTAINER/…`` is Azure's; the account comes from the environment, as everyone's credentials do."""
ACCOUNT = "AZURE_STORAGE_ACCOUNT"
CHUNK_BYTES = 1 << 22
PATIENCE_S = 60


def is_uri(place: str) -> bool:
    """Whether a place is a URI of one of :data:`SCHEMES`."""
    scheme, found, _ = place.partition("://")
    if found and scheme not in SCHEMES and scheme.isalnum():
        raise UsageError("no such kind of place", file=place, expected=", ".join(f"{s}://" for s in SCHEMES))
    if found and "?" in place:  # what is made of a URI here would lose it
        raise UsageError(
            "settings after a ? are not read",
            file=place,
            fix="the environment has them: AWS_ENDPOINT_URL, AWS_REGION …",
        )
    return bool(found)


def listing(uri: str) -> dict[str, int]:
    """Parquet files at or below a URI, and their sizes in bytes.

    Raises:
        NoInput, IOFailure: If there is nothing, or the store does not answer.
    """
    from pyarrow import fs

    system, path = _system(uri)
    path = path.rstrip("/")
    with _answers(uri):
        (info,) = system.get_file_info([path])
        if info.is_file:
            return {uri: info.size}
        infos = system.get_file_info(fs.FileSelector(path, recursive=True))
    return {
        joined(uri, info.path.removeprefix(path).lstrip("/")): info.size
        for info in infos
        if info.is_file and info.path.endswith(".parquet") and not _hidden(info.path.removeprefix(path))
    }


def sizes(uris: Sequence[str]) -> dict[str, int]:
    """Those URIs of one folder that are files, and their sizes in bytes."""
    system, _ = _system(uris[0])
    with _answers(uris[0]):
        infos = system.get_file_info([_system(uri)[1] for uri in uris])
    return {uri: info.size for uri, info in zip(uris, infos, strict=True) if info.is_file}


def joined(place: str, name: str) -> str:
    """A file below a folder: a path below a path, or a URI, escaped, below a URI."""
    return f"{place.rstrip('/')}/{quote(os.fsencode(name), safe='/=') if is_uri(place) else name}"


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


@contextmanager
def local(job: Job) -> Iterator[Job]:
    """The job with local paths: what is remote is fetched, and what is made for elsewhere is put there afterwards.

    Raises:
        NoInput, IOFailure: If something cannot be fetched or put.
    """
    if not any(place is not None and is_uri(place) for place in (job.regions, job.mobility, job.out)):
        yield job
        return
    with scratch_folder() as scratch:
        city = hive_city(Path(unquote(job.regions)))  # a name that the tables themselves may not have
        folder = scratch / ("regions" if city is None else f"city={city}")
        folder.mkdir()
        here: dict[str, Any] = {}
        given = {}
        for role, file in (("regions", job.regions), ("mobility", job.mobility)):
            if file is not None and is_uri(file):
                here[role] = str(folder / f"{role}.parquet")
                given[here[role]] = file
                _fetch(file, Path(here[role]))
        if not is_uri(job.out):
            with _told(given):
                yield replace(job, **here, given=given)
            return
        (folder / "out").mkdir()
        out = folder / "out" / job.out.rpartition("/")[2]
        asides = aside_path(out, "regions"), aside_path(out, "mobility")
        beyond = job.out.rpartition("/")[0]
        for result in (out, receipt_path(out), *asides):  # for --resume
            with suppress(NoInput):
                _fetch(f"{beyond}/{result.name}", result)
        before = {result.name: result.stat().st_mtime_ns for result in out.parent.iterdir()}
        with _told(given | {str(out): job.out}):
            yield replace(job, **here, out=str(out), given=given)
        for result in (*asides, out, receipt_path(out)):
            if not result.exists():
                _remove(f"{beyond}/{result.name}")
            elif before.get(result.name) != result.stat().st_mtime_ns:
                _put(result, f"{beyond}/{result.name}")


@contextmanager
def _told(given: Mapping[str, str]) -> Iterator[None]:
    """Let errors name what the user has named, and not what stands for it here."""
    try:
        yield
    except ToptError as error:
        error.file = given.get(error.file or "", error.file)
        raise


def put_text(uri: str, text: str) -> None:
    """Write a small text file."""
    with _answers(uri), _writing(uri) as target:
        target.write(text.encode())


def _fetch(uri: str, file: Path) -> None:
    system, path = _system(uri)
    with _answers(uri), system.open_input_stream(path) as source, file.open("wb") as target:
        _copy(source, target)


def _put(file: Path, uri: str) -> None:
    with _answers(uri), file.open("rb") as source, _writing(uri) as target:
        _copy(source, target)


@contextmanager
def _writing(uri: str) -> Iterator[Any]:
    system, path = _system(uri)
    if not uri.startswith("file:"):
        with system.open_output_stream(path) as target:
            yield target
        return
    # A disk has folders, and shows a file while it is written.
    folder, _, name = path.rpartition("/")
    system.create_dir(folder)
    with system.open_output_stream(f"{folder}/.{name}.part") as target:
        yield target
    system.move(f"{folder}/.{name}.part", path)


def _copy(source: Any, target: Any) -> None:
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)


def _remove(uri: str) -> None:
    system, path = _system(uri)
    with suppress(NoInput), _answers(uri):
        if system.get_file_info([path])[0].is_file:
            system.delete_file(path)


def _system(uri: str) -> tuple[Any, str]:
    from pyarrow import fs

    if uri.startswith("az://"):
        container = uri.removeprefix("az://")
        if "@" not in container.partition("/")[0]:
            if ACCOUNT not in os.environ:
                raise UsageError("names no storage account", file=uri, fix=f"export {ACCOUNT}=NAME")
            container = f"{os.environ[ACCOUNT]}@{container}"
        uri = f"abfs://{container}"
    elif uri.startswith("gs://"):
        uri += f"?retry_limit_seconds={PATIENCE_S}"  # by default a quarter of an hour
    with _answers(uri):
        return fs.FileSystem.from_uri(uri)


@contextmanager
def _answers(uri: str) -> Iterator[None]:
    """Turn a store's errors into the user's."""
    try:
        yield
    except FileNotFoundError as error:
        raise NoInput("no such file or folder", file=uri) from error
    except pa.ArrowInvalid as error:
        raise UsageError(f"not a usable URI ({error})", file=uri) from error
    except (OSError, pa.ArrowException) as error:
        raise IOFailure(
            f"the store does not do it ({error})", file=uri, fix="check name, network and credentials"
        ) from error
