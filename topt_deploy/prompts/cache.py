"""Prompt vectors by the hash of everything that they depend on, in one file that several processes may share."""

import errno
import hashlib
import json
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.errors import BadData, NoPermission
from topt_deploy.storage.hashed_file import sha256_bytes
from topt_deploy.storage.os_errors import write_error

Array = np.ndarray[Any, Any]

APPLICATION = 0x746F7054
"""The application id in SQLite's header: "topT"."""
WAIT_S = 60.0
ROW_LIMIT_BYTES = 1 << 24
"""Of a key or a vector: many times the widest."""
TABLE = "CREATE TABLE vectors (key TEXT PRIMARY KEY, vector BLOB, checksum BLOB)"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_AT_ONCE = 500  # keys per query; SQLite does not take more than 999 everywhere
_NO_PLACE = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM}
_NO_LUCK = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


def content_key(**facts: Any) -> str:
    """SHA-256, in hexadecimal, of plain facts: the same for the same facts in whatever order they are given."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_bytes(text.encode())


def check_own(path: Path) -> None:
    """Refuse a cache that somebody else may have written: predictions would be made of what they like.

    The folder counts as well as the file: whoever may write to it can put another file there.

    Raises:
        NoPermission: Naming what is not this user's alone.
    """
    for place, kind, name in ((path.parent, stat.S_ISDIR, "folder"), (path, stat.S_ISREG, "file")):
        try:
            facts = os.lstat(place)
        except OSError:
            continue  # made later, or told of when it is opened
        if name == "file" and stat.S_ISDIR(facts.st_mode):
            continue  # told of when it is opened
        if not kind(facts.st_mode):
            found = "a link or a special file"
        elif facts.st_uid != os.geteuid():
            found = f"one of user {facts.st_uid}"
        elif facts.st_mode & _OTHERS_MAY_WRITE:
            found = f"one that others may write to (mode {stat.S_IMODE(facts.st_mode):o})"
        else:
            continue
        raise NoPermission(
            "the cache of prompt vectors is not this user's alone", file=place, found=found,
            expected=f"a {name} of user {os.geteuid()}",
            fix="delete it, and it is made anew; or go without: --no-cache",
        )  # fmt: skip


class Cache:
    """Vectors in an SQLite file, to be used as a context manager; made where absent.

    A vector is there as a whole or not at all, whatever happens while it is written.

    Args:
        path: The file.
        wait_s: How long to wait for another process that is writing.

    Raises:
        BadData: If the file is something else, or damaged.
        NoPermission: If it is not this user's alone.
        CannotCreate, IOFailure: If it cannot be written to, or not in time.
    """

    def __init__(self, path: Path, *, wait_s: float = WAIT_S) -> None:
        self._path = path
        check_own(path)
        with self._errors():
            self._database = sqlite3.connect(path, timeout=wait_s, isolation_level=None)
            self._database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, ROW_LIMIT_BYTES)
            self._database.execute("PRAGMA trusted_schema = OFF")
            self._database.execute("PRAGMA cell_size_check = ON")
        self._database.text_factory = lambda text: text.decode(errors="replace")  # a damaged key is no key of ours
        try:
            with self._writing():
                self._open()
        except BaseException:
            self._database.close()
            raise

    def _open(self) -> None:
        (application,) = self._database.execute("PRAGMA application_id").fetchone()
        schema = self._database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT 9").fetchall()
        tables = len(schema)
        if application != APPLICATION and (application or tables):
            raise self._foreign("a database of something else")
        if not tables:
            self._database.execute(f"PRAGMA application_id = {APPLICATION}")
            self._database.execute(TABLE)
        elif sorted((kind, sql) for kind, _, _, sql in schema) != [("index", None), ("table", TABLE)]:
            raise self._foreign("it has other tables than a cache")  # a view may never end, a trigger do anything

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def get(self, keys: Iterable[str], *, width: int | None = None) -> dict[str, Array]:
        """The vectors that are there, float32 (H,) each; one that is damaged, or not of this width H, is not."""
        wanted = list(keys)
        found = {}
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            query = f"SELECT key, vector, checksum FROM vectors WHERE key IN ({','.join('?' * len(some))})"
            with self._errors():
                rows = self._database.execute(query, some).fetchall()
            for key, data, checksum in rows:
                sound = isinstance(data, bytes) and isinstance(key, str) and len(data) % 4 == 0
                sound = sound and width in (None, len(data) // 4)
                if sound and checksum == _checksum(key, data):
                    found[key] = np.frombuffer(data, "<f4").astype(np.float32)
        return found

    def put(self, vectors: Mapping[str, Array]) -> None:
        """Store vectors (H,) by key as float32, all of them or none, in place of those that are there."""
        data = {key: vector.astype("<f4").tobytes() for key, vector in vectors.items()}
        rows = [(key, vector, _checksum(key, vector)) for key, vector in data.items()]
        with self._writing():
            self._database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        # IMMEDIATE waits for its turn; a transaction that only later turns out to write may be refused at once.
        with self._errors(), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code is None:
                raise  # not SQLite's own: a call of ours is wrong
            primary = code & 0xFF
            if primary in _NO_PLACE | _NO_LUCK:
                number = errno.EACCES if primary in _NO_PLACE else errno.EIO
                failed = write_error(self._path, OSError(number, f"{error}, the cache of prompt vectors"))
                failed.fix = f"{failed.fix}; or go without a cache: --no-cache"
                raise failed from error
            raise self._foreign(str(error)) from error

    def _foreign(self, reason: str) -> BadData:
        return BadData(
            f"not a cache of prompt vectors ({reason})",
            file=self._path,
            expected="a file that an earlier run made, or none",
            fix="name another file, or delete this one if it was a cache: it is then filled anew",
        )


def _checksum(key: str, data: bytes) -> bytes:
    """Of the key as well: a vector under another's key is a damaged one."""
    return hashlib.sha256(key.encode() + b"\0" + data).digest()
