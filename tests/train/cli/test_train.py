import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import replaced, tiny_city_tables

from topt_deploy.train.cli.train import REGIONS_SHOWN, made_of, summary, verdict
from topt_deploy.train.metrics import Metrics, TaskReport


def report(model, trees, mean):
    """A task's report with these MAEs."""
    held_out, by_trees, by_mean = (Metrics(mae=mae, rmse=2 * mae, r2=0.5, regions=77) for mae in (model, trees, mean))
    return TaskReport(held_out=held_out, in_sample=held_out, mean=by_mean, trees=by_trees)


@pytest.mark.parametrize(
    ("maes", "sentence"),
    [
        ((45, 50, 60), "MAE 10 % below the better of the run's two plain baselines (boosted trees)"),
        ((30, 50, 40), "MAE 25 % below the better of the run's two plain baselines (predicting the mean)"),
        ((60, 50, 70), "the plain baseline wins: boosted trees is better; this model's MAE is 20 % above it"),
        ((1.5, 2, 0), "no model could be better: predicting the mean is never wrong here; this model's MAE is 1.5"),
        ((0, 0, 2), "no model could be better: boosted trees is never wrong here; this model's MAE is 0.0"),
    ],
)
def test_the_verdict_is_against_the_best_plain_baseline(maes, sentence):
    assert verdict(report(*maes)) == sentence


def test_the_summary_has_every_tasks_figures_and_verdict():
    lines = summary({"crime": report(45, 50, 60), "calls": report(1.5, 2, 0)}).splitlines()
    (figures,) = [line.split() for line in lines if line.startswith("crime ")]
    assert figures == ["crime", "77", "45.0", "90.0", "0.500", "50.0", "0.500", "60.0", "0.500"]
    assert [line for line in lines if line.startswith(("crime: ", "calls: "))] == [
        f"crime: {verdict(report(45, 50, 60))}",
        f"calls: {verdict(report(1.5, 2, 0))}",
    ]


PARTS = {
    "kernels from 0.7": {"weight": 0.75, "mae_without": 48.25},
    "SREL with Prompt4RE": {"weight": 0.25, "mae_without": 44.5},
}


def test_after_the_figures_come_weights_coverage_and_regions_to_doubt():
    facts = {
        "parts": {"crime": PARTS},
        "coverage": {"crime": {"all": 0.9, "small": 0.95, "medium": 0.875, "large": 0.85}},
        "far": ["07", "31"],
    }
    assert made_of(facts, {"crime": report(45, 50, 60)}).splitlines() == [
        "",
        "crime: what its parts weigh, and the held-out MAE without each",
        "  kernels from 0.7       75%      48.2",
        "  SREL with Prompt4RE    25%      44.5  earns nothing here",
        "  intervals of 90% hold on 90% of all, 95% of small, 88% of medium, 85% of large predictions of held-out"
        " regions",
        "",
        "unlike the other regions, do not trust: 07, 31",
    ]


def test_of_many_regions_to_doubt_some_are_named():
    facts = {"far": [f"{n:02d}" for n in range(REGIONS_SHOWN + 3)]}
    assert made_of(facts, {}).endswith(f"{REGIONS_SHOWN - 1:02d} and 3 more")


def test_of_several_cities_each_has_its_own_figures():
    figures = {"held_out": {"mae": 12.25}, "trees": {"mae": 15.0}}
    city = {"city_id": "ash", "regions": 24, "tasks": {"crime": figures}}
    assert made_of({"cities": [city]}, {}).splitlines() == [
        "",
        "ash (24 regions), crime, held out: MAE 12.2, boosted trees 15.0",
    ]


def test_a_run_shows_all_of_it(demo_trained):
    for part in ("held out", "trees", "in sample", "kernels from", "networks", "next: topt-deploy export"):
        assert part in demo_trained.out
    assert "\ncrime: what its parts weigh, and the held-out MAE without each\n" in demo_trained.out
    assert "\n  intervals of 90% hold on " in demo_trained.out


def test_a_task_with_too_few_labels_is_named_before_anything_is_trained(tmp_path, topt_deploy):
    regions, mobility = tiny_city_tables(20)
    few = np.where(np.arange(20) < 2, regions["calls"].to_numpy(), np.nan)
    pq.write_table(replaced(regions, calls=pa.array(few, from_pandas=True)), tmp_path / "regions.parquet")
    pq.write_table(mobility, tmp_path / "mobility.parquet")
    said = topt_deploy("train", tmp_path, "--task", "crime", "--task", "calls", "--out", tmp_path / "run")
    assert said.code == 65
    assert f"{tmp_path / 'regions.parquet'}, column 'calls': too few labelled regions" in said.err
    for line in ("expected: at least 3", "found:    2", "to do:    label more regions, or leave this task out"):
        assert line in said.err
    assert "epochs" not in said.err
