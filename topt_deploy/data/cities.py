"""Several cities as one that a model is trained on: regions side by side, and no flow from one city to another.

Everything that relates regions to each other (flows, distances, attention) stays inside a city; what is learnt of a
region by itself is learnt from all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from topt_deploy.errors import BadData

from .city import City
from .flows import Flows

MADE_WITH = ("encoders", "templates", "precisions")


def stack_cities(cities: Mapping[str, City]) -> City:
    """One city that stands for several; its regions are called ``<city>/<region>``.

    Args:
        cities: By name, read with one schema. Their order is that of the rows. A city alone stays as it is.

    Raises:
        BadData: If their prompts were made with different encoders, templates or precisions.
    """
    parts = tuple(cities.values())
    if len(parts) == 1:
        return parts[0]
    _check_prompts(cities)
    starts = np.cumsum([0, *(len(part) for part in parts)])[:-1].tolist()
    first = parts[0]
    return City(
        region_id=np.concatenate([np.char.add(f"{name}/", part.region_id) for name, part in cities.items()]),
        input_row=np.concatenate([part.input_row + start for part, start in zip(parts, starts, strict=True)]),
        city_id=", ".join(cities),
        lonlat=np.concatenate([part.lonlat for part in parts]),
        views={view: np.concatenate([part.views[view] for part in parts]) for view in first.views},
        flows=_stack_flows(parts, starts),
        prompts={column: np.concatenate([part.prompts[column] for part in parts]) for column in first.prompts},
        encoders=first.encoders,
        templates=first.templates,
        precisions=first.precisions,
        labels={task: np.concatenate([part.labels[task] for part in parts]) for task in first.labels},
        geometry=None,
        synthetic=any(part.synthetic for part in parts),
        parts=tuple(replace(part, city_id=name, labels={}) for name, part in cities.items()),
    )


def _stack_flows(parts: Sequence[City], starts: Sequence[int]) -> Flows | None:
    flows = [(part.flows, start) for part, start in zip(parts, starts, strict=True) if part.flows is not None]
    if len(flows) < len(parts):
        return None
    return Flows(
        origin=np.concatenate([own.origin + start for own, start in flows]),
        dest=np.concatenate([own.dest + start for own, start in flows]),
        flow=np.concatenate([own.flow for own, _ in flows]),
        target=np.concatenate([own.target for own, _ in flows]),
    )


def _check_prompts(cities: Mapping[str, City]) -> None:
    (first, one), *others = cities.items()
    for name, other in others:
        for what in MADE_WITH:
            ours, theirs = getattr(one, what), getattr(other, what)
            if ours != theirs:
                raise BadData(
                    f"the cities' prompts are of different {what}",
                    expected=f"those of {first}: {dict(ours)}",
                    found=f"those of {name}: {dict(theirs)}",
                    fix="encode all cities with one encoder and one template (topt-deploy encode)",
                )
