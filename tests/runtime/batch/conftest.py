"""Cities for the batch's tests, and what each is predicted to be alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from batch import NAMES, outputs, slow, write_cities
from commands import Said, shell


@pytest.fixture(scope="session")
def cities(shared: Path, once: Callable[..., Said], demo_city: Path) -> Path:
    """Six cities, ``city=A`` to ``city=F``, for all tests to read."""
    once("cities", lambda folder: write_cities(folder / "cities", demo_city))
    return shared / "cities"


@pytest.fixture(scope="session")
def apart(shared: Path, once: Callable[..., Said], cities: Path, demo_bundle: Path) -> dict[str, str]:
    """The outputs of six commands, one per city: what a batch is compared with."""
    commands = [
        f"mkdir -p apart/city={n} && topt-run predict cities/city={n} --bundle {demo_bundle}"
        f" --out apart/city={n}/predictions.parquet"
        for n in NAMES
    ]
    once("apart", lambda folder: shell(" && ".join(commands), folder))
    return outputs(shared / "apart")


@pytest.fixture(scope="session")
def one_slow(shared: Path, once: Callable[..., Said], cities: Path, demo_bundle: Path) -> tuple[Path, dict[str, str]]:
    """The six cities with much to do in C, and what the local engine makes of them."""

    def make(folder: Path) -> Said:
        slow(Path(shutil.copytree(cities, folder / "slow")) / "city=C")
        return shell(f"topt-run predict slow --bundle {demo_bundle} --out slow-local", folder)

    once("slow", make)
    return shared / "slow", outputs(shared / "slow-local")


@pytest.fixture
def mine(tmp_path: Path, cities: Path) -> Path:
    """A copy of the cities that a test may change."""
    return shutil.copytree(cities, tmp_path / "cities")


@pytest.fixture
def batch(tmp_path: Path, demo_bundle: Path) -> Callable[..., Said]:
    """``topt-run predict … --out out`` in a folder of the test's own, as a process."""

    def call(*arguments: object, out: object = "out", **more: str) -> Said:
        words = " ".join(f"'{argument}'" for argument in arguments)
        return shell(f"topt-run predict {words} --bundle {demo_bundle} --out '{out}'", tmp_path, **more)

    return call
