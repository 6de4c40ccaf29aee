"""docs/background/cities.md: the default against plain baselines on many cities, ``make cities``; resumable.

Which cities the default was designed on, and which it is reported on, families.py says. Every figure comes from the
folders of results that this leaves in build/cities/results/, one per city (topt-deploy evaluate). The figures are kept
in cities.csv beside the page, one line per city and task: a run of some cities replaces only theirs. One with
``--baselines none`` measures the default alone, beside baselines that stand; with ``--coverage --seeds 1`` it adds the
coverage to lines of more repetitions and leaves their errors.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from families import DESIGN, FAMILIES, REPORT, draws, family_of, make_family, undrawn
from scipy.stats import binomtest

from topt_deploy.train.evaluation.coverage import SIZES

ROOT = Path(__file__).resolve().parents[2]
TOPT_DEPLOY = Path(sys.executable).with_name("topt-deploy")
MAIN = "topt"
MOST_MAE, LEAST_R2 = 1.02, -0.02
"""How much worse than the best plain baseline the default may be anywhere: times its MAE, and R² below it."""
NOMINAL, OVERALL, BY_THIRD = 0.9, 0.03, 0.05
"""How often intervals should hold, and how far off they may be, among all regions and in a third by size."""
UNLIKELY = 0.05
"""Probability below which a share of labels is not explained by chance."""
AGAINST = ("best_mae", "chosen_mae")
BY_SIZE = tuple(f"inside_{size}" for size in SIZES)
OWN = ("date", "repetitions", "mae", "r2")
"""Of the default's errors."""
COLUMNS = (
    "city", "task", *OWN, "best", "best_mae", "best_r2", "chosen_mae", "labels", "inside", *BY_SIZE
)  # fmt: skip


def make_city(name: str, data: Path, folder: Path) -> Path:
    """The city's folder, made where it is absent."""
    city = folder / name
    if city.exists():
        return city
    partial = folder / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if family := family_of(name):
        make_family(family, partial)
    elif name in ("chicago", "newyork"):
        shape = ["--geometry", data / "MGFN/Data/mh-180/mh-180.shp", "--geometry-order", "position"]
        prompts = ["--prompt4re", data / "Prompt4RE", "--encoder", "llama"]
        own = ["--city", "Chi", *prompts] if name == "chicago" else ["--city", "NY", *shape]
        command = [TOPT_DEPLOY, "import", "hafusion", data / "HAFusion", *own, "--out", partial]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    else:
        shutil.copytree(data / "cities" / name, partial)
    partial.rename(city)
    return city


