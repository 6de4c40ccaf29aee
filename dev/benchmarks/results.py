"""docs/background/results.md: Chicago under every protocol, ``make results``. Goes on where it was interrupted.

Every figure on that page comes from the folders of results that this leaves in build/results/, one per suite. Sections
of suites that the folder does not have stay as they are. Methods are made once, so that what needs no label
(embeddings) is computed once for all suites of a process.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from page_sections import this_processor

from topt_deploy.config.load import load_config
from topt_deploy.prompts.options import TASKS
from topt_deploy.train.cli.evaluate import FIRST_SEED
from topt_deploy.train.evaluation.evaluate import evaluate_problem, read_problem
from topt_deploy.train.evaluation.problem import Method, Problem
from topt_deploy.train.evaluation.published_search import search
from topt_deploy.train.evaluation.registry import METHODS, Entry
from topt_deploy.train.evaluation.topt_variants import VARIANTS, Topt
from topt_deploy.train.loop import TrainingDevice
from topt_deploy.train.progress import Reporter

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).resolve().parents[2]
PAPER = [name for name in METHODS if name.startswith("paper") and name != "paper-rows"]
TABLE_1 = ["paper", "paper-no-prompt4re", "paper-no-task-prompt", "paper-no-alignment"]
EMBEDDINGS = [name for name, entry in METHODS.items() if entry.group == "literature"]
LITERATURE = [*EMBEDDINGS, "srel"]
"""Methods with an embedding take a minute or more per task and seed, as the paper's do: one repetition."""
NEW_YORK = [
    "topt", "topt-no-srel", "topt-no-stages", "topt-no-kernels", "topt-no-networks", "topt-trees", "topt-kernels",
    "ridge+sqrt+flow", "extra-trees+sqrt+flow", "boosting+sqrt", "boosting+sqrt+flow",
]  # fmt: skip
"""The ablations of a city without prompts, and the plain baselines that were the best there in cities.md."""
CITIES = {
    "chicago-llama": ["--city", "Chi", "--prompt4re", "Prompt4RE", "--encoder", "llama"],
    "chicago-qwen": ["--city", "Chi", "--prompt4re", "Prompt4RE", "--encoder", "qwen"],
    "newyork": ["--city", "NY", "--geometry", "MGFN/Data/mh-180/mh-180.shp", "--geometry-order", "position"],
}
"""Options of `topt-deploy import hafusion`; a file or folder is one below the folder of the data."""
QUICK = [name for name in METHODS if name not in LITERATURE and not name.startswith("paper")]


@dataclass(frozen=True)
class Suite:
    """A folder of results: a city of :data:`CITIES`, a protocol, methods and repetitions."""

    title: str
    protocol: str
    methods: list[str]
    seeds: int
    city: str = "chicago-llama"
    coverage: float | None = None
    trials: int = 0  # of the published search; without, none
    tasks: tuple[str, ...] = TASKS


