"""Every command that README.md and docs/ show is run, in the order of the page, on a small city."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from encoders_text import tiny_text

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PAGES = (
    "README.md",
    *("docs/configuration.md", "docs/operations.md", "docs/chicago.md", "docs/evaluation.md", "docs/report.md"),
    "docs/encoder.md",
)
BY_CI = {"make demo", "make test"}
"""Run by .ci/run, whole; not from inside the suite."""
SHORT = ["--set", "srel.epochs=2", "--set", "prompt4re.epochs=2", "--set", "ensemble.epochs=2"]
"""Added to every training, so that the pages run in a minute."""


def commands(page: str) -> list[str]:
    """The lines of the page's bash blocks, without their comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    lines = (line.partition("  #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


@pytest.fixture
def folder(tmp_path: Path, demo_city: Path) -> Path:
    """A folder with a city, and the two clones' names where their data is at hand."""
    for name in ("regions.parquet", "mobility.parquet"):
        shutil.copy(demo_city / name, tmp_path)
    for name in ("HAFusion", "Prompt4RE"):
        if (data := ROOT.parent / "shared/data" / name).exists():
            (tmp_path / name).symlink_to(data)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_run(page: str, folder: Path) -> None:
    shown = [line for line in commands(page) if line not in BY_CI]
    assert shown
    if page == "docs/operations.md":  # begins where a bundle is there
        shown = ["topt-deploy train", "topt-deploy export", *shown]
    if page in ("README.md", "docs/encoder.md"):  # a model of the name, with random weights
        tiny_text(folder / "models/SmolLM2-135M-Instruct")
    if page == "docs/report.md":  # and this one where a run is
        shown = ["topt-deploy train", *shown]
    if page == "docs/configuration.md":
        shown = [line for line in shown if "--resume" not in line]  # test_end_to_end.py interrupts and resumes
    without_data = not (folder / "HAFusion").exists()
    skipped = [line for line in shown if without_data and ("HAFusion" in line or "chicago" in line)]
    for line in shown:
        if line in skipped:
            continue
        arguments = shlex.split(line)
        assert arguments[0] in ("topt-deploy", "topt-run"), f"{page} shows {line!r}: who runs it?"
        if arguments[:2] == ["topt-deploy", "train"]:
            arguments += SHORT
        expanded = [str(p) for a in arguments for p in (sorted(folder.glob(a)) if "*" in a else [a])]
        done = subprocess.run([BIN / expanded[0], *expanded[1:]], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    if skipped:
        pytest.skip(f"../shared/data is absent: {len(skipped)} of {len(shown)} commands were not run")


def test_python_of_the_readme_runs(demo_bundle: Path, demo_city: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    for name in ("regions.parquet", "mobility.parquet"):
        shutil.copy(demo_city / name, tmp_path)
    (tmp_path / "model.topt").symlink_to(demo_bundle)
    script = block + "\nassert len(predictions) > 0 and 'prediction' in predictions.column_names\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_configuration_file_of_the_page_is_valid(tmp_path: Path) -> None:
    from topt_deploy.config import load_config

    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```", page, re.S | re.M)
    (tmp_path / "topt.toml").write_text(block, encoding="utf-8")
    config = load_config(file=tmp_path / "topt.toml")
    assert list(config.tasks) == ["noise_complaints"]
    assert config.tasks["noise_complaints"].ensemble.epochs == 300


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
