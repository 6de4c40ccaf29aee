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
from urllib.parse import parse_qsl, quote, unquote

import pyarrow as pa

from topt_deploy.data.city import hive_city
from topt_deploy.errors import CannotCreate, IOFailure, NoInput, NoPermission, ToptError, UsageError
from topt_deploy.storage.atomic import atomic_file
from topt_deploy.storage.os_errors import writing
from topt_deploy.storage.scratch import scratch_folder
from topt_deploy.storage.table_parts import part_names

from ..addresses import is_uri, joined, parted, shown
from ..predict_city import CityJob
from ..receipt import aside_path, receipt_path

ACCOUNT, KEY, SAS_TOKEN = "AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"
DENIED = (
    "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "PERMISSION_DENIED", "UNAUTHENTICATED",
    "AuthorizationFailure", "AuthenticationFailed", "AuthorizationPermissionMismatch",
)  # fmt: skip
"""Codes of refused access in Arrow's messages: there is no other sign of it."""
ABSENT = ("NO_SUCH_BUCKET", "ContainerNotFound", "No such file or directory")
CHUNK_BYTES = 1 << 22
PATIENCE_S = 60


def listing(uri: str) -> dict[str, int]:
    """Parquet files at or below a URI, by their own URIs without settings, and their sizes in bytes.

    Raises:
        NoInput, IOFailure: If there is nothing, or the store does not answer.
    """
    from pyarrow import fs

    system, path = _system(uri)
    path = path.rstrip("/")
    with _answers(uri):
        (info,) = system.get_file_info([path])
        if info.is_file:
            return {parted(uri)[0]: info.size}
        infos = system.get_file_info(fs.FileSelector(path, recursive=True))
    uri = parted(uri)[0]
    return {
        joined(uri, info.path.removeprefix(path).lstrip("/")): info.size
        for info in infos
        if info.is_file and info.path.endswith(".parquet") and not _hidden(info.path.removeprefix(path))
    }


def sizes(uris: Sequence[str], settings: str) -> dict[str, int]:
    """Those URIs of one folder, without their settings, that exist, and their sizes in bytes; folders end in "/"."""
    from pyarrow import fs

    system, _ = _system(uris[0] + settings)
    with _answers(uris[0]):
        infos = system.get_file_info([_system(uri + settings)[1] for uri in uris])
    found = {uri: info.size for uri, info in zip(uris, infos, strict=True) if info.is_file}
    folders = (uri for uri, info in zip(uris, infos, strict=True) if info.type == fs.FileType.Directory)
    return found | {f"{uri.rstrip('/')}/": 0 for uri in folders}


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


@contextmanager
def local(job: CityJob) -> Iterator[CityJob]:
    """The job with local paths: what is remote is fetched, and what is made for elsewhere is put there afterwards.

    Raises:
        NoInput, IOFailure: If something cannot be fetched or put.
    """
    if not any(place is not None and is_uri(place) for place in (job.regions, job.mobility, job.out)):
        yield job
        return
    with scratch_folder() as scratch:
        city = hive_city(
            Path(unquote(parted(job.regions)[0]) + "part")
        )  # a name that the tables themselves may not have
        folder = scratch / ("regions" if city is None else f"city={quote(city, safe='')}")
        folder.mkdir()
        here: dict[str, Any] = {}
        given = {}
        for role, file in (("regions", job.regions), ("mobility", job.mobility)):
            if file is not None and is_uri(file):
                here[role] = str(folder / f"{role}.parquet")
                given[here[role]] = shown(file)
                _fetch(file, Path(here[role]))
        if not is_uri(job.out):
            with _told(given):
                yield replace(job, **here, given=given)
            return
        (folder / "out").mkdir()
        place, settings = parted(job.out)
        beyond, _, name = place.rpartition("/")
        out = folder / "out" / name
        asides = aside_path(out, "regions"), aside_path(out, "mobility")
        for result in (out, receipt_path(out), *asides):  # for --resume
            with suppress(NoInput):
                _fetch(f"{beyond}/{result.name}{settings}", result)
        before = {result.name: result.stat().st_mtime_ns for result in out.parent.iterdir()}
        with _told(given | {str(out): shown(job.out)}):
            yield replace(job, **here, out=str(out), given=given)
        for result in (*asides, out, receipt_path(out)):
            if not result.exists():
                _remove(f"{beyond}/{result.name}{settings}")
            elif before.get(result.name) != result.stat().st_mtime_ns:
                _put(result, f"{beyond}/{result.name}{settings}")