_QWEN_TITLE = "Prompts of Qwen2.5-VL-7B"
SUITES = {
    "paper-searched": Suite("The paper's Table 1, searched: `paper`", "paper", PAPER, seeds=5, trials=40),
    "paper-rows": Suite(
        "Raw counts and rows of the OD matrix: `paper`",
        "paper",
        ["paper-rows"],
        seeds=5,
        trials=20,
        tasks=("check_in",),
    ),
    "paper-qwen": Suite(f"{_QWEN_TITLE}: `paper`", "paper", ["paper"], seeds=5, trials=10, city="chicago-qwen"),
    "paper-literature": Suite("The literature: `paper`", "paper", EMBEDDINGS, seeds=3),
    "honest": Suite("Regions not seen: `honest`", "honest", QUICK, seeds=5),
    "newyork": Suite("New York, without prompts: `honest`", "honest", NEW_YORK, seeds=1, city="newyork"),
    "honest-literature": Suite("The literature: `honest`", "honest", LITERATURE, seeds=1),
    "honest-paper": Suite("The paper's models, at their last epoch: `honest`", "honest", TABLE_1, seeds=1),
    "honest-qwen": Suite(f"{_QWEN_TITLE}: `honest`", "honest", ["topt"], seeds=5, city="chicago-qwen"),
    "coverage": Suite("Intervals: `honest`", "honest", ["topt"], seeds=1, coverage=0.9),
    "spatial": Suite("Areas not seen: `spatial`", "spatial", QUICK, seeds=5),
    "spatial-coverage": Suite("Intervals: `spatial`", "spatial", ["topt"], seeds=1, coverage=0.9),
    "spatial-literature": Suite("The literature: `spatial`", "spatial", LITERATURE, seeds=1),
    "spatial-paper": Suite("The paper's models, at their last epoch: `spatial`", "spatial", TABLE_1, seeds=1),
    "spatial-qwen": Suite(f"{_QWEN_TITLE}: `spatial`", "spatial", ["topt"], seeds=5, city="chicago-qwen"),
}


PUBLISHED = {
    "MVURE": ("100.4 / 129.2 / 0.461", "1693 / 3171 / 0.656", "190.3 / 266.9 / 0.441"),
    "MGFN": ("107.4 / 137.9 / 0.386", "1281 / 2276 / 0.817", "208.2 / 293.4 / 0.329"),
    "HREP": ("88.3 / 114.4 / 0.578", "1679 / 3135 / 0.664", "185.7 / 262.2 / 0.468"),
    "ReCP": ("86.9 / 120.1 / 0.534", "1272 / 2341 / 0.804", "206.7 / 303.4 / 0.284"),
    "RegionDCL": ("121.7 / 159.6 / 0.179", "2427 / 4184 / 0.402", "195.7 / 272.1 / 0.445"),
    "HAFusion": ("77.8 / 107.1 / 0.631", "929 / 1947 / 0.870", "159.3 / 222.0 / 0.613"),
    "FlexiReg": ("61.7 / 85.1 / 0.766", "922 / 1775 / 0.891", "121.1 / 178.2 / 0.753"),
    "ToPT": ("49.3 / 62.7 / 0.874", "424.6 / 634.6 / 0.986", "95.6 / 127.4 / 0.874"),
    "ToPT without Prompt4RE": ("62.5 / 82.4 / 0.781", "753.7 / 1419 / 0.931", "124.5 / 172.6 / 0.768"),
    "ToPT without task-relevant prompt": ("52.2 / 66.0 / 0.858", "520.8 / 911.5 / 0.972", "105.3 / 146.5 / 0.833"),
    "ToPT without alignment": ("56.4 / 77.8 / 0.805", "679.7 / 1315 / 0.941", "111.9 / 155.9 / 0.811"),
}
"""The published figures (Guo et al., arXiv 2602.01610, Table 1, Chicago): crime, check-in, service call."""


HEAD = """# Chicago under every protocol

Made by `make results` (results.py), one thread a process. 77 community areas; HAFusion's `data_Chi`, prompts of
Llama-3.2-11B-Vision from Prompt4RE, unless something else is said. One section is of New York's 180 regions, which have
no prompts. The methods are described in
[evaluation](evaluation.md) and [literature](literature.md). The [log](../../dev/LOG.md) says where the differences
come from.
"""
AS_PUBLISHED = "As published (Guo et al., Table 1; epochs chosen on the test folds as well):"


