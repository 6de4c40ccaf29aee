"""One allocation of a command fails, be it Python's, Arrow's or ONNX Runtime's: it ends as to be tried again, or does
its work all the same, and nothing is torn.

Libraries would end the process by a signal at some places: Arrow and Rust's by SIGABRT, ONNX Runtime where it makes a
session and the tokenizers' regular expressions by SIGSEGV (:mod:`topt_deploy.no_memory`).

``make oom`` tries 200 places of each command; what is here is every so-manieth of them.
"""

import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
from memory_injection import commands, compiled

from topt_deploy.errors import OutOfMemory, shortage

PLACES = int(os.environ.get("TOPT_OOM_PLACES", "8"))
DONE, TRY_AGAIN = 0, 75
LEAST = 0.8
"""Share of places where it ends with the code for it; at the others it could do without."""
COMMANDS = {
    "predict": (
        ("regions.parquet", "mobility.parquet"),
        ["predict", "regions.parquet", "--bundle", "model.topt"],
        ("predictions.receipt.json", "predictions.parquet"),
    ),
    "encode": (
        ("bare.parquet",),
        ["encode", "bare.parquet", "--bundle", "encoder.topt", "--no-cache"],
        ("prompts.parquet",),
    ),
}
ALLOCATORS = {"own": {}, "the system's": {"PYTHONMALLOC": "malloc"}}
"""Python's own allocator asks the system for large pieces only; with the system's, every object is an allocation."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = compiled(tmp_path_factory.mktemp("library"))
    if found is None:
        pytest.skip("needs a C compiler and glibc")
    return found


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("command", COMMANDS)
def test_one_allocation_fails(command, allocator, library, demo_bundle, prompted, tmp_path):
    inputs, arguments, outputs = COMMANDS[command]
    home = demo_bundle.parent if command == "predict" else prompted
    for name in inputs:
        shutil.copy(home / name, tmp_path)
    (tmp_path / arguments[3]).symlink_to(home / arguments[3])
    with commands(library, **ALLOCATORS[allocator]) as topt_run:
        assert topt_run.run(arguments, tmp_path).code == DONE
        whole = sha256(tmp_path / outputs[-1])
        for name in outputs:
            (tmp_path / name).write_bytes(b"old")
        count = topt_run.run(arguments, tmp_path).allocations
        assert count > 10_000
        odd, codes = [], Counter[int]()
        for place in range(PLACES):
            for name in outputs:
                (tmp_path / name).write_bytes(b"old")
            fail_at = int(count * (place + 0.5) / PLACES)
            ended = topt_run.run(arguments, tmp_path, fail_at)
            found = sha256(tmp_path / outputs[-1])
            torn = found not in {whole, sha256(b"old")} or (ended.code == DONE and found != whole)
            left = [file.name for file in tmp_path.iterdir() if file.name.startswith(".") and file.is_file()]
            codes[ended.code] += 1
            if ended.code not in {DONE, TRY_AGAIN} or torn or (left and ended.code == DONE):
                odd.append((fail_at, ended.code, torn, left, ended.told[-800:]))
        assert not odd, f"of {count} allocations: {odd}"
        assert codes[TRY_AGAIN] >= PLACES * LEAST, codes
        print(command, allocator, dict(codes))


@pytest.mark.parametrize(("before", "code"), [("c.malloc(c_size_t(1 << 62))", TRY_AGAIN), ("", -signal.SIGSEGV)])
@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_a_null_pointer_is_want_of_memory_only_after_it(before, code):
    """Else a graph that ends a worker could not be told from a machine that is short."""
    words = f"""
from ctypes import CDLL, c_size_t, string_at
from topt_deploy.no_memory import end_without_memory
c = CDLL(None)
end_without_memory(print)
{before}
string_at(0)
"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert done.returncode == code, done
    assert ("not enough memory" in done.stdout) == bool(before)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_c_code_that_fails_without_a_word():
    """As numpy does in a copy: SystemError says that there was an error, and not which."""
    libc = ctypes.CDLL(None)
    error = SystemError("error return without exception set")
    libc.close(-1)
    assert shortage(error) is None
    libc.malloc(ctypes.c_size_t(1 << 62))
    assert isinstance(shortage(error), OutOfMemory)


def sha256(file):
    return hashlib.sha256(file if isinstance(file, bytes) else file.read_bytes()).hexdigest()