@contextmanager
def _told(given: Mapping[str, str]) -> Iterator[None]:
    """Let errors name what the user has named, and not what stands for it here."""
    try:
        yield
    except ToptError as error:
        for here, there in given.items():
            if error.file is not None and (error.file == here or error.file.startswith(f"{here}/")):  # or one of parts
                error.file = there.rstrip("/") + error.file.removeprefix(here)
                break
        raise


def put_text(uri: str, text: str) -> None:
    """Write a small text file."""
    with _answers(uri, to_write=True), _writing(uri) as target:
        target.write(text.encode())


def _fetch(uri: str, file: Path) -> None:
    """Fetch a table: a file, or the parts in a folder whose URI ends in "/"."""
    from pyarrow import fs

    system, path = _system(uri)
    if parted(uri)[0].endswith("/"):
        with _answers(uri):
            inside = system.get_file_info(fs.FileSelector(path.rstrip("/")))
        files, folders = ([info.base_name for info in inside if info.is_file is kind] for kind in (True, False))
        file.mkdir()
        for name in part_names(shown(uri), files, folders):
            _fetch(joined(uri, name), file / name)
        return
    with _answers(uri), system.open_input_stream(path) as source, file.open("wb") as target:
        _copy(source, target)


def _put(file: Path, uri: str) -> None:
    with _answers(uri, to_write=True), file.open("rb") as source, _writing(uri) as target:
        _copy(source, target)


@contextmanager
def _writing(uri: str) -> Iterator[Any]:
    system, path = _system(uri)
    if not uri.startswith("file:"):
        with system.open_output_stream(path) as target:
            yield target
        return
    # A disk has folders, shows a file while it is written, and may have links where one is to be.
    file = Path(path)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary, temporary.open("wb") as target:
        yield target


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

    if "\0" in unquote(uri):
        raise UsageError(
            "not a usable URI", file=shown(uri), found="a zero byte", expected="a name that files may have"
        )
    if uri.startswith("az://"):
        return _azure(uri)
    if uri.startswith("gs://") and "retry_limit_seconds=" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={PATIENCE_S}"  # by default a quarter of an hour
    with _answers(uri):
        return fs.FileSystem.from_uri(uri)


def _azure(uri: str) -> tuple[Any, str]:
    """Azure's by its container, with a key or token from the environment, where there is one: Arrow takes none from
    there, and else logs in as its libraries do by default."""
    from pyarrow import fs

    place, settings = parted(uri)
    account, _, path = place.removeprefix("az://").rpartition("@")
    account = account or os.environ.get(ACCOUNT, "")
    if not account:
        raise UsageError("names no storage account", file=shown(uri), fix=f"export {ACCOUNT}=NAME")
    secrets = {"account_key": os.environ.get(KEY), "sas_token": os.environ.get(SAS_TOKEN)}
    with _answers(uri):
        try:
            system = fs.AzureFileSystem(account, **dict(parse_qsl(settings.removeprefix("?"))), **secrets)
        except TypeError as error:
            raise UsageError(
                "has settings that Azure does not know", file=shown(uri), found=settings.partition("=")[0],
                expected="blob_storage_authority, blob_storage_scheme, dfs_storage_authority, dfs_storage_scheme",
            ) from error  # fmt: skip
    return system, unquote(path)


@contextmanager
def _answers(uri: str, *, to_write: bool = False) -> Iterator[None]:
    """Turn a store's errors into the user's."""
    place = shown(uri)
    try:
        yield
    except pa.ArrowInvalid as error:
        raise UsageError(f"not a usable URI ({error})", file=place) from error
    except (OSError, pa.ArrowException) as error:
        reason = str(error)
        if any(word in reason for word in DENIED):
            raise NoPermission(
                f"the object store refused access ({reason})", file=place, fix="check credentials, and what they allow"
            ) from error
        if isinstance(error, FileNotFoundError) or any(word in reason for word in ABSENT):
            if to_write:
                raise CannotCreate("no such bucket or folder", file=place, fix="create it, or name another") from error
            raise NoInput("no such file or folder", file=place) from error
        raise IOFailure(
            f"the object store failed ({reason})", file=place, fix="check name, network and credentials"
        ) from error
