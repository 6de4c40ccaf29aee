"""The input of a method: a city, or several, without labels, and rows of labels without those that are held out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from topt_deploy.data.cities import stack_cities
from topt_deploy.data.city import City, Schema
from topt_deploy.data.features import POSITION, features

from ..loop import TrainingDevice
from ..progress import Reporter

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A city as every method sees it: features of all regions, and not one label.

    Attributes:
        city: The city; its ``labels`` are empty.
        schema: The columns that were read.
        inputs: :func:`topt_deploy.data.features.features`, float32, on the engine's device.
        engine: Where and how training steps are computed.
        reporter: Who is told of progress.
    """

    city: City
    schema: Schema
    inputs: Mapping[str, Tensor]
    engine: TrainingDevice
    reporter: Reporter

    @classmethod
    def of(cls, city: City, schema: Schema, engine: TrainingDevice, reporter: Reporter) -> "Problem":
        """Leave the labels behind."""
        inputs = {name: torch.tensor(a, device=engine.device) for name, a in features(city).items()}
        return cls(city=replace(city, labels={}), schema=schema, inputs=inputs, engine=engine, reporter=reporter)

    def only(self, cities: Sequence[int]) -> "Problem":
        """Some of several cities, by their numbers: no method finds anything of the others there."""
        blocks = [self.city.blocks[number] for number in cities]
        named = {str(self.city.parts[number].city_id): self.city.parts[number] for number in cities}
        inputs = {name: torch.cat([x[block] for block in blocks]) for name, x in self.inputs.items()}
        return replace(self, city=stack_cities(named), inputs=inputs)

    def distance_m(self) -> Array:
        """Straight distances between the regions (N, N), metres; infinite between those of different cities."""
        position, part = self.inputs[POSITION].double().cpu().numpy(), self.city.part
        distance: Array = np.where(part[:, None] == part, cdist(position, position), np.inf)
        return distance


class Method(Protocol):
    """Something that predicts counts. A protocol calls it; it never sees the protocol's held-out labels."""

    def predict(self, problem: Problem, task: str, labels: Array, seeds: Sequence[int]) -> Array:
        """Fit on every row of labels, and predict every region.

        Args:
            problem: The city.
            task: The task's name, by which prompts are found.
            labels: float64 (S, N), one row per training set; NaN where a label is unknown *or held out*. Rows may be
                computed as one batch; no row may depend on another row's labels.
            seeds: Seed of every row's random numbers (S). Rows of one repetition share a seed; work that needs no
                labels may be shared among them.

        Returns:
            float64 (S, N): predicted counts, never negative.
        """
        ...
