"""The report's intervals: the bundle's own where no count is known, and around held-out predictions elsewhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import topt_deploy as topt
from topt_deploy.data.parquet import read_parquet
from topt_deploy.errors import BadConfig
from topt_deploy.intervals import SizeTrend
from topt_deploy.run_folder import open_run
from topt_deploy.train.report.intervals import read_intervals
from topt_deploy.train.report.page import render
from topt_deploy.train.report.run_facts import Facts, read_facts
from topt_deploy.train.run import HELD_OUT_FILE


@pytest.fixture(scope="module")
def facts(demo_run: Path) -> Facts:
    """Facts of a run with regions that have no label; one task is of the default's form, another of the paper's."""
    return read_facts(open_run(demo_run))


def test_a_region_without_a_label_has_the_bundles_interval(facts: Facts, demo_city: Path, demo_bundle: Path) -> None:
    predicted = topt.load(demo_bundle).predict(demo_city / "regions.parquet").to_pylist()
    rows = {(row["task"], row["region_id"]): row for row in predicted}
    compared = 0
    for task, own in facts.tasks.items():
        assert own.intervals is not None
        for i in np.flatnonzero(np.isnan(own.reported)):
            served = rows[task, facts.region_ids[i]]
            np.testing.assert_allclose(own.intervals.lower[i], served["lower"], rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(own.intervals.upper[i], served["upper"], rtol=1e-4, atol=1e-3)
            compared += 1
    assert compared >= len(facts.tasks)


def test_around_a_held_out_prediction_it_is_as_wide_as_scores_like_its_own(facts: Facts, demo_run: Path) -> None:
    """A region is inside if and only if its own normalised score is at most the quantile of all."""
    fold_of = {(r["task"], r["region_id"]): r["fold"] for r in read_parquet(demo_run / HELD_OUT_FILE).to_pylist()}
    for task, own in facts.tasks.items():
        assert own.intervals is not None
        told = open_run(demo_run).facts
        if task not in told["fold_scores"]:
            continue
        by_fold = told["fold_scores"][task]
        everything = np.sort(np.concatenate(by_fold))
        quantile = everything[int(np.ceil((len(everything) + 1) * 0.9)) - 1]
        held = np.flatnonzero(~np.isnan(own.residual))
        inside = (own.intervals.lower <= own.reported) & (own.reported <= own.intervals.upper)
        assert inside[held].sum() == (everything <= quantile).sum()
        # By fold too, so that scores and regions belong to each other.
        for k, scores in enumerate(by_fold):
            mine = [i for i in held if fold_of[task, facts.region_ids[i]] == k]
            assert inside[mine].sum() == (np.array(scores) <= quantile).sum()


def test_the_band_is_that_of_a_region_of_median_leverage(facts: Facts) -> None:
    own = next(iter(facts.tasks.values())).intervals
    assert own is not None
    counts = np.array([1.0, 64.0, 729.0])
    lower, upper = own.around(counts)
    assert (lower <= counts).all()
    assert (counts <= upper).all()
    reach = np.cbrt(upper) - np.cbrt(counts)
    quantile = own.scores[int(np.ceil((len(own.scores) + 1) * 0.9)) - 1]
    np.testing.assert_allclose(reach, quantile * np.sqrt(1 + own.leverage) * own.trend.factor(np.cbrt(counts)))


def test_the_page_names_the_regions_not_to_be_trusted_and_how_often_intervals_hold(facts: Facts) -> None:
    ids = facts.region_ids
    page = render(replace(facts, far=frozenset(ids[:2])))
    assert f"Do not trust the predictions of 2 regions:</strong> {ids[0]}, {ids[1]}." in page
    assert page.count("unlike the labelled regions: do not trust") >= 2 * len(facts.tasks)
    assert page.count("(do not trust)") == 2 * len(facts.tasks)
    covered = [own.coverage for own in facts.tasks.values() if own.coverage]
    assert covered
    for coverage in covered:
        assert f"hold {100 * coverage['all']:.0f}\N{NO-BREAK SPACE}% of the reported counts" in page
    many = render(replace(facts, far=frozenset(ids[:25])))
    assert f"{ids[19]} and more, marked in the tables below" in many
    assert "Do not trust the predictions" not in render(replace(facts, far=frozenset()))


def test_a_run_of_an_earlier_version_is_refused(facts: Facts, demo_run: Path) -> None:
    run = open_run(demo_run)
    earlier = replace(run, facts={k: v for k, v in run.facts.items() if k != "size_trend"})
    task, own = next(iter(facts.tasks.items()))
    with pytest.raises(BadConfig, match="earlier version"):
        read_intervals(earlier, task, own.predicted, ~np.isnan(own.held_out), np.ones((1, 1)), np.zeros(1))


def test_without_fits_of_folds_the_pooled_scores_serve(facts: Facts, demo_run: Path) -> None:
    run = open_run(demo_run)
    task, own = next(iter(facts.tasks.items()))
    held = ~np.isnan(own.held_out)
    found = read_intervals(run, task, own.predicted, held, None, np.full(len(held), 3.0))
    assert found is not None
    assert (found.trend, found.leverage) == (SizeTrend(), 0)
    scores = run.facts["scores"][task]
    np.testing.assert_allclose(
        np.cbrt(found.upper) - np.cbrt(own.predicted), scores[int(np.ceil((len(scores) + 1) * 0.9)) - 1], atol=1e-9
    )
