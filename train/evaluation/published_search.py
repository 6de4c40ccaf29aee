"""The published search, which selects on the very labels it reports on: for comparison with published tables only.

The published code draws random settings, and reports the draw whose held-out predictions are best. A trial here is such
a draw for both stages. Its predictions come from :mod:`.published_protocol`, and the trial with the highest R² on the
held-out labels is taken. No other protocol imports this module.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.config.settings import TaskConfig
from topt_deploy.errors import UsageError
from topt_deploy.storage.os_errors import reading, writing
from topt_deploy.storage.text_files import write_json, write_text

from ..metrics import Metrics, metrics
from .evaluate import facts_of
from .problem import Method, Problem
from .published_protocol import (
    EMBEDDING_EVERY,
    LOOK_EVERY,
    MEANING,
    PRESET,
    check_prompts,
    looks,
    predict_folds,
    published_folds,
    selected_embedding,
)
from .results import Store, of_others
from .tables import FIGURES, Spread, table
from .topt_variants import Topt

Array = np.ndarray[Any, Any]

RATES = (3e-5, 2e-2)
"""Between them, rates of stage 2 are drawn log-uniformly."""
SOFT_PROMPTS = (48, 96, 144, 192)
EPOCHS = (1000, 2000, 3000)
EVERY = (EMBEDDING_EVERY, LOOK_EVERY)
"""Epochs between the looks that a trial's embedding is chosen among."""
SEARCHED = (
    "The settings are those of the best of {trials} random trials by R² on the held-out labels: the seeds of both"
    " stages, how often stage 1 is looked at, and stage 2's rate, soft prompt's width and epochs. Trial 0 has the"
    " preset's own. `best` is that trial, `runs` are {runs} runs of its settings with other seeds, under the same"
    " selection of epochs. `last epoch` are the same runs without any selection of epochs: both stages' last, dropout"
    " off; the settings are still those that the held-out labels chose."
)
NOT_SEARCHED = (
    "Of several methods the first is searched. The others, marked – in the column K, have the runs of its best settings"
    " alone, which were chosen for the first and favour it; `best` is the best of these runs."
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The draw of one trial.

    Attributes:
        number: 0 is the preset's own settings.
        embedding_seed, seed: Of stage 1 and of stage 2.
        every: Epochs between the looks at the embedding.
        lr, soft_prompt, epochs: Of stage 2. The width 0 is the embedding's.
    """

    number: int
    embedding_seed: int
    seed: int
    every: int
    lr: float
    soft_prompt: int
    epochs: int

    @classmethod
    def draw(cls, number: int, settings: TaskConfig, seeds: Sequence[int]) -> "Trial":
        """The trial of this number: the same whatever the number of trials.

        Args:
            seeds: The seeds that embeddings are trained with.
        """
        head = settings.prompt4re
        if number == 0:
            return cls(
                number=0, embedding_seed=seeds[0], seed=seeds[0], every=EMBEDDING_EVERY, lr=head.lr,
                soft_prompt=head.soft_prompt, epochs=head.epochs,
            )  # fmt: skip
        random = np.random.default_rng(number)
        return cls(
            number=number,
            embedding_seed=int(random.choice(seeds)),
            seed=number,
            every=int(random.choice(EVERY)),
            lr=float(np.exp(random.uniform(*np.log(RATES)))),
            soft_prompt=int(random.choice(SOFT_PROMPTS)),
            epochs=min(int(random.choice(EPOCHS)), head.epochs),
        )

    def run(self, seed: int) -> "Trial":
        """The same settings with other seeds."""
        return replace(self, embedding_seed=seed, seed=seed)

    def settings(self, settings: TaskConfig) -> TaskConfig:
        """A task's settings with what was drawn."""
        own = replace(settings.prompt4re, lr=self.lr, soft_prompt=self.soft_prompt, epochs=self.epochs)
        return replace(settings, prompt4re=own)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """The result of a trial or a run.

    Attributes:
        selected: Figures under the published selection.
        last: Figures of both stages' last epochs, without dropout; None where that was not asked for.
    """

    trial: Trial
    selected: Metrics
    last: Metrics | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """The search of one method's settings for one task.

    Attributes:
        labels: float64 (N,), NaN where unknown.
        settings: The preset's.
        seeds: Of the runs, and of the embeddings that trials choose among.
        folder: Holds a file per trial and run, written as soon as it is known; what it holds is not computed again.
        cache: Folder of the embeddings.
    """

    problem: Problem
    task: str
    labels: Array
    settings: TaskConfig
    seeds: Sequence[int]
    folder: Path
    cache: Path

    def trials(self, count: int) -> Iterator[Outcome]:
        """The first so many trials."""
        for number in range(count):
            trial = Trial.draw(number, self.settings, self.seeds)
            yield self._outcome(trial, f"trial-{number:04}.json", last=False)

    def runs(self, best: Trial) -> Iterator[Outcome]:
        """A trial's settings with every seed, also without the selection of epochs."""
        for seed in self.seeds:
            yield self._outcome(best.run(seed), f"run-{best.number:04}-{seed}.json", last=True)

    def _outcome(self, trial: Trial, name: str, *, last: bool) -> Outcome:
        file, own = self.folder / name, trial.settings(self.settings)
        depends_on = json.loads(json.dumps({"trial": asdict(trial), "settings": asdict(own)}))
        if not file.exists():
            selected, at_last = self._figures(trial, own, last=last)
            record = {"selected": asdict(selected), "last": None if at_last is None else asdict(at_last)}
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, depends_on | record)
        with reading(file):
            record = json.loads(file.read_text(encoding="utf-8"))
        theirs = {key: record[key] for key in depends_on}
        if theirs != depends_on:
            message = "this trial's results are of other settings"
            raise of_others(message, file, json.dumps(depends_on), json.dumps(theirs))
        at_last = None if record["last"] is None else Metrics(**record["last"])
        return Outcome(trial=trial, selected=Metrics(**record["selected"]), last=at_last)

    def _figures(self, trial: Trial, own: TaskConfig, *, last: bool) -> tuple[Metrics, Metrics | None]:
        """Under the published selection, and, if asked for, at both stages' last epoch."""
        fold = published_folds(self.labels, own)
        truth = np.where(fold >= 0, self.labels, np.nan)
        offered = looks(self.problem, own.srel, seed=trial.embedding_seed, cache=self.cache)
        chosen = selected_embedding(offered, self.labels, own, every=trial.every)
        found = [
            predict_folds(self.problem, self.task, embedding, self.labels, fold, own, trial.seed)
            for embedding in (chosen, *([offered.last] if last else []))
        ]
        return metrics(truth, found[0].selected), metrics(truth, found[1].last) if last else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The result of a search.

    Attributes:
        trials: How many were run; 0 for runs of settings that were found for another method.
        best: The best of them, or of the runs.
        runs: The best trial's settings with every seed.
    """

    method: str
    task: str
    trials: int
    best: Outcome
    runs: Sequence[Outcome]

    def row(self) -> list[str]:
        """Of the table."""
        drawn = self.best.trial
        stage_1 = f"seed {drawn.embedding_seed}, a look every {drawn.every} epochs"
        stage_2 = f"rate {drawn.lr:.2g}, soft prompt {drawn.soft_prompt or 'as E'}, {drawn.epochs} epochs"
        return [
            self.task, self.method, str(self.trials or "–"), _cell([self.best.selected]),
            _cell([run.selected for run in self.runs]), _cell([run.last for run in self.runs if run.last is not None]),
            f"{stage_1}; {stage_2}",
        ]  # fmt: skip


def _cell(several: Sequence[Metrics]) -> str:
    return " / ".join(Spread.of([getattr(m, name) for m in several]).text(FIGURES[name]) for name in FIGURES)


def search(
    problem: Problem,
    labels: Mapping[str, Array],
    hashes: Mapping[str, Any],
    methods: Mapping[str, Method],
    *,
    trials: int,
    seeds: Sequence[int],
    out: Path,
    cache: Path | None = None,
) -> str:
    """Search the settings of the paper's models on a city (:func:`.evaluate.read_problem`).

    Args:
        methods: By name; forms of preset ``paper``. The first is searched, and the others run its best settings.
        trials: K. More of them in the same folder go on from what it holds.
        seeds: Of the runs.
        out: Folder of the results.
        cache: Folder of the embeddings; by default, one in ``out``.

    Returns:
        The page that ``results.md`` in that folder holds; ``results.json`` holds the same for machines.

    Raises:
        UsageError: If a method is not one of the paper's models.
        BadData: If the city lacks prompts that a method reads.
    """
    if other := [name for name, topt in methods.items() if not isinstance(topt, Topt) or topt.preset != PRESET]:
        raise UsageError(
            "the published search is for the paper's own models", expected="--variants 'paper*' --baselines none",
            found=", ".join(other),
        )  # fmt: skip
    facts = facts_of(problem, hashes, protocol="paper", seeds=seeds) | {"searched": True}
    Store.open(out, problem.city.region_id, facts)
    found: list[Found] = []
    clock = _Clock(began=time.monotonic(), total=len(labels) * (trials + len(methods) * len(seeds)))
    for name, topt in methods.items():
        assert isinstance(topt, Topt)
        for task, own in labels.items():
            settings = topt.config(task, 0).tasks[task]
            check_prompts(problem, task, settings)
            one = Search(
                problem=problem, task=task, labels=own, settings=settings, seeds=seeds, folder=out / task / name,
                cache=cache or out / "embeddings",
            )  # fmt: skip
            searched = next((earlier.best.trial for earlier in found if earlier.task == task), None)
            found.append(_follow(one, name, trials if searched is None else searched, clock))
    page = _page(found, len(seeds))
    write_text(out / "results.md", page)
    write_json(out / "results.json", facts | {"results": [asdict(own) for own in found]})
    return page


@dataclass(kw_only=True)
class _Clock:
    """Tells how long it will take.

    Attributes:
        began: When, in seconds.
        total: Trials and runs that there will be.
        done: Those that are done.
    """

    began: float
    total: int
    done: int = 0

    def tick(self) -> str:
        """After one more."""
        self.done += 1
        left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        return f"about {left / 60:.0f} min left"


def _follow(one: Search, name: str, search_in: int | Trial, clock: _Clock) -> Found:
    """Search among so many trials, or run a trial that is given, and tell how it goes."""

    def told(what: str, outcome: Outcome) -> Outcome:
        left = clock.tick()
        figures = f"{one.task}, {name}, {what}: {_cell([outcome.selected])}"
        one.problem.reporter.say(f"{clock.done} of {clock.total}: {figures}; {left}")
        return outcome

    trials = []
    if isinstance(search_in, int):
        trials = [told(f"trial {outcome.trial.number}", outcome) for outcome in one.trials(search_in)]
        search_in = max(trials, key=_score).trial
    runs = [told(f"run with seed {outcome.trial.seed}", outcome) for outcome in one.runs(search_in)]
    best = max(trials or runs, key=_score)
    return Found(method=name, task=one.task, trials=len(trials), best=best, runs=runs)


def _score(outcome: Outcome) -> float:
    return -np.inf if outcome.selected.r2 is None else outcome.selected.r2


def _page(found: Sequence[Found], runs: int) -> str:
    searched = SEARCHED.format(trials=max(own.trials for own in found), runs=runs)
    others = f" {NOT_SEARCHED}" if any(not own.trials for own in found) else ""
    head = ["task", "method", "K", "best", f"runs ({runs})", "last epoch, no dropout", "the best trial's settings"]
    return (
        "\n\n".join(
            [
                "## Protocol `paper`, searched",
                f"{MEANING} {searched}{others}",
                "MAE / RMSE / R², the first two in counts: mean ± standard deviation over the runs.",
                table([head, *(own.row() for own in found)]),
            ]
        )
        + "\n"
    )
