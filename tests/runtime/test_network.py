"""No network: strace sees every system call of ``topt-run predict`` and ``encode``, and of a batch's workers."""

import re
import shutil
from pathlib import Path

import pytest
from commands import Desk, shell

# What remains is within the machine: the pair of connected sockets that multiprocessing makes for a pipe of two
# directions, and what goes through them by calls of their own; there is no other socket that they could be used on.
WITHIN = re.compile(r"(socketpair\(AF_UNIX|(sendmsg|recvmsg|sendto|recvfrom|shutdown|getsockname|getsockopt)\()")
QUIET = {"ORT_DISABLE_TELEMETRY", "CI", "ORT_RUNNING_UNIT_TESTS"}
"""Whatever else would keep ONNX Runtime from the network is not to help here."""


@pytest.fixture
def network_calls(tmp_path: Path):
    """Run a command, and return its network calls that could leave the machine, of all its processes."""
    if shutil.which("strace") is None:
        pytest.skip("no strace on this machine: apt-get install strace")

    def call(command: str, folder: Path) -> list[str]:
        trace = tmp_path / "trace"
        unset = " ".join(f"-u {name}" for name in sorted(QUIET))
        said = shell(f"env {unset} strace -f -qq -e trace=network -e signal=none -o {trace} {command}", folder)
        if "ptrace" in said.err and not trace.exists():
            pytest.skip("strace may not trace here (ptrace is forbidden)")
        assert said.code == 0, said
        calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
        return [c for c in calls if not c.startswith("<...") and not WITHIN.match(c)]

    return call


def test_strace_would_see_them(network_calls, tmp_path):
    (tmp_path / "ask.py").write_text("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n")
    assert any("AF_INET" in call for call in network_calls("python ask.py", tmp_path))


def test_predict(network_calls, desk: Desk):
    assert network_calls("topt-run predict regions.parquet", desk.folder) == []


def test_many_cities(network_calls, desk: Desk):
    for name in ("a", "b", "c"):
        (desk.folder / "cities" / name).mkdir(parents=True)
        for file in (desk.regions, desk.mobility):
            shutil.copy(file, desk.folder / "cities" / name)
    assert network_calls("topt-run predict cities --out out --workers 2 --bundle model.topt", desk.folder) == []


def test_encode(network_calls, pictured: Path, tmp_path: Path):
    shutil.copytree(pictured, tmp_path / "city")
    assert network_calls("topt-run encode . --bundle encoder.topt --no-cache", tmp_path / "city") == []


def test_a_process_that_stays(network_calls, desk: Desk):
    """What a library does later on, in threads of its own, as ONNX Runtime's telemetry would after some seconds."""
    (desk.folder / "stay.py").write_text(
        "import time\nfrom topt_deploy.runtime import load\n"
        "predictor = load('model.topt')\n"
        "predictor.predict(*map(__import__('pathlib').Path, ('regions.parquet', 'mobility.parquet')))\n"
        "time.sleep(8)\n"
    )
    assert network_calls("python stay.py", desk.folder) == []
