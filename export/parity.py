"""The parity gate: the exported graph must say what the model in PyTorch says, on more cities than one."""

import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from topt_deploy.bundle.tolerances import PREDICTIONS as TOLERANCES
from topt_deploy.errors import BadBundle
from topt_deploy.model.topt import TopT, predict

from .onnx_graph import WEIGHTS, Graph

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
        worst = max(worst, _relative(b, a))
        tie = max(TIES[precision], OFF_BY_ROUNDING * (rounding or {}).get(task, 0.0))
        for exact, other in zip(np.atleast_2d(a.T), np.atleast_2d(b.T), strict=True):
            ranked = exact[np.argsort(other, kind="stable")]  # must not decrease, ties apart
            swapped += int((ranked[:-1] - ranked[1:] > tie * np.maximum(np.abs(ranked[:-1]), 1.0)).sum())
    return Parity(city=city, regions=len(next(iter(expected.values()))), worst=worst, swapped=swapped)


def _relative(found: Array, exact: Array) -> float:
    """The largest difference relative to the exact number, or to one count where it is smaller."""
    return float((np.abs(found - exact) / np.maximum(np.abs(exact), 1.0)).max())


def run_graph(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run the exported graph on the CPU as any ONNX tool would, from its two files; by task."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(graph.model)
        path.with_name(WEIGHTS).write_bytes(graph.weights)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    read = {value.name: inputs[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, read), strict=True))


def run_model(model: TopT, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run the model in PyTorch, by task."""
    tensors = {name: torch.tensor(array) for name, array in inputs.items()}
    return {task: predicted.numpy() for task, predicted in predict(model, tensors).items()}


def rounding(model: TopT, inputs: Mapping[str, Array]) -> dict[str, float]:
    """The error of float32 on a city, by task: the model's largest relative difference from itself in float64."""
    wide = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in inputs.items()}
    exact = run_model(deepcopy(model).double(), wide)
    return {task: _relative(predicted, exact[task]) for task, predicted in run_model(model, inputs).items()}


def parity_gate(
    model: TopT, graph: Graph, cities: Mapping[str, Mapping[str, Array]], precision: str = "fp32"
) -> Sequence[Parity]:
    """Compare on every city.

    Raises:
        BadBundle: If any prediction differs by more than :data:`TOLERANCES` of the precision, or any ranking does by
            more than rounding explains.
    """
    measured = [
        compare(run_model(model, x), run_graph(graph, x), city, precision, rounding(model, x))
        for city, x in cities.items()
    ]
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