def page(before: str, folder: Path) -> str:
    """docs/background/results.md: the sections of the suites that the folder has, and those of the page as it was."""
    _, *sections = re.split(r"^## ", before, flags=re.MULTILINE)
    texts = dict(section.split("\n", 1) for section in sections)
    published = "\n".join(
        ["| published | check_in | crime | service_call |", "|---|---|---|---|"]
        + [f"| {method} | {check_in} | {crime} | {calls} |" for method, (crime, check_in, calls) in PUBLISHED.items()]
    )
    for name, suite in SUITES.items():
        file = folder / name / "results.md"
        if not file.exists():
            continue
        measured = date.fromtimestamp(file.stat().st_mtime)
        _, _, own = file.read_text(encoding="utf-8").partition("\n\n")
        texts[suite.title] = f"\nMeasured on {measured}: {this_processor()}, PyTorch {torch.__version__}.\n\n{own}"
        if name == "paper-searched":
            texts[suite.title] += f"\n{AS_PUBLISHED}\n\n{published}\n"
    titles = [suite.title for suite in SUITES.values() if suite.title in texts]
    return "\n".join([HEAD, *(f"## {title}\n{texts[title].rstrip()}\n" for title in titles)])


def import_city(name: str, data: Path, folder: Path) -> Path:
    """A city of :data:`CITIES`, by the user's own command."""
    city = folder / name
    if not city.exists():
        options = [data / option if (data / option).exists() else option for option in CITIES[name]]
        command = ["import", "hafusion", data / "HAFusion", *options, "--out", city]
        subprocess.run([Path(sys.executable).with_name("topt-deploy"), *command], check=True)
    return city


def once(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The same entries with every method made once."""
    return {name: replace(entry, make=partial(_same, entry.make())) for name, entry in entries.items()}


def _same(method: Method) -> Method:
    return method


def search_suite(
    suite: Suite,
    problem: Problem,
    labels: Mapping[str, Array],
    hashes: Mapping[str, Any],
    options: argparse.Namespace,
    *,
    out: Path,
) -> None:
    """Search what the options name. A method with settings of its own is called after them."""
    chosen = {name: VARIANTS[name] for name in options.methods or suite.methods}
    search(
        problem,
        {task: labels[task] for task in options.tasks or suite.tasks},
        hashes,
        {
            ", ".join([name, *options.set]): Topt(topt.preset, *topt.overrides, *options.set)
            for name, topt in chosen.items()
        },
        trials=options.trials or suite.trials,
        seeds=range(FIRST_SEED, FIRST_SEED + (options.runs or suite.seeds)),
        out=out,
        cache=options.folder / "embeddings",  # prompts have no part in stage 1: one training serves all encoders
    )


def main() -> None:
    """Run the chosen suites; write the page when all have their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="Folder with HAFusion, Prompt4RE and MGFN.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "results")
    parser.add_argument("--only", nargs="*", choices=SUITES, default=list(SUITES), help="Suites [default: all].")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, help="Tasks that are searched [the suite's].")
    parser.add_argument("--methods", nargs="*", help="Methods that are searched [the suite's].")
    parser.add_argument("--trials", type=int, help="Trials of a search [the suite's].")
    parser.add_argument("--runs", type=int, help="Runs of a search's best trial [the suite's].")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="Settings of what is searched, for a shorter search."
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    methods, problems = once(METHODS), {}
    reporter = Reporter()
    for name in options.only:
        suite = SUITES[name]
        if suite.city not in problems:
            city = import_city(suite.city, options.data, options.folder)
            engine = TrainingDevice.choose("cpu", None, None)
            problems[suite.city] = read_problem([city], load_config(tasks=TASKS), engine, reporter)
        reporter.say(f"suite {name}")
        if suite.trials:
            search_suite(suite, *problems[suite.city], options, out=options.folder / name)
            continue
        evaluate_problem(
            *problems[suite.city],
            {method: methods[method] for method in suite.methods},
            protocol=suite.protocol,
            seeds=range(FIRST_SEED, FIRST_SEED + suite.seeds),
            nominal=suite.coverage,
            out=options.folder / name,
        )
    (file := ROOT / "docs/background/results.md").write_text(page(file.read_text("utf-8"), options.folder), "utf-8")


if __name__ == "__main__":
    main()
