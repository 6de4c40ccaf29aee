"""The input of a method: a city without its labels, and rows of labels without those that are held out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from topt_deploy.data.city import City, Schema
from topt_deploy.data.features import features

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
