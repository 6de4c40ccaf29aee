"""Later counts on the page: the figures of ``topt-run check``, and which checks are refused."""

import json
from pathlib import Path

import pytest
from builders import tiny_config

from topt_deploy.errors import BadData, NoInput
from topt_deploy.run_folder import Run
from topt_deploy.train.report.later_counts import read_later_counts

MAE = 51.23456789012345
REPORTS = {"crime": {"held_out": {"mae": MAE}}, "noise": {"held_out": {"mae": 3.0}}}
OWN = Run(
    path=Path(), config=tiny_config(), city_dir=Path(), regions_sha256="c" * 64, mobility_sha256=None, finished=True,
    facts={"reports": REPORTS},
)  # fmt: skip
TASK = {
    "task": "crime", "regions": 77, "mae": 80.0, "rmse": 90.0, "r2": None, "promised_mae": MAE, "ratio": 80 / MAE,
    "predicted_sum": 7000.0, "counted_sum": 9000.0, "coverage": 0.5, "promised_coverage": 0.9, "coverage_chance": 1e-9,
    "extrapolated": 0.0, "missed_count": 38, "broken": ["the error is 1.56 times what was promised"],
    "missed": [{"region_id": "08", "counted": 900.0, "predicted": 10.0, "lower": 1.0, "upper": 20.0, "off": 6.9}],
}  # fmt: skip
CHECK = {
    "predictions": "p.parquet", "labels": "somewhere/later.parquet", "bundle": "model.topt", "tasks": [TASK],
    "drift": {f"poi_{i}": 1 - i / 10 for i in range(8)}, "broken": [],
}  # fmt: skip


def write(folder: Path, **changes: object) -> Path:
    file = folder / "check.json"
    file.write_text(json.dumps(CHECK | changes))
    return file


def test_its_figures_are_the_checks(tmp_path: Path) -> None:
    found = read_later_counts(write(tmp_path), OWN)
    (task,) = found.tasks
    assert (task.counted_sum, task.predicted_sum, task.mae, task.promised_mae) == (9000, 7000, 80, MAE)
    assert (task.coverage, task.promised_coverage, task.missed_count) == (0.5, 0.9, 38)
    assert [(one.region_id, one.counted, one.lower, one.upper) for one in task.missed] == [("08", 900, 1, 20)]
    assert task.broken == ("the error is 1.56 times what was promised",)
    assert found.drift == CHECK["drift"]
    assert json.loads(json.dumps(found.as_dict())) == CHECK | {"broken": [f"crime: {TASK['broken'][0]}"]}


@pytest.mark.parametrize("promised", [None, MAE + 1e-6, 3.0])
def test_a_check_of_another_model_is_refused(tmp_path: Path, promised: float | None) -> None:
    with pytest.raises(BadData, match="of another model") as caught:
        read_later_counts(write(tmp_path, tasks=[TASK | {"promised_mae": promised}]), OWN)
    assert "crime 51.2346" in (caught.value.expected or "")
    with pytest.raises(BadData, match="of another model"):
        read_later_counts(write(tmp_path, tasks=[TASK | {"task": "theft"}]), OWN)
    with pytest.raises(BadData, match="of another model"):
        read_later_counts(write(tmp_path, tasks=[]), OWN)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tasks": 3}', '{"tasks": [{"task": "crime"}]}', "[" * 10**5])
def test_what_is_no_check_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "check.json").write_text(text)
    with pytest.raises(BadData, match="not a check's result"):
        read_later_counts(tmp_path / "check.json", OWN)
    with pytest.raises(NoInput):
        read_later_counts(tmp_path / "absent.json", OWN)
