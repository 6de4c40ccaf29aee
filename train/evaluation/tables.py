"""The results of an evaluation: Markdown for people, JSON for machines, and a verdict per task."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from topt_deploy.console import decimal

from .coverage import SIZES
from .paired_tests import SIGNIFICANT, Paired, compare
from .protocols import PROTOCOLS
from .registry import MAIN, Group
from .results import MethodResult
from .splits import HeldOut, chosen_by_other_folds

FIGURES = {"mae": 1, "rmse": 1, "r2": 3}
"""Figures of a cell, with their decimals; all but R² are better when smaller."""
ORDER_AND_LEVEL = (
    "Order / level, city by city: Spearman's rank correlation of predictions and labels, and all predicted counts over"
    " all reported ones. Where the level is wrong and the order right, the city's total alone would mend most of the"
    " error."
)
GROUPS: Mapping[Group, str] = {"variant": "ToPT", "literature": "literature", "plain": "plain"}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean over repetitions and their standard deviation; None where the figure has no value, or is a single one."""

    mean: float | None
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        """Of one value per repetition."""
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return cls(mean=None, sd=None)
        return cls(mean=float(np.mean(known)), sd=float(np.std(known, ddof=1)) if len(known) > 1 else None)

    def text(self, digits: int) -> str:
        """Such as ``58.2 ± 0.7``."""
        return decimal(self.mean, digits) + ("" if self.sd is None else f" ± {self.sd:.{digits}f}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The main method against the best plain baseline of the same evaluation, for one task.

    Attributes:
        chosen_mae: MAE of the plain baselines where each fold's is chosen by the errors on the other folds
            (:func:`.splits.chosen_by_other_folds`): the best one of all is only known afterwards. None where there is
            one plain baseline, or one fold.
    """

    task: str
    mae: float
    baseline: str
    baseline_mae: float
    chosen_mae: float | None
    paired: Paired

    def sentence(self) -> str:
        """For people."""
        change, tests = 100 * self.paired.difference, self._tests() + self._chosen()
        if change >= 0:
            return (
                f"{self.task}: the plain baseline wins: {self.baseline} has MAE {self.baseline_mae:.1f}, and {MAIN}"
                f" {self.mae:.1f}, {change:.1f} % more; {tests}"
            )
        return (
            f"{self.task}: {MAIN} has MAE {self.mae:.1f}, {-change:.1f} % below the best plain baseline,"
            f" {self.baseline} with {self.baseline_mae:.1f}; {tests}"
        )

    def _chosen(self) -> str:
        if self.chosen_mae is None:
            return ""
        return f"; the plain baseline that is the best on all other folds has MAE {self.chosen_mae:.1f}"

    def _tests(self) -> str:
        found = "significant" if self.paired.significant else "not significant"
        t = "" if self.paired.corrected_t_p is None else f", corrected resampled t p = {self.paired.corrected_t_p:.2g}"
        return f"the difference is {found} (Wilcoxon over regions p = {self.paired.wilcoxon_p:.2g}{t})"


def by_city(results: Sequence[MethodResult], sizes: Mapping[str, int]) -> list[MethodResult]:
    """Results of several cities, city by city: tasks are called ``<task>, <city>``.

    Args:
        sizes: The cities' numbers of regions, in the order of the rows.
    """
    ends = np.cumsum([*sizes.values()]).tolist()
    found = []
    for task in _tasks(results):
        for city, start, end in zip(sizes, [0, *ends], ends, strict=False):
            for result in results:
                own = result.held_out
                if result.task != task:
                    continue
                if own is not None:
                    fold = np.minimum(own.fold[:, start:end], 0)  # one city is one fold
                    own = HeldOut(labels=own.labels[start:end], fold=fold, prediction=own.prediction[:, start:end])
                found.append(replace(result, task=f"{task}, {city}", held_out=own))
    return [result for result in found if result.held_out is None or not np.isnan(result.held_out.truth()).all()]


def spreads(held_out: HeldOut) -> dict[str, Spread]:
    """Every figure's spread over the repetitions."""
    repetitions = held_out.metrics()
    return {figure: Spread.of([getattr(m, figure) for m in repetitions]) for figure in FIGURES}


def verdicts(results: Sequence[MethodResult]) -> list[Verdict]:
    """A verdict for every task that both the main method and some plain baseline ran on."""
    found = []
    for task in _tasks(results):
        ran = {r.method: r for r in results if r.task == task and r.held_out is not None}
        mae = {name: float(np.mean([m.mae for m in _held_out(r).metrics()])) for name, r in ran.items()}
        plain = [name for name, r in ran.items() if r.group == "plain"]
        if MAIN in ran and plain:
            best = min(plain, key=lambda name: mae[name])
            paired = compare(_held_out(ran[MAIN]), _held_out(ran[best]))
            chosen = _chosen_mae({name: _held_out(ran[name]) for name in plain})
            verdict = Verdict(
                task=task, mae=mae[MAIN], baseline=best, baseline_mae=mae[best], chosen_mae=chosen, paired=paired
            )
            found.append(verdict)
    return found


def _chosen_mae(plain: Mapping[str, HeldOut]) -> float | None:
    """Of :class:`Verdict`."""
    (first, *others) = plain.values()
    if not others or first.fold.max() < 1:
        return None
    chosen, _ = chosen_by_other_folds(plain)
    return float(np.mean([m.mae for m in chosen.metrics()]))


def markdown(facts: Mapping[str, Any], results: Sequence[MethodResult]) -> str:
    """The whole page: protocol, figures, verdicts, coverage, and what did not run.

    Args:
        facts: The facts that the results depend on, :func:`.evaluate.facts`.
    """
    repetitions = len(facts["seeds"])
    blocks = [
        f"## Protocol `{facts['protocol']}`",
        PROTOCOLS[facts["protocol"]].meaning,
        "MAE / RMSE / R², the first two in counts: mean ± standard deviation over repetitions"
        f" ({repetitions}); best in bold.",
        _figures(results),
    ]
    if found := verdicts(results):
        blocks.append(
            f"Against the plain baseline with the lowest MAE of all in this table (significant: p < {SIGNIFICANT} by"
            " Wilcoxon's signed-rank test over regions, each with its error averaged over repetitions):"
        )
        blocks.append("\n".join(f"- {verdict.sentence()}" for verdict in found))
    if "cities" in facts:
        shown = {verdict.baseline for verdict in found} | {r.method for r in results if r.group == "variant"}
        blocks += [ORDER_AND_LEVEL, _order_and_level([r for r in results if r.method in shown])]
    if any(result.coverage for result in results):
        blocks += ["Share of held-out labels inside their intervals, first repetition:", _coverage(results)]
    if reasons := _reasons(results):
        blocks += ["Not run:", "\n".join(reasons)]
    return "\n\n".join(blocks) + "\n"


def _reasons(results: Sequence[MethodResult]) -> list[str]:
    """Why methods could not run: a line for each reason, with the methods and tasks that it holds for."""
    methods: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.reason is not None:
            methods.setdefault((result.task, result.reason), []).append(result.method)
    tasks: dict[tuple[str, str], list[str]] = {}
    everything = len({result.method for result in results})
    for (task, reason), names in methods.items():
        whose = "every method" if len(names) == everything > 1 else ", ".join(names)
        tasks.setdefault((whose, reason), []).append(task)
    return [
        f"- {whose} ({', '.join(names)}): {'; '.join(' '.join(line.split()) for line in reason.splitlines())}"
        for (whose, reason), names in tasks.items()
    ]


def as_json(facts: Mapping[str, Any], results: Sequence[MethodResult]) -> dict[str, Any]:
    """The same for machines."""
    return {
        **facts,
        "results": [
            {
                "method": r.method,
                "group": r.group,
                "task": r.task,
                "seconds": r.seconds,
                "figures": None if r.held_out is None else {k: asdict(s) for k, s in spreads(r.held_out).items()},
                "coverage": None if r.coverage is None else asdict(r.coverage),
                "reason": r.reason,
            }
            for r in results
        ],
        "verdicts": [
            asdict(v) | {"significant": v.paired.significant, "sentence": v.sentence()} for v in verdicts(results)
        ],
    }


def _figures(results: Sequence[MethodResult]) -> str:
    """Methods × tasks."""
    cells = {(r.method, r.task): spreads(r.held_out) for r in results if r.held_out is not None}
    rows = [["method", "", *_tasks(results)]]
    for method, group in {r.method: r.group for r in results}.items():
        figures = [_cell(cells, method, task) for task in _tasks(results)]
        rows.append([method, GROUPS[group], *figures])
    return table(rows)


def _cell(cells: Mapping[tuple[str, str], Mapping[str, Spread]], method: str, task: str) -> str:
    """A method's figures for a task; a dash where it did not run."""
    if (method, task) not in cells:
        return "–"
    parts = []
    for figure, digits in FIGURES.items():
        spread, better = cells[method, task][figure], max if figure == "r2" else min
        among = [mean for (_, other), c in cells.items() if other == task and (mean := c[figure].mean) is not None]
        best = spread.mean is not None and spread.mean == better(among)
        parts.append(f"**{spread.text(digits)}**" if best else spread.text(digits))
    return " / ".join(parts)


def _order_and_level(results: Sequence[MethodResult]) -> str:
    """Methods × tasks."""
    rows = [["method", *_tasks(results)]]
    for method in dict.fromkeys(r.method for r in results):
        ran = {r.task: order_and_level(r.held_out) for r in results if r.method == method and r.held_out is not None}
        cells = [" / ".join(decimal(x, 2) for x in ran[task]) if task in ran else "–" for task in _tasks(results)]
        rows.append([method, *cells])
    return table(rows)


def order_and_level(held_out: HeldOut) -> tuple[float | None, float | None]:
    """Spearman's rank correlation of predictions and labels, and the sum of predictions over that of labels: means over
    the repetitions. None where predictions or labels do not vary, and where there is nothing to divide by."""
    truth = held_out.truth()
    known = ~np.isnan(truth)
    y, predicted = truth[known], held_out.prediction[:, known]
    level = float(predicted.sum(axis=1).mean() / y.sum()) if y.sum() > 0 else None
    if np.ptp(y) == 0 or (np.ptp(predicted, axis=1) == 0).any():
        return None, level
    return float(np.mean([spearmanr(y, own).statistic for own in predicted])), level


def _coverage(results: Sequence[MethodResult]) -> str:
    """Coverage and mean width, of all regions and of its strata."""
    rows = [["method", "task", "nominal", "all", "mean width", *SIZES, "lowest block"]]
    for r in results:
        if (c := r.coverage) is not None:
            shares = [c.all, *c.by_size.values(), min(c.by_block, key=lambda block: block.coverage)]
            whole, *strata = (f"{100 * s.coverage:.0f} % of {s.regions}" for s in shares)
            rows.append([r.method, r.task, f"{100 * c.nominal:g} %", whole, f"{c.all.width:.1f}", *strata])
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _tasks(results: Sequence[MethodResult]) -> list[str]:
    return list(dict.fromkeys(result.task for result in results))


def _held_out(result: MethodResult) -> HeldOut:
    assert result.held_out is not None
    return result.held_out
