"""docs/background/cities.md: the default against plain baselines on many cities, ``make cities``; resumable.

Which cities the default was designed on, and which it is reported on, families.py says. Every figure comes from the
folders of results that this leaves in build/cities/results/, one per city (topt-deploy evaluate).
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from families import DESIGN, FAMILIES, REPORT, make_family

ROOT = Path(__file__).resolve().parents[2]
TOPT_DEPLOY = Path(sys.executable).with_name("topt-deploy")
MAIN = "topt"
MOST_MAE, LEAST_R2 = 1.02, -0.02
"""How much worse than the best plain baseline the default may be anywhere: times its MAE, and R² below it."""


def make_city(name: str, data: Path, folder: Path) -> Path:
    """The city's folder, made where it is absent."""
    city = folder / name
    if city.exists():
        return city
    partial = folder / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if name in FAMILIES:
        make_family(name, partial)
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


def evaluate(city: Path, out: Path, *, seeds: int, variants: str, baselines: str, coverage: float | None) -> None:
    """``topt-deploy evaluate``, which goes on where it stopped.

    Coverage costs ten times what errors do, and the page has that of the default alone: it comes of its own.
    """
    command = [TOPT_DEPLOY, "evaluate", city, "--seeds", str(seeds), "--out", out]
    subprocess.run([*command, "--variants", variants, "--baselines", baselines], check=True, stdout=subprocess.DEVNULL)
    if coverage:
        command += ["--variants", MAIN, "--baselines", "none", "--coverage", str(coverage)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def rows(name: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per task, the default's figures beside those of the plain baselines with the lowest MAE and the highest R²."""
    found = []
    of_task: dict[str, dict[str, Any]] = {}
    chosen = {verdict["task"]: verdict["chosen_mae"] for verdict in results["verdicts"]}
    for result in results["results"]:
        if result["figures"] is not None:
            of_task.setdefault(result["task"], {})[result["method"]] = result | result["figures"]
    for task, methods in of_task.items():
        plain = {m: r for m, r in methods.items() if r["group"] == "plain"}
        if MAIN not in methods or len(plain) < 2:
            continue
        own = methods[MAIN]
        best = min(plain, key=lambda m: plain[m]["mae"]["mean"])
        r2 = max(r["r2"]["mean"] for r in plain.values())
        found.append(
            {
                "city": name,
                "task": task,
                "mae": own["mae"]["mean"],
                "r2": own["r2"]["mean"],
                "best": best,
                "best_mae": plain[best]["mae"]["mean"],
                "best_r2": r2,
                "chosen_mae": chosen[task],
                "coverage": own.get("coverage"),
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown of one half of the cities."""
    covered = any(row["coverage"] for row in found)
    lines = [
        "| city | task | ToPT: MAE / R² | best plain baseline: MAE | highest R² | MAE against it | chosen baseline: MAE"
        " | MAE against it |" + " inside 90 % |" * covered,
        "|---|---|---|---|---|---|---|---|" + "---|" * covered,
    ]
    for row in found:
        change, honest = (_change([row], other) for other in ("best_mae", "chosen_mae"))
        held = "" if row["coverage"] is None else f"{row['coverage']['all']['coverage']:.0%}"
        lines.append(
            f"| {row['city']} | {row['task']} | {row['mae']:.1f} / {row['r2']:.3f} | {row['best_mae']:.1f}"
            f" ({row['best']}) | {row['best_r2']:.3f} | {change:+.1f} % | {row['chosen_mae']:.1f} | {honest:+.1f} % |"
            + (f" {held} |" if covered else "")
        )
    if found:
        ratio, honest = (_change(found, other) for other in ("best_mae", "chosen_mae"))
        worse = [f"{r['city']}, {r['task']}" for r in found if r["mae"] > MOST_MAE * r["best_mae"]]
        below = [f"{r['city']}, {r['task']}" for r in found if r["r2"] - r["best_r2"] < LEAST_R2]
        lines += [
            "",
            f"MAE in the geometric mean: {ratio:+.1f} %, and {honest:+.1f} % against the chosen"
            " baseline. More than 2 % above the best plain baseline's MAE:"
            f" {'; '.join(worse) or 'nowhere'}. R² more than 0.02 below the highest: {'; '.join(below) or 'nowhere'}.",
        ]
    return lines


def _change(rows: list[dict[str, Any]], other: str) -> float:
    """ToPT's MAE against another one in the geometric mean, in percent."""
    return float(100 * (np.exp(np.mean([np.log(row["mae"] / row[other]) for row in rows])) - 1))


def page(folder: Path, options: argparse.Namespace) -> str:
    """docs/background/cities.md from the folders of results."""
    lines = [
        "# Many cities under `honest`",
        "",
        f"Made by `make cities` (cities.py) on {date.today()}: {os.cpu_count()} cores, one thread, Python"
        f" {platform.python_version()}, {options.seeds} repetition(s). Baselines: `{options.baselines}`. The best plain"
        " baseline of a task is chosen by the very figures it is compared by, which favours it. The chosen baseline is,"
        " in every fold, the one with the lowest MAE on all other folds: what somebody gets who has the same baselines"
        " and no foresight.",
        "",
        "A family is the sample city with one property changed (families.py). The [log](../../dev/LOG.md) says which"
        " choices were made on which cities.",
    ]
    for title, names in (("Reported: cities that no choice was made on", REPORT), ("Designed on", DESIGN)):
        found = []
        for name in names:
            file = folder / name / "results.json"
            found += rows(name, json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []
        lines += ["", f"## {title}", "", *table(found)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Evaluate the chosen cities; write the page of all that have results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="Folder with HAFusion, Prompt4RE, MGFN and cities.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "cities")
    parser.add_argument("--only", nargs="*", choices=[*REPORT, *DESIGN], default=[*REPORT, *DESIGN])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=MAIN)
    parser.add_argument("--baselines", default="plain")
    parser.add_argument("--coverage", type=float)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "background" / "cities.md")
    options = parser.parse_args()
    cities, results = options.folder / "cities", options.folder / "results"
    for folder in (cities, results):
        folder.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        city = make_city(name, options.data, cities)
        evaluate(
            city,
            results / name,
            seeds=options.seeds,
            variants=options.variants,
            baselines=options.baselines,
            coverage=options.coverage,
        )
        options.page.write_text(page(results, options), encoding="utf-8")


if __name__ == "__main__":
    main()
