"""The model card that travels in every bundle."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from topt_deploy.bundle.manifest import Manifest
from topt_deploy.console import decimal
from topt_deploy.errors import printable
from topt_deploy.intended_use import INTENDED_USE

from .parity import Parity


def model_card(manifest: Manifest, parity: Sequence[Parity], synthetic: bool) -> str:
    """Markdown: what the model was trained on, what to expect of it, and what it is for."""
    source = manifest.source
    title = _plain(source.get("city_id") or "a city without a name")
    lines = [f"# ToPT for {title}", ""]
    if synthetic:
        lines += ["**Trained on a synthetic city. Its predictions say nothing about any real place.**", ""]
    lines += [
        f"Trained on {source['regions']} regions by topt-deploy {manifest.version}"
        f" (preset {source['preset']}, seed {source['seed']}).",
        "",
        "## What to expect",
        "",
        f"Protocol: {_plain(source['protocol'])}.",
        "",
        "| task | MAE held out | RMSE | R² | MAE of boosted trees | MAE of the mean | R² in sample (no quality) |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(task, facts["report"]) for task, facts in manifest.tasks.items()]
    for task, facts in manifest.tasks.items():
        if parts := facts.get("parts"):
            lines += ["", f"What the parts of {task} weigh, and the MAE held out without each:", ""]
            lines += ["| part | weight | MAE without |", "|---|---|---|"]
            lines += [f"| {name} | {part['weight']:.0%} | {_without(part)} |" for name, part in parts.items()]
    lines += ["", "## Intended use", "", "\n\n".join(INTENDED_USE), "", "## What it reads", ""]
    lines += [
        f"- {_plain(view)}: {len(names)} categories: {', '.join(map(_plain, names))}"
        for view, names in manifest.views.items()
    ]
    lines += ["- flows between the regions"] if manifest.mobility else []
    lines += [
        f"- {_plain(column)}: {facts['width']} numbers from"
        f" {_plain(facts.get('encoder') or 'an encoder that the data did not name')}"
        for column, facts in manifest.prompts.items()
    ]
    lines += [
        "",
        "## Parity of this export with PyTorch",
        "",
        "| city | regions | largest relative difference |",
    ]
    lines += ["|---|---|---|", *(f"| {_plain(p.city)} | {p.regions} | {p.worst:.1e} |" for p in parity)]
    return "\n".join(lines) + "\n"


def _without(part: Mapping[str, float]) -> str:
    return f"{part['mae_without']:.1f}" if "mae_without" in part else ""


def _plain(text: str) -> str:
    """Somebody else's text as Markdown that shows it: no tags, links, tables or lines of its own."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(printable(str(text)), quote=False))


def _row(task: str, report: Mapping[str, Any]) -> str:
    held, fit = report["held_out"], report["in_sample"]
    plain = f"{report['trees']['mae']:.1f} | {report['mean']['mae']:.1f}"
    model = f"{held['mae']:.1f} | {held['rmse']:.1f} | {decimal(held['r2'])}"
    return f"| {_plain(task)} | {model} | {plain} | {decimal(fit['r2'])} |"
