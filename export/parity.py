"""The parity gate: what serves an exported bundle must say what the model in PyTorch says, on more cities than one."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topt_deploy.bundle.tolerances import PREDICTIONS as TOLERANCES
from topt_deploy.errors import BadBundle
from topt_deploy.model.topt import TopT, predict
from topt_deploy.runtime.backends.onnxruntime import MappedSession
from topt_deploy.runtime.golden_checks import relative_difference, size
from topt_deploy.runtime.predictor import open_predictor

from .golden_cities import SyntheticCity

Array = np.ndarray[Any, Any]

TIES: Mapping[str, float] = {"fp32": 1e-6, "fp16": 1e-2, "int8": 0.1, "int4": 0.5}
"""Predictions of two regions closer than this, relatively, are a tie and have no order to keep: what float32 cannot
tell apart at its best, and with fewer bits what these may change."""
OFF_BY_ROUNDING = 4
"""Two predictions in PyTorch and two in the graph: each may be off by what float32 loses in the layers."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The measured parity on one city.

    Attributes:
        city: Its name in messages.
        regions: N.
        worst: Largest relative difference of any task and region.
        swapped: Pairs of neighbouring ranks whose order differs and that are no tie, over all tasks.
    """

    city: str
    regions: int
    worst: float
    swapped: int


def compare(
    expected: Mapping[str, Array],
    found: Mapping[str, Array],
    city: str,
    precision: str = "fp32",
    rounding: Mapping[str, float] | None = None,
) -> Parity:
    """Compare all that a model puts out, (N,) or (N, K) each, by value and by every column's ranking.

    Args:
        expected, found: By output: tasks, and what else the model puts out.
        city: Its name in messages.
        precision: Of the graph's weights: regions within its :data:`TIES` have no order.
        rounding: Of :func:`rounding`, by task: nor have those that it alone can swap.
    """
    worst, swapped = 0.0, 0
    for task, e in expected.items():
        a, b = e.astype(np.float64), found[task].astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            worst = float("inf")
            continue
        worst = max(worst, relative_difference(a, b))
        tie = max(TIES[precision], OFF_BY_ROUNDING * (rounding or {}).get(task, 0.0))
        for exact, other, sizes in zip(*(np.atleast_2d(x.T) for x in (a, b, size(a))), strict=True):
            order = np.argsort(other, kind="stable")
            ranked = exact[order]  # must not decrease, ties apart
            swapped += int((ranked[:-1] - ranked[1:] > tie * sizes[order][:-1]).sum())
    return Parity(city=city, regions=len(next(iter(expected.values()))), worst=worst, swapped=swapped)


def run_model(model: TopT, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run the model in PyTorch, by task."""
    tensors = {name: torch.tensor(array) for name, array in inputs.items()}
    return {task: predicted.numpy() for task, predicted in predict(model, tensors).items()}


def rounding(model: TopT, inputs: Mapping[str, Array]) -> dict[str, float]:
    """The error of float32 on a city, by task: the model's largest relative difference from itself in float64."""
    wide = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in inputs.items()}
    exact = run_model(deepcopy(model).double(), wide)
    return {task: relative_difference(exact[task], predicted) for task, predicted in run_model(model, inputs).items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class GateCity:
    """A city that the gate sees. What PyTorch says of it is computed once for all forms of a model.

    Attributes:
        model: The model in PyTorch.
        name: In messages.
        inputs: The model's inputs.
        tables: The city's tables; None of the training city, of which a run keeps the inputs alone.
        for_tiles: True if the city is there for the edges of tiles, which engines of TensorRT do not have.
    """

    model: TopT
    name: str
    inputs: Mapping[str, Array]
    tables: SyntheticCity | None = None
    for_tiles: bool = False

    @property
    def regions(self) -> int:
        """N."""
        return len(next(iter(self.inputs.values())))

    @cached_property
    def expected(self) -> dict[str, Array]:
        """All that the model puts out, in PyTorch."""
        return run_model(self.model, self.inputs)

    @cached_property
    def rounding(self) -> dict[str, float]:
        """:func:`rounding`."""
        return rounding(self.model, self.inputs)

    def compare(self, found: Mapping[str, Array], precision: str) -> Parity:
        """:func:`compare`. The rounding, which takes longest, is asked for where an order differs."""
        parity = compare(self.expected, found, self.name, precision)
        return compare(self.expected, found, self.name, precision, self.rounding) if parity.swapped else parity


def parity_gate(
    cities: Sequence[GateCity], serve: Callable[[GateCity], Mapping[str, Array]], precision: str = "fp32"
) -> tuple[Parity, ...]:
    """Compare on every city.

    Args:
        cities: The cities.
        serve: Gives what an exported form puts out for a city.
        precision: Of its weights.

    Raises:
        BadBundle: If any prediction differs by more than :data:`TOLERANCES` of the precision, or any ranking does by
            more than rounding explains.
    """
    measured = tuple(city.compare(serve(city), precision) for city in cities)
    for parity in measured:
        if not parity.worst <= TOLERANCES[precision] or parity.swapped:
            raise BadBundle(
                f"parity gate failed on {parity.city} ({parity.regions} regions, {precision}): no bundle was written",
                expected=f"relative difference ≤ {TOLERANCES[precision]:g} and the same ranking as PyTorch",
                found=f"{parity.worst:.3g}, {parity.swapped} pairs in another order",
                fix="this is a fault of the export; please report it with the run folder"
                if precision == "fp32"
                else "export with a higher --precision",
            )
    return measured


def serving(bundle: Path) -> Callable[[GateCity], Mapping[str, Array]]:
    """A finished bundle as users run it: the runtime opens it and reads a city's tables."""
    predictor = open_predictor(bundle)

    def serve(city: GateCity) -> Mapping[str, Array]:
        if city.tables is None:
            return predictor.computed(city.inputs)
        return predictor.outputs(city.tables.regions, city.tables.mobility)

    return serve


def on_processor(graph: Path) -> Callable[[GateCity], Mapping[str, Array]]:
    """A graph for TensorRT, on the runtime's ONNX Runtime: there need not be a GPU where it is exported."""
    session = MappedSession(graph)
    return lambda city: session.run({name: city.inputs[name] for name in session.inputs}, [*city.expected])
