"""An evaluation on the page: which methods, which figures, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import tiny_config

from topt_deploy.errors import BadData, NoInput
from topt_deploy.run_folder import Run
from topt_deploy.train.evaluation.coverage import Coverage, Stratum
from topt_deploy.train.evaluation.protocols import PROTOCOLS
from topt_deploy.train.evaluation.results import MethodResult
from topt_deploy.train.evaluation.splits import HeldOut
from topt_deploy.train.evaluation.tables import as_json
from topt_deploy.train.report.evaluation import read_evaluation

N, CITY = 20, "c" * 64
GROUPS = {
    "topt": "variant", "paper": "variant", "hafusion": "literature", "mvure": "literature",
    "mean": "plain", "ridge": "plain", "extra-trees": "plain", "boosting": "plain",
}  # fmt: skip
ERROR = {"topt": 1, "paper": 9, "hafusion": 5, "mvure": 4, "mean": 30, "ridge": 6, "extra-trees": 8, "boosting": 2}
"""Every method is off by so much in every region, to either side."""
RUN = Run(path=Path(), config=tiny_config(), city_dir=Path(), regions_sha256=CITY, mobility_sha256=None, finished=True)


def result(method: str, task: str, *, sign: int = 1, coverage: Coverage | None = None) -> MethodResult:
    labels = np.arange(50.0, 50 + N)
    fold = np.stack([np.arange(N) % 4, np.arange(N) // 5])
    off = ERROR[method] * np.where(np.arange(N) % 2, 1, -1) * sign
    return MethodResult(
        method=method,
        group=GROUPS[method],  # type: ignore[arg-type]
        task=task,
        held_out=HeldOut(labels=labels, fold=fold, prediction=np.stack([labels + off, labels + 2 * off])),
        reason=None,
        coverage=coverage,
        seconds=1.0,
    )


def failed(method: str, task: str) -> MethodResult:
    return MethodResult(
        method=method, group="literature", task=task, held_out=None, reason="no such data", coverage=None, seconds=None
    )


def write(folder: Path, results: list[MethodResult], **facts: Any) -> Path:
    recorded = {"protocol": "spatial", "seeds": [0, 1], "regions_sha256": CITY, "versions": {"topt-deploy": "9.9"}}
    (folder / "results.json").write_text(json.dumps(as_json(recorded | facts, results)))
    return folder


def test_all_variants_the_best_of_the_literature_and_three_plain_ones(tmp_path: Path) -> None:
    everything = [result(method, "crime") for method in GROUPS]
    found = read_evaluation(write(tmp_path, everything), RUN)
    rows = found.tables["crime"]
    assert [row.method for row in rows] == ["topt", "paper", "mvure", "boosting", "ridge", "extra-trees"]
    assert [row.method for row in rows if row.main] == ["topt"]
    assert [row.group for row in rows] == ["ToPT", "ToPT", "literature", "plain", "plain", "plain"]
    assert rows[2].figures[:2] == ["6.0 ± 2.8", "6.0 ± 2.8"]  # 4 and 8
    assert found.meaning == PROTOCOLS["spatial"].meaning
    assert (found.protocol, found.repetitions, found.version) == ("spatial", 2, "9.9")


def test_each_task_has_its_own_table_and_what_did_not_run_has_no_row(tmp_path: Path) -> None:
    results = [result("topt", "crime"), failed("mvure", "crime"), result("hafusion", "calls"), result("mean", "calls")]
    tables = read_evaluation(write(tmp_path, results), RUN).tables
    assert {task: [row.method for row in rows] for task, rows in tables.items()} == {
        "crime": ["topt"], "calls": ["hafusion", "mean"],
    }  # fmt: skip


def test_verdicts_are_the_evaluations(tmp_path: Path) -> None:
    found = read_evaluation(write(tmp_path, [result("topt", "crime"), result("boosting", "crime", sign=-1)]), RUN)
    sentence = found.verdicts["crime"]
    assert sentence.startswith("topt has MAE 1.5, 50.0 % below the best plain baseline, boosting with 3.0;")


def test_coverage_is_there_where_it_was_measured(tmp_path: Path) -> None:
    strata = [Stratum(regions=n, coverage=c, width=1.0) for n, c in ((20, 0.9), (7, 1.0), (7, 0.8), (6, 0.7))]
    blocks = [Stratum(regions=n, coverage=c, width=1.0) for n, c in ((9, 1.0), (5, 0.4), (6, 1.0))]
    by_size = dict(zip(("small", "medium", "large"), strata[1:], strict=True))
    measured = Coverage(nominal=0.9, all=strata[0], by_size=by_size, by_block=blocks)
    found = read_evaluation(write(tmp_path, [result("topt", "crime", coverage=measured), result("mean", "crime")]), RUN)
    (row,) = found.coverage
    assert (row.task, row.method, row.nominal) == ("crime", "topt", 0.9)
    assert row.shares == [(0.9, 20), (1.0, 7), (0.8, 7), (0.7, 6), (0.4, 5)]
    assert len(found.strata) == len(row.shares)


def test_another_citys_evaluation_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, [result("topt", "crime")], regions_sha256="d" * 64)
    with pytest.raises(BadData, match="another city") as caught:
        read_evaluation(folder, RUN)
    assert CITY in (caught.value.expected or "")
    assert caught.value.found == "d" * 64


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"regions_sha256": 1, "results": 3}', '{"protocol": "x", "results": []}', b"\xff\xfe"]
)
def test_what_is_no_evaluation_is_refused(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadData, match="not an evaluation's results"):
        read_evaluation(tmp_path, RUN)


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(NoInput, match=r"results\.json"):
        read_evaluation(tmp_path, RUN)