def evaluate(name: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """``topt-deploy evaluate`` on a city, which goes on where it stopped; :func:`rows` of what it found.

    Coverage costs several times what errors do, and the page has that of the default alone: it comes of its own.
    """
    city = make_city(name, options.data, options.folder / "cities")
    out = options.folder / "results" / name
    command = [TOPT_DEPLOY, "evaluate", city, "--seeds", str(options.seeds), "--out", out]
    commands = [[*command, "--variants", options.variants, "--baselines", options.baselines]]
    if options.coverage:
        commands.append([*command, "--variants", MAIN, "--baselines", "none", "--coverage", str(NOMINAL)])
    for one in commands:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([str(word) for word in one], env=environment, check=True, stdout=subprocess.DEVNULL)
    return rows(name, json.loads((out / "results.json").read_text(encoding="utf-8")))


def rows(name: str, results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Per task, the default's figures beside those of the plain baselines with the lowest MAE and the highest R².

    Without baselines these are left out: lines that stand in cities.csv keep theirs.
    """
    found = []
    of_task: dict[str, dict[str, Any]] = {}
    chosen = {verdict["task"]: verdict["chosen_mae"] for verdict in results["verdicts"]}
    for result in results["results"]:
        if result["figures"] is not None:
            of_task.setdefault(result["task"], {})[result["method"]] = result | result["figures"]
    for task, methods in of_task.items():
        plain = {m: r for m, r in methods.items() if r["group"] == "plain"}
        if MAIN not in methods:
            continue
        own = methods[MAIN]
        row: dict[str, Any] = {
            "city": name,
            "task": task,
            "date": date.today(),
            "repetitions": len(results["seeds"]),
            "mae": own["mae"]["mean"],
            "r2": own["r2"]["mean"],
        }
        if len(plain) > 1:
            best = min(plain, key=lambda m: plain[m]["mae"]["mean"])
            row |= {
                "best": best,
                "best_mae": plain[best]["mae"]["mean"],
                "best_r2": max(r["r2"]["mean"] for r in plain.values()),
                "chosen_mae": chosen[task],
            }
        if own["coverage"] is not None:
            everywhere = own["coverage"]["all"]
            row |= {"labels": everywhere["regions"], "inside": everywhere["coverage"]}
            row |= {f"inside_{size}": part["coverage"] for size, part in own["coverage"]["by_size"].items()}
        found.append({key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in row.items()})
    return found


def read(record: Path) -> list[dict[str, str]]:
    """The lines of cities.csv; none where there is no such file yet."""
    if not record.exists():
        return []
    with record.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def merged(lines: Iterable[dict[str, str]], found: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The lines of cities.csv with what was found in their places. Without baselines a line that stands keeps its own,
    and its error too where that is of more repetitions."""
    by_task = {(line["city"], line["task"]): line for line in lines}
    for line in found:
        place = line["city"], line["task"]
        if "best" in line:
            by_task[place] = line
        elif place in by_task:
            fewer = int(line["repetitions"]) < int(by_task[place]["repetitions"])
            by_task[place] |= {key: value for key, value in line.items() if key not in OWN or not fewer}
    return list(by_task.values())


def write(record: Path, lines: Iterable[Mapping[str, str]]) -> None:
    """Write cities.csv in the order of families.py."""
    order = (*REPORT, *DESIGN)
    with record.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(lines, key=lambda line: order.index(undrawn(line["city"]))))


def of_draws(lines: list[dict[str, str]]) -> list[str]:
    """Markdown of the further cities of families: per family and task, the mean of their changes."""
    written = [
        "| family | task | cities | MAE against the best baseline of each | MAE against the chosen one | cities in"
        " which it is lower than the chosen one's | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault((undrawn(line["city"]), line["task"]), []).append(line)
    for (family, task), own in groups.items():
        ahead = sum(float(line["mae"]) < float(line["chosen_mae"]) for line in own)
        changes = " | ".join(f"{_change(own, other):+.1f} %" for other in AGAINST)
        days = " to ".join(sorted({line["date"] for line in own}))
        written.append(f"| {family} | {task} | {len(own)} | {changes} | {ahead} | {days} |")
    return written


def table(lines: list[dict[str, str]]) -> list[str]:
    """Markdown of one half of the cities."""
    written = [
        "| city | task | ToPT: MAE / R² | best plain baseline: MAE | highest R² | MAE against it | chosen baseline: MAE"
        " | MAE against it | inside 90 % | by size | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        change, honest = (f"{_change([line], other):+.1f} %" if line[other] else "–" for other in AGAINST)
        inside, *by_size = (f"{float(line[key]):.0%}" if line[key] else "–" for key in ("inside", *BY_SIZE))
        cells = [
            line["city"],
            line["task"],
            f"{float(line['mae']):.1f} / {float(line['r2']):.3f}",
            f"{float(line['best_mae']):.1f} ({line['best']})",
            f"{float(line['best_r2']):.3f}",
            change,
            f"{float(line['chosen_mae']):.1f}" if line["chosen_mae"] else "–",
            honest,
            inside,
            ", ".join(by_size) if line["inside"] else "–",
            f"{line['date']}, {line['repetitions']}",
        ]
        written.append(f"| {' | '.join(cells)} |")
    if lines:
        written += ["", summary(lines)]
    return written


def summary(lines: list[dict[str, str]]) -> str:
    """Geometric means, and the tasks in which the goals are missed."""

    def where(missed: Iterable[dict[str, str]]) -> str:
        return "; ".join(f"{line['city']}, {line['task']}" for line in missed) or "nowhere"

    known = [line for line in lines if line["chosen_mae"]]
    chosen = f", and {_change(known, 'chosen_mae'):+.1f} % of {len(known)} against the chosen one" if known else ""
    above = (line for line in lines if float(line["mae"]) > MOST_MAE * float(line["best_mae"]))
    below = (line for line in lines if float(line["r2"]) - float(line["best_r2"]) < LEAST_R2)
    said = (
        f"MAE in the geometric mean of {len(lines)} tasks: {_change(lines, 'best_mae'):+.1f} % against the best"
        f" baseline{chosen}. More than 2 % above the best plain baseline's MAE: {where(above)}. R² more than 0.02 below"
        f" the highest: {where(below)}."
    )
    covered = [line for line in lines if line["inside"]]
    if covered:
        mean = [np.mean([float(line[key]) for line in covered]) for key in ("inside", *BY_SIZE)]
        off = (line for line in covered if _off(float(line["inside"])) > OVERALL)
        off_by_size = (line for line in covered if max(_off(float(line[key])) for key in BY_SIZE) > BY_THIRD)
        said += (
            f" Intervals of 90 % hold {mean[0]:.1%} of the labels in the mean of {len(covered)} tasks, by size"
            f" {', '.join(f'{share:.1%}' for share in mean[1:])}. More than 3 points off: {where(off)}. More than 5"
            f" points off in a third by size: {where(off_by_size)}. {by_chance(covered)}"
        )
    return said


def by_chance(covered: Sequence[dict[str, str]]) -> str:
    """How many thirds miss the goal, and how many of all are further off than chance explains: in a third of 26 regions
    each one counts 4 points."""
    unlikely, strays = 0, 0
    for line in covered:
        for share, regions in zip(BY_SIZE, np.array_split(np.arange(int(line["labels"])), len(BY_SIZE)), strict=True):
            inside = round(float(line[share]) * len(regions))
            strays += _off(inside / len(regions)) > BY_THIRD
            unlikely += binomtest(inside, len(regions), NOMINAL).pvalue < UNLIKELY
    return (
        f"These are {strays} of {len(BY_SIZE) * len(covered)} thirds. Further from {NOMINAL:.0%} than chance explains"
        f" (binomial test, p < {UNLIKELY}): {unlikely} of all."
    )


def _off(share: float) -> float:
    """How far a share is from the nominal one; 0.93 is 0.03 off, and not 0.03 and a rounding error."""
    return round(abs(share - NOMINAL), 9)


def _change(lines: list[dict[str, str]], other: str) -> float:
    """ToPT's MAE against another one in the geometric mean, in percent."""
    return float(100 * (np.exp(np.mean([np.log(float(line["mae"]) / float(line[other])) for line in lines])) - 1))


def page(lines: list[dict[str, str]], baselines: str) -> str:
    """docs/background/cities.md from the lines of cities.csv."""
    text = [
        "# Many cities under `honest`",
        "",
        "Made by `make cities` (cities.py) from [cities.csv](cities.csv), one thread. The last column has the day and"
        f" the number of repetitions. Baselines: `{baselines}`. The best plain baseline of a task is chosen by the very"
        " figures it is compared by, which favours it. The chosen baseline is, in every fold, the one with the lowest"
        " MAE on all other folds: what somebody gets who has the same baselines and no foresight.",
        "",
        "Inside 90 %: the share of labels in intervals of 90 % that their regions had no part in making, by nested"
        " folds of the first repetition; then the same for the thirds of the regions with small, medium and large"
        " predictions.",
        "",
        "A family is the sample city with one property changed (families.py). The [log](../../dev/LOG.md) says which"
        " choices were made on which cities.",
    ]
    for title, names in (("Reported: cities that no choice was made on", REPORT), ("Designed on", DESIGN)):
        text += ["", f"## {title}", "", *table([line for line in lines if line["city"] in names])]
    further = [line for line in lines if undrawn(line["city"]) != line["city"]]
    text += ["", "## Both halves", "", summary([line for line in lines if line not in further])]
    if further:
        text += [
            "",
            "## Families drawn anew",
            "",
            "One city says little of a family of small cities, nor does the best of 37 baselines in it: among so few"
            " labels one of them is always lucky. So further cities of these families were drawn, with other random"
            " numbers, which no choice was made on: `cities.py --draws 4 --seeds 1`. Means are geometric ones over"
            " these cities.",
            "",
            *of_draws(further),
        ]
    return "\n".join(text) + "\n"


def main() -> None:
    """Evaluate the chosen cities; put their lines into cities.csv, and write the page from it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="Folder with HAFusion, Prompt4RE, MGFN and cities.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "cities")
    parser.add_argument("--only", nargs="*", choices=[*REPORT, *DESIGN], default=[*REPORT, *DESIGN])
    parser.add_argument("--draws", type=int, default=0, help="So many further cities of each family in their place.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=MAIN)
    parser.add_argument("--baselines", default="plain")
    parser.add_argument("--coverage", action="store_true", help=f"Also of intervals of {NOMINAL:.0%}.")
    parser.add_argument("--record", type=Path, default=ROOT / "docs" / "background" / "cities.csv")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Cities at once.")
    options = parser.parse_args()
    if options.draws:
        options.only = [one for name in options.only if name in FAMILIES for one in draws(name, options.draws)]
    for folder in ("cities", "results"):
        (options.folder / folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.workers) as pool:
        running = {pool.submit(evaluate, name, options): name for name in options.only}
        for done in as_completed(running):
            write(options.record, merged(read(options.record), done.result()))
            text = page(read(options.record), options.baselines)
            options.record.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
