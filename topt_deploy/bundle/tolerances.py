"""How far from PyTorch's values each precision may be: the exporter's gates and the self-tests measure by the same.

A bundle that asks for less than these is refused: it would pass its own test whatever it computes.
"""

from collections.abc import Mapping
from typing import Any

PREDICTIONS: Mapping[str, float] = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.1, "int4": 0.5}
"""Largest accepted difference of a prediction, relative to its size (:func:`topt_deploy.runtime.golden_checks.size`).

Half has 11 bits, 5e-4, and a score is cubed to a count, which trebles what the layers add up to. A weight in 8 bits is
off by up to 4e-3 of the largest of its output, in 4 bits by 0.06 of that of its block: eight times and a hundred times
half's, of which much averages out over the inputs. Beyond these a precision is of no use to a count."""
PROMPTS: Mapping[str, Mapping[str, float]] = {
    "fp32": {"cosine": 0.999999, "difference": 1e-4},
    "fp16": {"cosine": 0.9999, "difference": 0.05},
    "int8": {"cosine": 0.99, "difference": 0.5},
    "int4": {"cosine": 0.9, "difference": 2.0},
}
"""Smallest cosine and largest difference, relative to the root mean square of PyTorch's vector, that pass."""


def strict_prediction(precision: Any, tolerance: Any) -> bool:
    """Tell if a city's bundle is held to what its precision can do."""
    return type(tolerance) in (int, float) and 0 < tolerance <= PREDICTIONS[precision]


def strict_prompt(precision: Any, tolerance: Mapping[str, Any]) -> bool:
    """Tell if an encoder's bundle is held to what its precision can do."""
    cap = PROMPTS[precision]
    return bool(tolerance["cosine"] >= cap["cosine"] and tolerance["difference"] <= cap["difference"])
