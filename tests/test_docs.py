"""Every command that README.md and docs/ show is run, in the order of the page, on a small city."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import environment
from encoders_text import tiny_text

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PAGES = (
    "README.md",
    *("docs/configuration.md", "docs/operations.md", "docs/chicago.md", "docs/evaluation.md", "docs/report.md"),
    *("docs/encoder.md", "docs/batch.md", "docs/security.md", "docs/devices.md", "docs/tensorrt.md"),
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


def exit_codes(page: str) -> dict[str, int]:
    """The commands that the page says end with another code than 0."""
    found = re.findall(r"^(\S.*?)  # exit code (\d+)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
    return {line: int(code) for line, code in found}


def with_cities(folder: Path) -> None:
    """What docs/batch.md begins with: cities, and a table with a bad row."""
    for name in ("A", "B1"):
        city = folder / "cities" / f"city={name}"
        city.mkdir(parents=True)
        for table in ("regions.parquet", "mobility.parquet"):
            shutil.copy(folder / table, city)
    table = pq.read_table(folder / "regions.parquet")
    counts = [-1, *table.column("poi_food").to_pylist()[1:]]
    table = table.set_column(table.schema.get_field_index("poi_food"), "poi_food", pa.array(counts))
    pq.write_table(table, folder / "doubtful.parquet")
    (folder / "doubtful").mkdir()


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
def test_commands_of_the_page_run(page: str, folder: Path, request: pytest.FixtureRequest) -> None:
    shown = [line for line in commands(page) if line not in BY_CI]
    assert shown
    if page == "docs/operations.md":  # begins where a bundle is there
        shown = ["topt-deploy train", "topt-deploy export", *shown]
    if page in ("README.md", "docs/encoder.md"):  # a model of the name, with random weights
        tiny_text(folder / "models/SmolLM2-135M-Instruct")
    if page in ("docs/report.md", "docs/tensorrt.md"):  # and these where a run is
        shown = ["topt-deploy train", *shown]
    if page == "docs/configuration.md":
        shown = [line for line in shown if "--resume" not in line]  # test_end_to_end.py interrupts and resumes
    if page == "README.md":
        with_cities(folder)
    if page == "docs/security.md":  # begins where a bundle and keys are there
        shutil.copytree(request.getfixturevalue("demo_bundle"), folder / "model.topt")
        for line in re.findall("^openssl .*$", (ROOT / page).read_text(), re.MULTILINE):
            subprocess.run(shlex.split(line), cwd=folder, check=True, capture_output=True)
    if page == "docs/devices.md":  # begins where a bundle is there
        shutil.copytree(request.getfixturevalue("demo_bundle"), folder / "model.topt")
    if page == "docs/batch.md":  # begins where a run and a bundle are there
        with_cities(folder)
        shutil.copytree(request.getfixturevalue("demo_bundle"), folder / "model.topt")
        (folder / "runs").symlink_to(request.getfixturevalue("demo_run").parent)
    without_data = not (folder / "HAFusion").exists()
    skipped = [line for line in shown if without_data and ("HAFusion" in line or "chicago" in line)]
    absent = [engine for engine, module in (("ray", "ray"), ("spark", "pyspark")) if find_spec(module) is None]
    engineless = [line for line in shown if line.partition("--engine ")[2].split(" ")[0] in absent]
    codes = exit_codes(page)
    for line in shown:
        if line in skipped or line in engineless:
            continue
        arguments = shlex.split(line)
        assert arguments[0] in ("topt-deploy", "topt-run"), f"{page} shows {line!r}: who runs it?"
        if arguments[:2] == ["topt-deploy", "train"]:
            arguments += SHORT
        quoted = "'" in line
        expanded = [str(p) for a in arguments for p in (sorted(folder.glob(a)) if "*" in a and not quoted else [a])]
        done = subprocess.run([BIN / expanded[0], *expanded[1:]], cwd=folder, capture_output=True, text=True)
        assert done.returncode == codes.get(line, 0), f"{line}\n{done.stdout}{done.stderr}"
    if skipped:
        pytest.skip(f"../shared/data is absent: {len(skipped)} of {len(shown)} commands were not run")
    if engineless:
        pytest.skip(f"not installed: {', '.join(absent)}; {len(engineless)} of {len(shown)} commands were not run")


def test_python_of_the_readme_runs(demo_bundle: Path, demo_city: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    for name in ("regions.parquet", "mobility.parquet"):
        shutil.copy(demo_city / name, tmp_path)
    (tmp_path / "model.topt").symlink_to(demo_bundle)
    script = block + "\nassert len(predictions) > 0 and 'prediction' in predictions.column_names\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("mlflow") is None or find_spec("pandas") is None, reason="mlflow or pandas is absent")
def test_python_of_the_batch_page_runs(demo_bundle: Path, folder: Path) -> None:
    from topt_deploy.export.mlflow_model import write_mlflow

    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/batch.md").read_text(encoding="utf-8"), re.S | re.M)
    write_mlflow(folder / "registered", demo_bundle)
    script = block + "\nassert len(predictions) == 3 * len(regions) and predictions.prediction.notna().all()\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment(MLFLOW_DISABLE_TELEMETRY="true"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_batch_page_lists_every_reason_code() -> None:
    """Those that the code can raise, by table and by whether a neutral value can stand in, and no other."""
    raised: dict[str, bool] = {}
    for file in [*(ROOT / "topt_deploy").rglob("*.py"), *(ROOT / "runtime").rglob("*.py")]:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
            if name not in ("refuse", "BadRows"):
                continue
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            code = keywords["code"] if name == "BadRows" else call.args[2]
            if isinstance(code, ast.Constant):  # else it passes another one's on
                raised[code.value] = "fill" in keywords
    page = (ROOT / "docs/batch.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (?:regions|mobility|both) \| .* \| (yes|no|–)[^|]* \|$", page, re.M)
    assert {code: can == "yes" for code, can in listed} == raised


def test_alerts_of_the_batch_page_are_on_metrics_that_there_are() -> None:
    yaml = pytest.importorskip("yaml")
    from topt_deploy.runtime.batch.summary import Summary

    page = (ROOT / "docs/batch.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.S | re.M)
    rules = [rule for group in yaml.safe_load(block)["groups"] for rule in group["rules"]]
    families = set(re.findall(r"^# TYPE (\S+) gauge$", Summary().metrics(0), re.M))
    assert len(rules) == 4
    for rule in rules:
        named = set(re.findall(r"topt_run_\w+", rule["expr"]))
        assert named
        assert named <= families
    described = page[page.index("`--metrics-file` is for") : page.index("```yaml")]
    assert set(re.findall(r"topt_run_\w+", described)) == families


def test_configuration_file_of_the_page_is_valid(tmp_path: Path) -> None:
    from topt_deploy.config.settings import load_config

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
