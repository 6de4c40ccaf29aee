import json

import numpy as np
import pytest

from topt_deploy.train.evaluation.coverage import Coverage, Stratum
from topt_deploy.train.evaluation.paired_tests import compare
from topt_deploy.train.evaluation.results import MethodResult
from topt_deploy.train.evaluation.splits import HeldOut, chosen_by_other_folds, honest
from topt_deploy.train.evaluation.tables import Spread, as_json, markdown, spreads, verdicts

LABELS = np.random.default_rng(0).gamma(2, 50, 40)
FOLD = honest(LABELS, seeds=(0, 1, 2)).fold
FACTS = {"protocol": "honest", "seeds": [0, 1, 2]}


def result(method, group, error, task="crime", seed=1, **more):
    noise = np.random.default_rng(seed).normal(scale=error, size=FOLD.shape)
    held_out = HeldOut(labels=LABELS, fold=FOLD, prediction=np.maximum(LABELS + noise, 0))
    fields = {"held_out": held_out, "reason": None, "coverage": None, "seconds": 1.0} | more
    return MethodResult(method=method, group=group, task=task, **fields)


def row(page, method):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {method} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_cell_is_mean_and_sample_deviation_over_repetitions():
    one = result("ridge", "plain", 20)
    mae = [np.abs(p - LABELS).mean() for p in one.held_out.prediction]
    rmse = [np.sqrt(np.square(p - LABELS).mean()) for p in one.held_out.prediction]
    r2 = [1 - np.square(p - LABELS).sum() / np.square(LABELS - LABELS.mean()).sum() for p in one.held_out.prediction]
    cell = row(markdown(FACTS, [one, result("mean", "plain", 5)]), "ridge")[2]
    texts = [
        f"{np.mean(v):.{digits}f} ± {np.std(v, ddof=1):.{digits}f}" for v, digits in ((mae, 1), (rmse, 1), (r2, 3))
    ]
    assert cell == " / ".join(texts)


def test_a_figure_without_value_is_a_dash_and_one_repetition_has_no_spread():
    assert Spread.of([0.5, None]).text(3) == "–"
    assert Spread.of([12.34]).text(1) == "12.3"
    constant = HeldOut(labels=np.ones(6), fold=np.zeros((1, 6), int), prediction=np.full((1, 6), 2.0))
    assert spreads(constant)["r2"].mean is None
    assert spreads(constant)["mae"].mean == 1


def test_the_best_of_every_figure_is_bold_per_task():
    page = markdown(
        FACTS,
        [
            result("topt", "variant", 30),
            result("ridge", "plain", 10),
            result("topt", "variant", 5, task="calls"),
            result("ridge", "plain", 10, task="calls"),
        ],
    )
    topt, ridge = row(page, "topt"), row(page, "ridge")
    assert [cell.count("**") for cell in topt] == [0, 0, 0, 6]
    assert [cell.count("**") for cell in ridge] == [0, 0, 6, 0]
    assert page.index("Protocol `honest`") < page.index("| topt |")


def test_the_verdict_is_against_the_best_plain_baseline_of_the_task():
    results = [
        result("topt", "variant", 5),
        result("topt-without-prompts", "variant", 1),
        result("HAFusion", "literature", 2),
        result("ridge", "plain", 40),
        result("boosting", "plain", 20, seed=2),
    ]
    (verdict,) = verdicts(results)
    assert (verdict.task, verdict.baseline) == ("crime", "boosting")
    assert verdict.paired == compare(results[0].held_out, results[4].held_out)
    share = 100 * (1 - verdict.mae / verdict.baseline_mae)
    sentence = verdict.sentence()
    assert f"topt has MAE {verdict.mae:.1f}, {share:.1f} % below the best plain baseline" in sentence
    assert "the difference is significant (Wilcoxon over regions p = " in sentence
    assert sentence in markdown(FACTS, results)


