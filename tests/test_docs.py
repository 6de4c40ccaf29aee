"""The documentation: every command and Python snippet is run, in the order of its page, and every command is shown."""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import Said, environment, shell
from encoders_text import tiny_text

ROOT = Path(__file__).resolve().parents[1]
EVERY_PAGE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MADE = "<!-- Made by"
BY_CI = ("make ",)
"""Run by .ci/run, whole; not from inside the suite."""
SHORT = ["--set", "srel.epochs=2", "--set", "prompt4re.epochs=2", "--set", "ensemble.epochs=2"]
"""Added to every training, so that the pages run in a minute."""
SHORT_SET = {key: int(value) for key, _, value in (setting.partition("=") for setting in SHORT[1::2])}
"""The same for training from Python."""
FROM_NOTHING = ("README.md", "docs/tutorial/first-map.md", "docs/tutorial/open-data.md")
"""Pages that begin in an empty folder; the others where a city, a run and a bundle are."""
ELSEWHERE = {
    "topt-deploy train --resume": "tests/test_end_to_end.py interrupts a training and resumes it",
    "topt-deploy evaluate . --protocol paper --search 20 --runs 5 --tasks crime --out table1": (
        "tests/train/evaluation/test_published_search.py searches; this takes an hour"
    ),
}
CHECKS = {
    "README.md": "assert len(predictions) > 0 and 'prediction' in predictions.column_names",
    "docs/how-to/python.md": "assert len(predictions) > 0",
    "docs/how-to/mlflow.md": "assert len(predictions) == 3 * len(regions) and predictions.prediction.notna().all()",
}
"""What holds after each snippet of a page that makes predictions."""
NEEDS = {
    "docs/how-to/python.md": ("pandas", "tokenizers", "pyogrio", "shapely"),
    "docs/how-to/build.md": ("pyogrio", "shapely"),
    "docs/tutorial/open-data.md": ("pyogrio", "shapely"),
    "docs/how-to/mlflow.md": ("mlflow", "pandas"),
    "docs/how-to/sign.md": ("cryptography",),
    "docs/how-to/encode.md": ("tokenizers",),
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    options: str
    text: str


def blocks(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)(?: (.*))?\n(.*?)^```", text, re.S | re.M)
    return [block for each in found if (block := Block(*each)).language in languages]


def pages_with(*languages: str) -> list[str]:
    """The pages with blocks in these languages, but for those that are made from the code."""
    names = [str(page.relative_to(ROOT)) for page in EVERY_PAGE if page.exists()]
    return [page for page in names if blocks(page, *languages) and MADE not in (ROOT / page).read_text()]


def lines(block: Block) -> Iterator[tuple[str, list[str] | None]]:
    """The commands of a block, each with the lines that it is said to print; None where none are shown."""
    if block.language == "console":
        for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
            command, *printed = part.rstrip().splitlines()
            yield command, printed
    else:
        for line in block.text.splitlines():
            if command := line.partition("  #")[0].strip():
                yield command, None


def exit_codes(page: str) -> dict[str, int]:
    """The commands that the page says end with another code than 0."""
    found = re.findall(r"^(\S.*?)  # exit code (\d+)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
    return {line: int(code) for line, code in found}


def form(printed: str | list[str]) -> list[str]:
    """Printed lines without what differs from run to run: numbers, hashes, the width of columns, which side won."""
    split = printed.splitlines() if isinstance(printed, str) else printed
    plain = (re.sub(r"[0-9a-f]{12,}|[+−-]?\d[\d,.]*(?:e-?\d+)?|–", "#", line) for line in split)
    told = (re.sub(r"(\w+): .*plain baseline.*", r"\1: verdict", line) for line in plain)
    told = (line.removesuffix("earns nothing here") for line in told)
    return [" ".join(line.split()) for line in told if line.strip()]


@dataclass
class Reader:
    """Someone who does what a page says, step by step."""

    page: str
    folder: Path
    skipped: list[str] = field(default_factory=list)

    def follow(self) -> None:
        """Do all of it."""
        checks = CHECKS.get(self.page, "")
        for block in blocks(self.page, "bash", "console", "python", "toml"):
            if block.language == "python":
                self.python(block.text + (checks if re.search("^predictions = ", block.text, re.M) else ""))
            elif block.language == "toml":
                if title := re.search(r'title="(.+)"', block.options):
                    (self.folder / title[1]).write_text(block.text, encoding="utf-8")
            else:
                for command, printed in lines(block):
                    self.command(command, printed)

    def python(self, script: str) -> None:
        """Run a snippet, as a script in the present folder."""
        script = re.sub(r"topt\.train\(([^)]*)\)", rf"topt.train(\1, set={SHORT_SET!r})", script)
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=self.folder, env=environment(MLFLOW_DISABLE_TELEMETRY="true"),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"

    def command(self, line: str, printed: list[str] | None) -> None:
        """Run a command, and compare what it prints with what the page shows."""
        if line.startswith(BY_CI) or line in ELSEWHERE:
            return
        if line.startswith("cd "):
            self.folder /= line.removeprefix("cd ")
            return
        if self.cannot(line):
            self.skipped.append(line)
            return
        assert line.split()[0] in ("topt-deploy", "topt-run"), f"{self.page} shows {line!r}: who runs it?"
        done: Said = shell(line + self.shorter(line, printed), self.folder)
        assert done.code == exit_codes(self.page).get(line, 0), f"{line}\n{done.out}{done.err}"
        if printed is not None:
            assert form(done.out) == form(printed), f"{self.page}: {line} prints something else now:\n{done.out}"

    def shorter(self, line: str, printed: list[str] | None) -> str:
        """Options that make a training short; the preset that is exported fastest, unless the page shows another's."""
        if not line.startswith("topt-deploy train"):
            return ""
        return shlex.join(["", *SHORT, *(() if printed or "--preset" in line else ("--preset", "kernels"))])

    def cannot(self, line: str) -> bool:
        """Whether a command needs data or a package that is not here."""
        published = "HAFusion" in line or "chicago" in line
        engines = {"--engine ray": "ray", "--engine spark": "pyspark"}
        absent = [module for option, module in engines.items() if option in line and find_spec(module) is None]
        return bool(absent) or (published and not (self.folder / "HAFusion").exists())


@pytest.fixture
def prepared(tmp_path: Path, demo_city: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """A folder with all that a page may begin with."""

    def prepare(page: str) -> Path:
        if page in FROM_NOTHING:
            return tmp_path
        for name in ("regions.parquet", "mobility.parquet"):
            shutil.copy(demo_city / name, tmp_path)
        for name in ("HAFusion", "Prompt4RE"):
            if (data := ROOT.parent / "shared/data" / name).exists():
                (tmp_path / name).symlink_to(data)
        run: Path = request.getfixturevalue("demo_run")
        shutil.copytree(run, tmp_path / "runs" / run.name)
        shutil.copytree(request.getfixturevalue("demo_bundle"), tmp_path / "model.topt")
        with_cities(tmp_path)
        if "models/SmolLM2" in (ROOT / page).read_text():  # a model of the name, with random weights
            tiny_text(tmp_path / "models/SmolLM2-135M-Instruct")
        for line in re.findall("^openssl .*$", (ROOT / page).read_text(), re.MULTILINE):
            subprocess.run(shlex.split(line), cwd=tmp_path, check=True, capture_output=True)
        return tmp_path

    return prepare


def with_cities(folder: Path) -> None:
    """Many cities, and a table with a bad row."""
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


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a dozen commands each, on a machine that may be busy
@pytest.mark.parametrize("page", pages_with("bash", "console", "python"))
def test_the_page_can_be_followed(page: str, prepared: Callable[[str], Path]) -> None:
    for module in NEEDS.get(page, ()):
        pytest.importorskip(module)
    reader = Reader(page, prepared(page))
    reader.follow()
    if reader.skipped:
        pytest.skip(f"data or packages are absent: {len(reader.skipped)} commands of {page} were not run")


def test_every_command_is_shown() -> None:
    """Each command of both programs is run by one of the pages, so that nobody has to guess how it is called."""
    shown = {
        line for page in pages_with("bash", "console") for b in blocks(page, "bash", "console") for line, _ in lines(b)
    }
    groups = reference().programs().items()
    for name, group in groups:
        for command, context in reference().commands(group, name):
            if isinstance(context.command, click.Group):
                continue
            assert any(line.startswith(f"{command} ") or line == command for line in shown), f"no page shows {command}"


def reference() -> ModuleType:
    """dev/reference_pages.py."""
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "dev/reference_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_are_what_the_code_says() -> None:
    stale = [str(path.relative_to(ROOT)) for path in reference().stale()]
    assert not stale, f"run `make docs`: {', '.join(stale)}"


def test_everything_public_is_documented_and_shown() -> None:
    """Public functions and classes have a docstring, and one of the pages or examples uses each function."""
    sources = [b.text for page in pages_with("python") for b in blocks(page, "python")]
    examples = [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".ipynb")]
    sources += [path.read_text(encoding="utf-8") for path in examples]
    for name, found in reference().public_objects():
        assert found.docstring, f"{name} has no docstring"
        for member in reference().public_members(found):
            assert member.docstring, f"{name}.{member.name} has no docstring"
        if found.is_function:
            assert any(re.search(rf"\b{found.name}\(", text) for text in sources), f"no page or example calls {name}"


def test_hooks_before_a_commit_call_what_is_installed() -> None:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}, "a hook from elsewhere needs a network"
    for hook in hooks:
        program, what, *rest = hook["entry"].split()
        assert (program, hook["language"]) == ("python", "system")
        assert find_spec(rest[0]) if what == "-m" else (ROOT / what).exists()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site/index.html").exists()
    pages = [p.read_text(encoding="utf-8") for p in (tmp_path / "site").rglob("*.html")]
    loaded = [
        url for page in pages for url in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)', page)
    ]
    assert not loaded, "the site loads nothing from elsewhere"


def test_the_page_on_bad_rows_lists_every_reason_code() -> None:
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
    page = (ROOT / "docs/how-to/bad-rows.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (?:regions|mobility|both) \| .* \| (yes|no|–)[^|]* \|$", page, re.M)
    assert {code: can == "yes" for code, can in listed} == raised


def test_alerts_are_on_metrics_that_there_are() -> None:
    yaml = pytest.importorskip("yaml")
    from topt_deploy.runtime.summary import Summary

    page = (ROOT / "docs/how-to/monitoring.md").read_text(encoding="utf-8")
    (block,) = blocks("docs/how-to/monitoring.md", "yaml")
    rules = [rule for group in yaml.safe_load(block.text)["groups"] for rule in group["rules"]]
    families = set(re.findall(r"^# TYPE (\S+) gauge$", Summary().metrics(), re.M))
    assert len(rules) == 4
    for rule in rules:
        named = set(re.findall(r"topt_run_\w+", rule["expr"]))
        assert named
        assert named <= families
    described = page[page.index("## Metrics") : page.index("```yaml")]
    assert set(re.findall(r"topt_run_\w+", described)) == families


def test_configuration_file_of_the_page_is_valid(tmp_path: Path) -> None:
    from topt_deploy.config.load import load_config

    (block,) = blocks("docs/how-to/train.md", "toml")
    (tmp_path / "topt.toml").write_text(block.text, encoding="utf-8")
    config = load_config(file=tmp_path / "topt.toml")
    assert list(config.tasks) == ["noise_complaints"]
    assert config.tasks["noise_complaints"].ensemble.epochs == 300


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*EVERY_PAGE, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", ROOT / "dev/LOG.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_lists_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)#]+)", readme.partition("## Documentation")[2]))
    pages = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert not pages - {"docs/index.md"} - linked, "## Documentation of README.md leads to every page"
