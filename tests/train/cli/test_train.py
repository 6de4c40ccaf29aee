import pytest

from topt_deploy.train.cli.train import summary, verdict
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
