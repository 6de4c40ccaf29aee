"""The reliability tests at full length, and what they counted: ``make reliability``. Half an hour on a quiet machine.

    python dev/benchmarks/reliability.py        # or, of its two parts, only: kill, disk

The tests are those of the suite, with many more kill points and a finer grid of free space; the tables go into
docs/background/reliability.md. dev/benchmarks/batch.py writes its own section there with :func:`write_section`.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import page_sections

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PAGE = ROOT / "docs/background/reliability.md"
TESTS = {
    "kill": ("tests/runtime/test_crash.py", "tests/train/test_crash.py"),
    "disk": ("tests/runtime/test_disk_full.py", "tests/export/test_disk_full.py"),
}


def machine() -> str:
    """Where and when a figure was measured."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{date.today()}, {os.cpu_count()} cores ({names[0] if names else '?'}), Python {platform.python_version()}"


def write_section(name: str, text: str) -> None:
    """Put ``text`` into the page's section of that name."""
    page_sections.write_section(PAGE, name, text)


def main() -> None:
    """Run the tests of the parts that the command line names, or of all, then write their sections."""
    parts = sys.argv[1:] or list(TESTS)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "figures.jsonl"
        environment = os.environ | {"TOPT_RELIABILITY_FIGURES": str(file), "OMP_NUM_THREADS": "1"}
        tests = [test for part in parts for test in TESTS[part]]
        subprocess.run([BIN / "pytest", "--timeout=0", *tests], cwd=ROOT, env=environment, check=True)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    for part, table in (("kill", kills), ("disk", disks)):
        if part in parts:
            write_section(part, table([line for line in lines if line["part"].startswith(part)]))


def kills(lines: list[dict]) -> str:
    """The table of kill points."""
    rows = [
        f"| `{line['command']}` | {'yes' if line['again'] else 'no'} | {line['seconds']:.1f} s |"
        f" {line['idle_s']:.1f} s | {line['kills']} | {line['begun']} |"
        for line in lines
    ]
    total = {key: sum(line[key] for line in lines) for key in ("kills", "begun")}
    return f"""`make reliability`; {machine()}.

| command | older output | uninterrupted | nothing written before | kills | of which something was left behind |
|---|---|---|---|---|---|
{chr(10).join(rows)}
| all | | | | {total["kills"]} | {total["begun"]} |
"""


def disks(lines: list[dict]) -> str:
    """The table of full disks."""
    rows = [f"| {line['command']} | {'yes' if line['again'] else 'no'} | {line['failures']} |" for line in lines]
    return f"""`make reliability`; {machine()}.

| command | older output | sizes of free space at which it failed |
|---|---|---|
{chr(10).join(rows)}
"""


if __name__ == "__main__":
    sys.exit(main())
