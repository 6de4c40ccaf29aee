"""What the examples are run on."""

import shutil
from pathlib import Path

import pytest
from commands import Desk

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def examples() -> Path:
    """The folder of examples."""
    return EXAMPLES


@pytest.fixture
def home(desk: Desk) -> Path:
    """What $TOPT_HOME is to hold: ``model.topt`` and ``cities/`` with two cities, A and B."""
    for name in "AB":
        city = desk.folder / "cities" / f"city={name}"
        city.mkdir(parents=True)
        for table in (desk.regions, desk.mobility):
            shutil.copy(table, city)
    for name in ("log", "metrics"):
        (desk.folder / name).mkdir()
    return desk.folder


@pytest.fixture
def spoil(home: Path):
    """Give city B a count below zero, which --on-bad-row quarantine sets aside."""

    def call() -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        regions = home / "cities/city=B/regions.parquet"
        table = pq.ParquetFile(regions).read()
        place = table.schema.get_field_index("poi_food")
        counts = [-1, *table.column(place).to_pylist()[1:]]
        pq.write_table(table.set_column(place, "poi_food", pa.array(counts)), regions)

    return call


@pytest.fixture(scope="session")
def told_codes() -> dict[str, set[int]]:
    """Exit codes by the table's last column in docs/reference/exit-codes.md: success, stop, try again."""
    page = (ROOT / "docs/reference/exit-codes.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line[:3].strip("| ").isdigit()]
    codes: dict[str, set[int]] = {}
    for code, _, what in rows:
        codes.setdefault(what.partition(",")[0], set()).add(int(code))
    return codes
