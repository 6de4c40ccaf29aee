"""The part of the page about a model's inside: contributions of an ensemble head, attention of an embedding, flows."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from topt_deploy.drawing.scales import GREENS, number, sequential

from .attention import Attention, attended_most, received, spread
from .contributions import Contributions
from .figures import Choropleth, choropleth
from .flow_partners import partners
from .plain_words import percent, scale_name, title_of, view_name
from .run_facts import Facts

Array = np.ndarray[Any, Any]

SHOWN = 2
"""The number of views listed that raise, and that lower, a region's prediction."""
OTHERS = 3
"""The number of regions listed that a region attends to, or exchanges flow with."""

Listed = list[list[tuple[str, float]]]
"""Per region, names and figures, the largest first."""


@dataclass(frozen=True, kw_only=True)
class MadeOf:
    """The part of the page about one ensemble head's contributions.

    Attributes:
        unit: The scale that they add up on.
        views: True if views are told apart: without Gaussian processes they cannot be.
        others: Names of the parts that see all views at once.
        weighed: What each part weighs in the prediction, and the held-out MAE without it.
        parts: Name and standard deviation over the regions, the largest first.
        raised, lowered: Per region, the views that raise and lower it most against the average region.
    """

    unit: str
    views: bool
    others: list[str]
    weighed: list[str]
    parts: list[tuple[str, float]]
    raised: Listed
    lowered: Listed

    def share(self, deviation: float) -> float:
        """Length of a part's bar, in per cent of the longest."""
        longest = self.parts[0][1]
        return 100 * deviation / longest if longest else 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionSection:
    """The part of the page about one embedding's attention.

    Attributes:
        tasks: Titles of the tasks that build on it.
        views: Weight per view, heaviest first.
        spread: Over how many regions a region's attention is spread.
        received: A map; None where regions do not attend to each other, and then ``spread`` is 0.
        attended: Per region, the ids and multiples of an even share that it attends to most.
    """

    tasks: list[str]
    views: list[tuple[str, float]]
    spread: float
    received: Choropleth | None
    attended: Listed


def made_of(task: str, facts: Facts) -> MadeOf | None:
    """Contributions to one task's predictions; None where its head is not an ensemble."""
    found = facts.contributions.get(task)
    if found is None:
        return None
    deviations = [(view_name(view), float(part.std())) for view, part in found.views.items()]
    deviations += [(name, float(part.std())) for name, part in found.others.items()]
    return MadeOf(
        unit=scale_name(facts.run.config.tasks[task].target, found.transform),
        views=bool(found.views),
        others=list(found.others),
        weighed=_weighed(facts.run.facts.get("parts", {}).get(task, {}), facts.tasks[task].report.held_out.mae),
        parts=sorted(deviations, key=lambda part: -part[1]),
        raised=_largest(found, sign=1),
        lowered=_largest(found, sign=-1),
    )


def _weighed(parts: Mapping[str, Mapping[str, float]], mae: float) -> list[str]:
    """A phrase for every part."""
    said = []
    for name, part in parts.items():
        without, weight = part.get("mae_without"), f"{name} {percent(part['weight'])}"
        brings = "" if without is None else f" (held-out MAE without it {number(without)}"
        earns = ")" if without is None or without > mae else ": it earns nothing here)"
        said.append(weight + (brings + earns if brings else ""))
    return said


def exchanged(facts: Facts) -> Listed:
    """Per region, the ids that it exchanges most flow with and their shares; empty where flows are not at hand."""
    if facts.place.flows is None:
        return []
    ids = facts.region_ids
    found = partners(facts.place.flows, regions=len(ids), k=OTHERS)
    return [[(ids[j], share) for j, share in row] for row in found]


def attention_section(attention: Attention, facts: Facts) -> AttentionSection:
    """Figures of one embedding's attention."""
    views = sorted(((view_name(view), weight) for view, weight in attention.views.items()), key=lambda v: -v[1])
    titles = [title_of(task) for task in attention.tasks]
    if attention.regions is None:
        return AttentionSection(tasks=titles, views=views, spread=0, received=None, attended=[])
    n, ids = len(facts.region_ids), facts.region_ids
    most = attended_most(attention.regions, OTHERS)
    attended = [[(ids[j], float(attention.regions[i, j]) * n) for j in row] for i, row in enumerate(most)]
    share = received(attention.regions)
    tips = [
        f"{ids[i]}\nreceives {share[i]:.2f} × an even share\nattends most to "
        + ", ".join(f"{other} ({times:.2f} ×)" for other, times in attended[i])
        for i in range(n)
    ]
    return AttentionSection(
        tasks=titles,
        views=views,
        spread=spread(attention.regions),
        received=choropleth(
            share,
            partial(sequential, colours=GREENS),
            label="Attention received",
            unit="× an even share",
            tips=tips,
        ),
        attended=attended,
    )


def _largest(found: Contributions, *, sign: int) -> Listed:
    """Per region, the views whose contribution is largest on one side of zero."""
    regions = range(len(next(iter(found.views.values()), [])))
    each = [[(view_name(view), float(part[i])) for view, part in found.views.items()] for i in regions]
    return [sorted((v for v in row if sign * v[1] > 0), key=lambda v: -sign * v[1])[:SHOWN] for row in each]