def test_the_verdict_names_what_a_choice_without_foresight_would_have_reached():
    plain = {name: result(name, "plain", 20, seed=seed) for seed, name in enumerate(("ridge", "boosting", "mean"))}
    (verdict,) = verdicts([result("topt", "variant", 10), *plain.values()])
    chosen, _ = chosen_by_other_folds({name: own.held_out for name, own in plain.items()})
    mae = np.mean([np.abs(p - LABELS).mean() for p in chosen.prediction])
    assert verdict.chosen_mae == pytest.approx(mae)
    assert verdict.sentence().endswith(f"; the plain baseline that is the best on all other folds has MAE {mae:.1f}")
    (alone,) = verdicts([result("topt", "variant", 10), plain["ridge"]])
    assert alone.chosen_mae is None
    assert "other folds" not in alone.sentence()


def test_the_verdict_says_when_the_baseline_wins():
    (verdict,) = verdicts([result("topt", "variant", 40), result("ridge", "plain", 5, seed=2)])
    assert verdict.sentence().startswith("crime: the plain baseline wins: ridge has MAE")
    assert "is significant" in verdict.sentence()


def test_the_verdict_says_when_the_difference_is_not_significant():
    (verdict,) = verdicts([result("topt", "variant", 10), result("ridge", "plain", 10.2, seed=2)])
    assert "is not significant" in verdict.sentence()


@pytest.mark.parametrize("missing", ["topt", "ridge"])
def test_there_is_no_verdict_without_both_sides(missing):
    results = [result("topt", "variant", 10), result("ridge", "plain", 10)]
    assert verdicts([r for r in results if r.method != missing]) == []


def test_what_did_not_run_is_listed_with_its_reason():
    failed = result("MGFN", "literature", 1, held_out=None, reason="needs hours\n  to do: give them")
    page = markdown(FACTS, [result("ridge", "plain", 5), failed])
    assert row(page, "MGFN")[2] == "–"
    assert "- MGFN (crime): needs hours; to do: give them" in page
    assert as_json(FACTS, [failed])["results"][0]["reason"].startswith("needs hours")


def test_a_reason_is_written_once_for_all_that_it_holds_for():
    few = {"held_out": None, "reason": "too few labels\n  found:    2"}
    results = [result(method, "plain", 1, task=task, **few) for method in ("mean", "ridge") for task in ("a", "b")]
    results += [result("mean", "plain", 5), result("ridge", "plain", 5, held_out=None, reason="no flows")]
    lines = [line for line in markdown(FACTS, results).splitlines() if line.startswith("- ")]
    assert lines == ["- every method (a, b): too few labels; found: 2", "- ridge (crime): no flows"]


def test_coverage_is_shown_with_its_weakest_block():
    strata = [
        Stratum(regions=n, coverage=c, width=w) for n, c, w in ((40, 0.9, 80.0), (4, 0.5, 9.0), (36, 0.944, 88.0))
    ]
    coverage = Coverage(
        nominal=0.9,
        all=strata[0],
        by_size={"small": strata[0], "medium": strata[0], "large": strata[2]},
        by_block=strata[1:],
    )
    results = [result("ridge", "plain", 5, coverage=coverage), result("mean", "plain", 5)]
    line = [line for line in markdown(FACTS, results).splitlines() if line.startswith("| ridge | crime |")]
    assert line == ["| ridge | crime | 90 % | 90 % of 40 | 80.0 | 90 % of 40 | 90 % of 40 | 94 % of 36 | 50 % of 4 |"]
    found = as_json(FACTS, results)["results"]
    assert found[0]["coverage"]["by_block"][0] == {"regions": 4, "coverage": 0.5, "width": 9.0}
    assert found[1]["coverage"] is None


def test_the_json_has_figures_verdicts_and_facts():
    results = [result("topt", "variant", 5), result("ridge", "plain", 20)]
    found = json.loads(json.dumps(as_json(FACTS, results), allow_nan=False))
    assert found["protocol"] == "honest"
    assert found["results"][1]["figures"]["mae"] == {
        "mean": pytest.approx(np.abs(results[1].held_out.prediction - LABELS).mean()),
        "sd": pytest.approx(np.std([m.mae for m in results[1].held_out.metrics()], ddof=1)),
    }
    assert found["verdicts"][0]["baseline"] == "ridge"
    assert found["verdicts"][0]["significant"] is True
    assert found["verdicts"][0]["paired"]["wilcoxon_p"] < 0.05
