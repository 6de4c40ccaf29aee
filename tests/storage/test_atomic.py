import errno
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from topt_deploy.errors import BadData, CannotCreate, Exit, IOFailure, NoInput, NoPermission, TryAgain
from topt_deploy.storage import atomic
from topt_deploy.storage.atomic import atomic_file, atomic_folder, sweep, sweep_folder
from topt_deploy.storage.hashed_file import Held, sha256_bytes, sha256_file
from topt_deploy.storage.os_errors import reading
from topt_deploy.storage.text_files import json_text, write_json, write_text


def names(folder):
    return sorted(file.name for file in folder.iterdir())


class Failed(Exception):
    pass


class TestAtomicFile:
    def test_the_name_appears_only_when_all_is_written(self, tmp_path):
        path = tmp_path / "out.parquet"
        with atomic_file(path) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(".")
            assert temporary.suffix == ".parquet"
            temporary.write_text("new")
            assert not path.exists()
        assert path.read_text() == "new"
        assert names(tmp_path) == ["out.parquet"]

    @pytest.mark.parametrize("error", [Failed(), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, error):
        path = tmp_path / "out.txt"
        path.write_text("old")

        def write():
            with atomic_file(path) as temporary:
                temporary.write_text("half of the n")
                raise error

        expected = IOFailure if isinstance(error, OSError) else type(error)
        with pytest.raises(expected):
            write()
        assert path.read_text() == "old"
        assert names(tmp_path) == ["out.txt"]

    def test_it_is_flushed_before_it_is_renamed(self, tmp_path, monkeypatch):
        done = []
        monkeypatch.setattr(atomic.os, "fsync", lambda descriptor: done.append("fsync"))
        replace = Path.replace
        monkeypatch.setattr(Path, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
        write_text(tmp_path / "out.txt", "new")
        assert done == ["fsync", "rename", "fsync"]  # the file, its name, the folder

    def test_a_missing_folder(self, tmp_path):
        path = tmp_path / "none" / "out.txt"
        with pytest.raises(CannotCreate, match="cannot create this output") as caught:
            write_text(path, "x")
        assert caught.value.exit_code == Exit.CANNOT_CREATE == 73
        for part in (str(path), f"an existing folder {str(path.parent)!r}", "create the folder"):
            assert part in str(caught.value)

    def test_a_file_where_the_folder_should_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CannotCreate):
            write_text(tmp_path / "file" / "out.txt", "x")

    def test_a_folder_of_that_name(self, tmp_path):
        (tmp_path / "out.txt").mkdir()
        with pytest.raises(CannotCreate):
            write_text(tmp_path / "out.txt", "x")
        assert names(tmp_path) == ["out.txt"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_may_not_be_written(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(CannotCreate):
            write_text(tmp_path / "out.txt", "x")

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
    def test_a_refusal_of_the_system_is_not_a_disk_failure(self, tmp_path, monkeypatch, code):
        monkeypatch.setattr(os, "open", lambda *_, **__: raise_os_error(code))
        with pytest.raises(CannotCreate, match=os.strerror(code)):
            write_text(tmp_path / "out.txt", "x")

    def test_a_full_disk_while_writing(self, tmp_path):
        path = tmp_path / "out.txt"
        path.write_text("old")

        def write():
            with atomic_file(path), open("/dev/full", "w") as full:
                full.write("x")

        with pytest.raises(IOFailure, match="No space left on device") as caught:
            write()
        assert caught.value.exit_code == Exit.IO_ERROR == 74
        assert "free space" in caught.value.fix
        assert path.read_text() == "old"
        assert names(tmp_path) == ["out.txt"]

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_full_disk_at_the_end(self, tmp_path, monkeypatch, step):
        path = tmp_path / "out.txt"
        path.write_text("old")
        target = os if step == "fsync" else Path
        monkeypatch.setattr(target, step, lambda *_: raise_os_error(errno.ENOSPC))
        with pytest.raises(IOFailure, match="No space left"):
            write_text(path, "new")
        assert path.read_text() == "old"
        assert names(tmp_path) == ["out.txt"]

    def test_two_writers_do_not_meet(self, tmp_path):
        path = tmp_path / "out.txt"
        with atomic_file(path) as one, atomic_file(path) as two:
            assert one != two
            one.write_text("1")
            two.write_text("2")
        assert path.read_text() == "1"


def raise_os_error(code):
    raise OSError(code, os.strerror(code))


class TestAtomicFolder:
    def make(self, path, content, fail=None):
        with atomic_folder(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "file").write_text(content)
            if fail:
                raise fail

    def test_appears_as_a_whole(self, tmp_path):
        self.make(tmp_path / "b.topt", "new")
        assert (tmp_path / "b.topt" / "sub" / "file").read_text() == "new"
        assert names(tmp_path) == ["b.topt"]

    def test_replaces_the_old_one_with_all_its_files(self, tmp_path):
        self.make(tmp_path / "b.topt", "old")
        (tmp_path / "b.topt" / "left over").write_text("")
        self.make(tmp_path / "b.topt", "new")
        assert names(tmp_path / "b.topt") == ["sub"]
        assert (tmp_path / "b.topt" / "sub" / "file").read_text() == "new"
        assert names(tmp_path) == ["b.topt"]

    @pytest.mark.parametrize(
        ("error", "expected"), [(Failed(), Failed), (OSError(errno.ENOSPC, "No space left"), IOFailure)]
    )
    def test_a_failure_leaves_the_old_one(self, tmp_path, error, expected):
        self.make(tmp_path / "b.topt", "old")
        with pytest.raises(expected):
            self.make(tmp_path / "b.topt", "new", fail=error)
        assert (tmp_path / "b.topt" / "sub" / "file").read_text() == "old"
        assert names(tmp_path) == ["b.topt"]

    def test_a_failed_exchange_leaves_the_old_one(self, tmp_path, monkeypatch):
        self.make(tmp_path / "b.topt", "old")
        monkeypatch.setattr(atomic, "_exchange", lambda *_: raise_os_error(errno.EIO))
        with pytest.raises(IOFailure):
            self.make(tmp_path / "b.topt", "new")
        assert (tmp_path / "b.topt" / "sub" / "file").read_text() == "old"
        assert names(tmp_path) == ["b.topt"]

    def test_a_failed_swap_puts_the_old_one_back(self, tmp_path, monkeypatch):
        self.make(tmp_path / "b.topt", "old")
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
        rename = Path.rename

        def failing(source, target):
            if target == tmp_path / "b.topt" and not source.name.endswith(".old"):
                raise_os_error(errno.EIO)
            return rename(source, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(IOFailure):
            self.make(tmp_path / "b.topt", "new")
        assert (tmp_path / "b.topt" / "sub" / "file").read_text() == "old"
        assert names(tmp_path) == ["b.topt"]

    def test_a_missing_parent(self, tmp_path):
        with pytest.raises(CannotCreate):
            self.make(tmp_path / "none" / "b.topt", "new")

    @pytest.mark.parametrize("at_once", [True, False])
    def test_in_place_of_a_file_no_hidden_copy_stays(self, at_once, tmp_path, monkeypatch):
        if not at_once:
            monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
        (tmp_path / "b.topt").write_text("a zip, perhaps")
        self.make(tmp_path / "b.topt", "new")
        assert names(tmp_path) == ["b.topt"]
        assert names(tmp_path / "b.topt") == ["sub"]

    def test_two_writers_do_not_meet(self, tmp_path):
        with atomic_folder(tmp_path / "b.topt"), pytest.raises(TryAgain):
            self.make(tmp_path / "b.topt", "new")
        assert names(tmp_path) == ["b.topt"]

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names are exchanged at once on Linux alone")
    def test_killed_at_any_instant(self, tmp_path):
        """A process that writes it over and over: after every kill a whole one stands, and the next call tidies up."""
        path, rng = tmp_path / "b.topt", random.Random(0)
        self.make(path, "0")
        seen = set()
        for _ in range(25):
            process = subprocess.Popen([sys.executable, "-c", OVER_AND_OVER, path], stdout=subprocess.PIPE)
            process.stdout.readline()  # the first one stands
            time.sleep(rng.uniform(0, 0.03))
            process.kill()
            process.communicate()
            contents = {(path / name).read_text() for name in ("one", "other")}
            assert len(contents) == 1, "old and new are mixed"
            seen |= contents
        assert len(seen) > 1
        self.make(path, "in the end")
        assert names(tmp_path) == ["b.topt"]

    def test_killed_between_two_renames(self, tmp_path):
        """Where names are not exchanged at once: neither stands, and the next call puts the old one back, even if it
        fails itself."""
        path = tmp_path / "b.topt"
        self.make(path, "old")
        done = subprocess.run([sys.executable, "-c", KILLED_BETWEEN, path])
        assert done.returncode == -signal.SIGKILL
        assert not path.exists()
        with pytest.raises(Failed):
            self.make(path, "new", fail=Failed())
        assert (path / "sub" / "file").read_text() == "old"
        assert names(tmp_path) == ["b.topt"]


OVER_AND_OVER = """
import itertools, sys
from pathlib import Path
from topt_deploy.storage.atomic import atomic_folder
for number in itertools.count(1):
    with atomic_folder(Path(sys.argv[1])) as folder:
        for name in ("one", "other"):
            (folder / name).write_text(str(number))
    print(flush=True)
"""
KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
from topt_deploy.storage import atomic
atomic._exchange = lambda *_: False
rename = Path.rename
def once(source, target):
    rename(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = once
with atomic.atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("new")
"""


class TestReading:
    @pytest.mark.parametrize(
        ("code", "kind", "exit_code"),
        [
            (errno.ENOENT, NoInput, 66),
            (errno.EACCES, NoPermission, 77),
            (errno.EISDIR, BadData, 65),
            (errno.EIO, IOFailure, 74),
        ],
    )
    def test_every_failure_has_its_exit_code(self, code, kind, exit_code):
        with pytest.raises(kind) as caught, reading(Path("some/file")):
            raise_os_error(code)
        assert caught.value.exit_code == exit_code
        assert str(caught.value).startswith("some/file: ")

    def test_other_errors_pass(self):
        with pytest.raises(Failed), reading(Path("x")):
            raise Failed


def test_json_is_readable_and_exact(tmp_path):
    value = {"café": [1, 2.5, None], "b": {"x": "€"}}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "café" in text
    assert text.endswith("}\n")


def test_json_is_indented_and_a_name_that_is_no_utf8_is_escaped():
    assert json_text({"a": [1, {}], "b": "\udcff"}) == '{\n  "a": [\n    1,\n    {}\n  ],\n  "b": "\\udcff"\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"x": value})
    assert names(tmp_path) == []


class TestHeld:
    def test_a_small_file_is_read_once(self, tmp_path):
        (tmp_path / "x").write_bytes(b"what was read")
        held = Held(tmp_path / "x")
        (tmp_path / "x").write_bytes(b"what came later")
        assert held.data == b"what was read"
        assert held.sha256 == sha256_bytes(b"what was read")

    def test_the_hash_stays_that_of_what_was_read_when_the_bytes_are_let_go(self, tmp_path):
        (tmp_path / "x").write_bytes(b"what was read")
        held = Held(tmp_path / "x")
        held.release()
        (tmp_path / "x").write_bytes(b"what came later")
        assert held.data is None
        assert held.sha256 == sha256_bytes(b"what was read")

    def test_a_large_file_stays_on_the_disk(self, tmp_path):
        (tmp_path / "x").write_bytes(b"large")
        held = Held(tmp_path / "x", limit=4)
        assert held.data is None
        assert held.sha256 == sha256_bytes(b"large")

    def test_what_is_no_file(self, tmp_path):
        with pytest.raises(NoInput):
            Held(tmp_path / "none")
        with pytest.raises(NoInput, match="a folder without a part of a table"):
            Held(tmp_path)
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BadData, match="a pipe or a device"):
            Held(tmp_path / "pipe")


def test_sweeping_takes_what_is_left_of_these_files_alone(tmp_path):
    left = [".a.0123456789ab.parquet", ".b.0123456789ab"]
    kept = [".a.0123456789ab.json", ".c.0123456789ab.parquet", ".a.0123456789.parquet", ".a.parquet.lock", "a.parquet"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    sweep(tmp_path / "a.parquet", tmp_path / "b")
    assert names(tmp_path) == sorted(kept)
    sweep_folder(tmp_path)
    assert names(tmp_path) == sorted(kept[2:])


def test_hashes(tmp_path):
    data = os.urandom(100_000)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
    with pytest.raises(NoInput):
        sha256_file(tmp_path / "y")


class TestWhatAKilledProcessLeft:
    """A temporary file is told from a living process's by its lock."""

    def test_goes_when_the_file_is_written_again(self, tmp_path):
        killed = (
            "import os, pathlib\n"
            "from topt_deploy.storage.atomic import atomic_file\n"
            "with atomic_file(pathlib.Path('record.json')) as temporary:\n"
            "    temporary.write_text('half')\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        done = subprocess.run([sys.executable, "-c", killed], cwd=tmp_path)
        assert done.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert left.read_text() == "half"
        write_text(tmp_path / "record.json", "whole")
        assert [file.name for file in tmp_path.iterdir()] == ["record.json"]

    def test_stays_while_its_process_lives(self, tmp_path):
        path = tmp_path / "record.json"
        with atomic_file(path) as temporary:
            temporary.write_text("first")
            write_text(path, "second")
            sweep_folder(tmp_path)
            assert path.read_text() == "second"
        assert path.read_text() == "first"
        assert list(tmp_path.iterdir()) == [path]

    def test_where_there_are_no_locks_nothing_is_swept(self, tmp_path, monkeypatch):
        def refuse(descriptor, operation):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        (tmp_path / ".record.0123456789ab.json").write_text("perhaps somebody's")
        write_text(tmp_path / "record.json", "whole")
        assert len(list(tmp_path.iterdir())) == 2
        assert (tmp_path / "record.json").read_text() == "whole"

    def test_a_file_that_is_swept_before_it_is_locked_is_made_again(self, tmp_path, monkeypatch):
        calls = iter(["swept", "locked"])

        def flock(descriptor, operation):
            if next(calls) == "swept":
                raise BlockingIOError

        monkeypatch.setattr(fcntl, "flock", flock)
        write_text(tmp_path / "record.json", "whole")
        assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
        assert next(calls, None) is None
