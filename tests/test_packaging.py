"""What pyproject.toml, constraints.txt, the Dockerfile and the changelog declare agrees with the tree."""

import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import topt_deploy

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
TREES = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}


def package_files() -> list[Path]:
    """Every file below the packages' folders, relative to the root."""
    paths = (path for folder in TREES for path in (ROOT / folder).rglob("*"))
    return [path.relative_to(ROOT) for path in paths if path.is_file() and path.parent.name != "__pycache__"]


def test_every_folder_with_code_is_a_listed_package():
    folders = {path.parent for path in package_files() if path.suffix == ".py"}
    assert [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()] == []
    names = {".".join([TREES[folder.parts[0]], *folder.parts[1:]]) for folder in folders}
    assert names == set(SETUPTOOLS["packages"])


def folder_of(package: str) -> Path:
    """Where a package's source lies, relative to the root: package-dir names it, or a package that it is part of."""
    parents = [known for known in TREES.values() if f"{package}.".startswith(f"{known}.")]
    tree = max(parents, key=len)
    return Path(SETUPTOOLS["package-dir"][tree], *package.removeprefix(tree).split("."))


def test_every_other_file_is_listed_as_package_data():
    patterns = [
        f"{folder_of(package)}/{pattern}"
        for package, listed in SETUPTOOLS["package-data"].items()
        for pattern in listed
    ]
    others = [str(path) for path in package_files() if path.suffix != ".py"]
    assert [path for path in others if not any(fnmatch(path, pattern) for pattern in patterns)] == []
    assert {"topt_deploy/py.typed", "train/report/templates/page.html"} <= set(others)


@pytest.mark.parametrize("extra", ["base", *PROJECT["optional-dependencies"]])
def test_every_requirement_is_pinned_within_its_range(extra):
    lines = re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pins = {canonicalize_name(name): version for name, version in lines} | {PROJECT["name"]: "0"}
    listed = {"base": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}[extra]
    for requirement in map(Requirement, listed):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_the_console_scripts_resolve():
    scripts = distribution("topt-deploy").entry_points.select(group="console_scripts")
    assert {script.name for script in scripts} == {"topt-deploy", "topt-run"}
    assert all(callable(script.load()) for script in scripts)


@pytest.mark.parametrize("name", ["train", "export", "runtime"])
def test_bare_stage_names_are_not_installed(name):
    # -I, or the current folder would be searched, where they do lie.
    code = "import sys; from importlib.util import find_spec as find; print(*map(bool, map(find, sys.argv[1:])))"
    command = [sys.executable, "-I", "-c", code, f"topt_deploy.{name}", name]
    assert subprocess.check_output(command, text=True) == "True False\n"


def test_the_version_is_the_changelogs_newest():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == topt_deploy.__version__ == distribution("topt-deploy").version


def test_the_dockerfile_uses_files_that_exist_and_reach_its_context():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = " ".join(re.findall(r"^COPY (?!--from)(.+) ", DOCKERFILE, re.MULTILINE)).split()
    run = re.findall(r"^RUN (?:\w+=\S+ )*sh (\S+)", DOCKERFILE, re.MULTILINE)
    scripts = [path.relative_to(ROOT) for path in (ROOT / "scripts").glob("install-*.sh")]
    assert set(run) == {"scripts/build-wheel.sh", *map(str, scripts)}
    assert set(map(str, scripts)) <= set(copied)
    for file in [*copied, *run, *TREES]:
        assert (ROOT / file).exists()
        assert file == "." or f"!{Path(file).parts[0]}" in ignored


TARGETS = {"runtime-cpu": "topt-run", "runtime-gpu": "topt-run", "train": "topt-deploy"}


def test_a_plain_docker_build_makes_the_cpu_runtime():
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert stages[-1] == ("runtime-cpu", "runtime")
    assert {name for base, name in stages if base == "base"} == set(TARGETS)


def test_every_target_is_one_that_check_install_knows():
    script = (ROOT / "scripts/check-install.sh").read_text()
    assert {name for name in re.findall(r"^([\w-]+)\(\) \{", script, re.MULTILINE) if name in TARGETS} == set(TARGETS)
    assert all((ROOT / f"scripts/install-{name}.sh").exists() for name in TARGETS)


@pytest.mark.parametrize(("target", "entry_point"), TARGETS.items())
def test_an_image_runs_its_program_as_a_numbered_user_that_is_not_root(target, entry_point):
    stage = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    (body,) = [text for text in stage if re.match(rf"\S+ AS {target}\n", text)]
    assert f'\nENTRYPOINT ["{entry_point}"]' in body
    users = re.findall(r"^USER (\d+):\d+$", body, re.MULTILINE)
    assert users
    assert int(users[-1]) > 0


def test_scripts_are_executable_and_parse():
    for script in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]:
        assert os.access(script, os.X_OK), script
        subprocess.run(["bash", "-n", script], check=True)
