"""The notebook in examples/: its cells are run in their order, in one namespace, as Jupyter does it."""

import json
import re
import sys
from pathlib import Path

import pytest
from commands import shell

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples" / "notebook").glob("*.ipynb"))
SHORT = 'preset="quick", set={"srel.epochs": 2, "prompt4re.epochs": 2, "ensemble.epochs": 2}'
CHECK = """
import pandas as pd
assert isinstance(predictions, pd.DataFrame) and len(predictions) == 60 and predictions["crime"].notna().all()
assert axes.get_title().startswith("Predicted crimes")
"""


def cells(notebook: Path, kind: str) -> list[str]:
    """The sources of a notebook's cells of one kind."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.mark.timeout(3600)  # it trains and exports, on a machine that may be busy
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_every_cell_runs(notebook: Path, tmp_path: Path):
    pytest.importorskip("geopandas")
    pytest.importorskip("matplotlib")
    code = "\n".join(cells(notebook, "code"))
    assert 'preset="quick"' in code
    (tmp_path / "cells.py").write_text(code.replace('preset="quick"', SHORT) + CHECK)
    said = shell(f"{sys.executable} cells.py", tmp_path, MPLBACKEND="agg")
    assert said.code == 0, said


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_its_links_lead_somewhere(notebook: Path):
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(cells(notebook, "markdown")))
    assert links
    assert [link for link in links if not (notebook.parent / link).exists()] == []
