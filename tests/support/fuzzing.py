"""What a fuzz target may do, and the two that feed it: hypothesis, and atheris in a process of its own.

A target is a module of tests/fuzz with ``seeds()``, sound inputs as bytes, and ``target(data)``, which may raise a
:class:`~topt_deploy.errors.ToptError` and nothing else. ``python fuzzing.py FILE SECONDS`` runs atheris on one.
"""

import atexit
import copy
import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from commands import PATIENCE_S

SECONDS = int(os.environ.get("TOPT_FUZZ_SECONDS", "2"))
"""Of atheris per target; ``make fuzz`` gives it a minute."""
MEMORY_MB = 2048
RECORDS = int(os.environ.get("TOPT_FUZZ_RECORDS", "300"))
"""Manifests that :func:`altered` makes of each kind; ``make fuzz`` makes a million."""
SCRATCH = "TOPT_FUZZ_SCRATCH"
"""Names the place of :func:`scratch` to atheris' process, which ends without removing anything."""
ODD = (
    None, True, False, 0, 1, -1, 3, 1 << 31, 1 << 63, -(1 << 63), 1 << 80, 0.0, -0.5, 1e-9, 1e300, float("nan"),
    float("inf"), "", "a", "/etc/hostname", "../x", "\0", "fp32", "0" * 64, "é" * 300, [], [0], [[]], {},
    {"": None}, {"a": 1},
)  # fmt: skip
"""Values that some code or other has not thought of."""


@functools.cache
def scratch() -> Path:
    """A folder for what a target writes before each call, in memory where the system has a place for that."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.TemporaryDirectory(prefix="fuzz-", dir=os.environ.get(SCRATCH, memory))
    atexit.register(folder.cleanup)
    return Path(folder.name)


@contextmanager
def held_in_memory(files: Mapping[str, bytes]) -> Iterator[None]:
    """Have whatever sealed folder is opened hold these files: reading a manifest from a disk takes longer than checking
    it, and what a disk's files may do is tested in tests/attacks."""
    from topt_deploy.bundle import sealed

    class Held:
        def __init__(self, path: Path, inside: str = "") -> None:
            pass

        def __enter__(self) -> "Held":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def sizes(self) -> dict[str, int]:
            return {name: len(data) for name, data in files.items()}

        def read(self, name: str, limit: int) -> bytes:
            return files[name][: limit + 1]

        def digest(self, name: str, limit: int) -> str:
            return hashlib.sha256(self.read(name, limit)).hexdigest()

    plain = sealed.Archive
    sealed.Archive = Held  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        sealed.Archive = plain  # type: ignore[misc]


def sealed_manifest(data: bytes) -> dict[str, bytes]:
    """A manifest and its seal."""
    from topt_deploy.bundle.sealed import MANIFEST, SEAL

    return {MANIFEST: data, SEAL: f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode()}


def contained(target: Callable[[bytes], object], data: bytes) -> None:
    """Call a target; only the documented errors may leave it."""
    from topt_deploy.errors import Exit, ToptError

    try:
        target(data)
    except ToptError as error:
        if error.exit_code in (Exit.BUG, Exit.DONE) or not str(error):
            raise AssertionError("no error for a user") from error


def mutations(seeds: Sequence[bytes]) -> Any:
    """Strategy: a seed with a few of its bytes overwritten, taken out or put in."""
    from hypothesis import strategies as st

    def edited(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
        data = bytearray(seed)
        for position, length, new in edits:
            start = position % (len(data) + 1)
            data[start : start + length] = new
        return bytes(data)

    edit = st.tuples(st.integers(0, 1 << 20), st.integers(0, 8), st.binary(max_size=8))
    return st.builds(edited, st.sampled_from(list(seeds)), st.lists(edit, max_size=4))


def altered(text: str, random: Random) -> Any:
    """A record in which up to three values, at any depth, are replaced, taken out, put in or moved about.

    Args:
        text: The record, as JSON: it is parsed in a sixth of the time that a deep copy takes.
        random: What decides.
    """
    record = json.loads(text)
    for _ in range(random.randint(1, 3)):
        place = record
        while place:
            key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and place[key] and random.random() < 0.8:
                place = place[key]
                continue
            deed = random.random()
            if deed < 0.15:
                del place[key]
            elif deed < 0.25:
                place[key] = copy.deepcopy(random.choice(list(record.values())))
            elif deed < 0.35 and isinstance(place, dict):
                place[random.choice(["", "x", f"{key}2"])] = place[key]
            else:
                place[key] = copy.deepcopy(random.choice(ODD))
            break
    return record


def contained_records(record: Any, target: Callable[[bytes], object]) -> None:
    """Call a target with :data:`RECORDS` altered records, the same ones each time."""
    text = json.dumps(record)
    for number in range(RECORDS):
        data = json.dumps(altered(text, Random(number))).encode()
        try:
            contained(target, data)
        except BaseException:
            print(f"record {number}: {data.decode()}")
            raise


def guided(file: str) -> None:
    """Run atheris on a target's file, as long as the environment says."""
    import pytest

    pytest.importorskip("atheris", reason="atheris is not installed (wheels for Linux only)")
    # By way of a shell that stays: a process begins with its parent's highest memory, which libFuzzer has a limit for.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, __file__, file, str(SECONDS)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS + PATIENCE_S,
        env=os.environ | {SCRATCH: str(scratch())},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def main(file: str, seconds: str) -> None:
    """Atheris, with the target's package instrumented."""
    import atheris

    with atheris.instrument_imports(include=["topt_deploy"]):
        spec = importlib.util.spec_from_file_location("fuzzed", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(module.seeds()):
            (Path(folder) / str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY_MB}", "-timeout=20", "-max_len=65536"]
        atheris.Setup(
            [sys.argv[0], folder, *options, f"-artifact_prefix={folder}/"], lambda data: contained(module.target, data)
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
