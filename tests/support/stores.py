"""Object stores on this machine: emulators of S3, Google's and Azure's. Imports no torch."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import PATIENCE_S
from pyarrow import fs
from services import service

BUCKET = "bucket"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's, the same everywhere: no secret."""
PROGRAMS = {
    "s3": "stores/bin/moto_server",
    "gs": "stores/bin/gcp-storage-emulator",
    "az": "azurite/node_modules/.bin/azurite-blob",
}


@dataclass(frozen=True, kw_only=True)
class Store:
    """A running store.

    Attributes:
        root: The URI of what is in its bucket, without settings.
        settings: What goes behind every URI.
        environment: What a command needs besides.
        system: The store for tests themselves.
        refused: An environment, or settings, with which it lets nobody in; None where it always does.
    """

    root: str
    settings: str
    system: Any
    environment: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] | None = None

    def uri(self, path: str) -> str:
        return f"{self.root}/{path}{self.settings}"

    def put(self, folder: Path, path: str) -> None:
        """Copy a folder into the bucket."""
        for file in folder.rglob("*"):
            if file.is_file():
                with self.system.open_output_stream(f"{BUCKET}/{path}/{file.relative_to(folder).as_posix()}") as target:
                    target.write(file.read_bytes())

    def get(self, path: str, folder: Path) -> None:
        """Copy what is in the bucket below a path into a folder."""
        for info in self.system.get_file_info(fs.FileSelector(f"{BUCKET}/{path}", recursive=True)):
            if info.is_file:
                file = folder / info.path.removeprefix(f"{BUCKET}/{path}/")
                file.parent.mkdir(parents=True, exist_ok=True)
                with self.system.open_input_stream(info.path) as source:
                    file.write_bytes(source.read())

    def write(self, path: str, data: bytes) -> None:
        with self.system.open_output_stream(f"{BUCKET}/{path}") as target:
            target.write(data)

    def delete(self, path: str) -> None:
        self.system.delete_file(f"{BUCKET}/{path}")


@contextmanager
def running(kind: str, folder: Path) -> Iterator[Store]:
    """A store, and its end; what it says goes into ``folder``. Skips where the emulator is not installed."""
    with {"s3": _s3, "gs": _gs, "az": _az}[kind](folder) as store:
        yield store


@contextmanager
def _s3(folder: Path) -> Iterator[Store]:
    with (
        _process("s3", folder, "-H", "127.0.0.1") as port,
        _process("s3", folder, "-H", "127.0.0.1", INITIAL_NO_AUTH_ACTION_COUNT="0") as strict,
    ):
        keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "eu-north-1"}
        system = fs.S3FileSystem(
            access_key="none", secret_key="none", region="eu-north-1", scheme="http",
            endpoint_override=f"127.0.0.1:{port}", allow_bucket_creation=True,
        )  # fmt: skip
        system.create_dir(BUCKET)
        yield Store(
            root=f"s3://{BUCKET}",
            settings=f"?endpoint_override=127.0.0.1:{port}&scheme=http",
            system=system,
            environment=keys | {"AWS_EC2_METADATA_DISABLED": "true"},
            refused={"settings": f"?endpoint_override=127.0.0.1:{strict}&scheme=http"},
        )


@contextmanager
def _gs(folder: Path) -> Iterator[Store]:
    options = ("start", "--host=localhost", "--in-memory", f"--default-bucket={BUCKET}")
    with _process("gs", folder, *options, port_option="--port={}") as port:
        system = fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=f"localhost:{port}")
        settings = f"?endpoint_override=localhost:{port}&scheme=http&retry_limit_seconds=10"
        yield Store(root=f"gs://anonymous@{BUCKET}", settings=settings, system=system)


@contextmanager
def _az(folder: Path) -> Iterator[Store]:
    options = ("--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck")
    with _process("az", folder, *options, port_option="--blobPort={}") as port:
        place = {f"{part}_storage_authority": f"127.0.0.1:{port}" for part in ("blob", "dfs")}
        place |= {f"{part}_storage_scheme": "http" for part in ("blob", "dfs")}
        system = fs.AzureFileSystem(ACCOUNT, account_key=KEY, **place)
        system.create_dir(BUCKET)
        keys = {"AZURE_STORAGE_ACCOUNT": ACCOUNT, "AZURE_STORAGE_KEY": KEY}
        yield Store(
            root=f"az://{BUCKET}",
            settings="?" + "&".join(f"{name}={value}" for name, value in place.items()),
            system=system,
            environment=keys,
            refused={**keys, "AZURE_STORAGE_KEY": "bm9uZQ=="},
        )


@contextmanager
def _process(kind: str, folder: Path, *options: str, port_option: str = "-p{}", **more: str) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [service(PROGRAMS[kind]), *options, port_option.format(port)]
    with (folder / f"{kind}-{port}.txt").open("w") as said:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | more, stdout=said, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + PATIENCE_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, (folder / f"{kind}-{port}.txt").read_text()
            assert time.monotonic() < end, f"{command} does not answer"
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()
