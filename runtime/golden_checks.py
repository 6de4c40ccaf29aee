"""A bundle's golden cities and golden regions, computed by what serves, against PyTorch's values that travel along.

``topt-run selftest`` checks the machine that it runs on by them, and export every bundle before it gets its name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from topt_deploy.bundle.enlarged_city import enlarged
from topt_deploy.bundle.manifest import Bundle
from topt_deploy.bundle.sealed import blamed
from topt_deploy.data.parquet import ParquetFile
from topt_deploy.errors import BadBundle

if TYPE_CHECKING:
    from topt_deploy.bundle.encoder_manifest import EncoderBundle

    from .predictor import Predictor
    from .prompt_encoder import OpenedEncoder

Array = np.ndarray[Any, Any]

SMALL = 0.01
"""Share of the mean prediction below which a prediction is small (:func:`size`)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GoldenCheck:
    """One golden city of the self-test: its size, and the largest relative difference to the exporter's values."""

    city: str
    regions: int
    worst: float


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionCheck:
    """One golden region of an encoder.

    Attributes:
        region: Its name.
        tokens: Of its longest sequence.
        images: How many it has.
        cosine, difference: Of :func:`topt_deploy.prompts.golden_regions.reproduce`.
    """

    region: str
    tokens: int
    images: int
    cosine: float
    difference: float


def check_golden_cities(predictor: "Predictor") -> list[GoldenCheck]:
    """Predict a bundle's golden cities with an opened bundle.

    Enlarged cities are for graphs in tiles. Engines of TensorRT compute every city as a whole, and are made for cities
    up to some size: they are checked on the others alone.

    Raises:
        BadBundle: If a value differs by more than the bundle's tolerance from the exporter's.
    """
    bundle, checks = predictor.bundle, []
    tolerance = float(predictor.variant["tolerance"])
    tiled = {} if "flavour" in predictor.variant else bundle.manifest.enlarged
    for city in (*bundle.manifest.golden, *tiled):
        with blamed(bundle.path, f"golden city {city}"):
            facts = tiled.get(city, {"of": city})
            regions, mobility = _stored(bundle, facts["of"])
            if city in tiled:
                regions, mobility = enlarged(regions, mobility, facts["regions"])
            found, expected = predictor.outputs(regions, mobility), _table(bundle, city, "expected")
            rows = facts.get("rows", slice(None))
            if missing := {*predictor.tasks} - {*expected.column_names}:
                raise ValueError(f"no expected values of {', '.join(sorted(missing))}")
            worst = max(
                relative_difference(_values(expected, name), found[name][rows]) for name in expected.column_names
            )
        if not worst <= tolerance:
            raise BadBundle(
                f"self-test failed on {city}: this machine does not reproduce the exporter's predictions",
                file=bundle.path,
                expected=f"relative difference ≤ {tolerance:g}",
                found=f"{worst:.3g}",
                fix="export with another precision, or report it with the processor's name",
            )
        checks.append(GoldenCheck(city=city, regions=len(regions), worst=worst))
    return checks


def _stored(bundle: Bundle, city: str) -> tuple[pa.Table, pa.Table | None]:
    """The regions and, where the model reads them, the flows of a golden city that travels with a bundle."""
    return _table(bundle, city, "regions"), _table(bundle, city, "mobility") if bundle.manifest.mobility else None


def _table(bundle: Bundle, city: str, part: str) -> pa.Table:
    name = f"golden/{city}.{part}.parquet"
    return ParquetFile(bundle.read(name), name).read()


def _values(table: pa.Table, name: str) -> Array:
    """A column as (N,) or (N, K)."""
    return np.array(table.column(name).to_pylist(), dtype=np.float64)


def relative_difference(expected: Array, found: Array) -> float:
    """The largest, relative to :func:`size`; infinite where one is none."""
    if expected.shape != found.shape:
        raise ValueError(f"{expected.shape} expected values, {found.shape} found")
    worst = float((np.abs(expected - found) / size(expected)).max())
    return worst if np.isfinite(worst) else float("inf")


def size(expected: Array) -> Array:
    """The size of each prediction of a city that a difference is relative to: its own, or a hundredth of their mean, or
    one count, whichever is the largest.

    A prediction far below all others is what is left of two large numbers in float32, whose seven digits are digits of
    those: PyTorch's own is off by more than 1e-4 of it.
    """
    values = np.abs(expected)
    least: Array = np.maximum(values, max(1.0, SMALL * float(values.mean())))
    return least


def check_golden_regions(
    bundle: "EncoderBundle", opened: "OpenedEncoder", failed: Callable[[str], str], fix: str
) -> Iterator[RegionCheck]:
    """Encode an encoder's golden regions with its own templates.

    Args:
        bundle: The encoder's.
        opened: The same, loaded.
        failed: The error's sentence, of a region's name.
        fix: The error's advice.

    Raises:
        BadBundle: If a vector is further from the exporter's than the bundle's tolerance.
    """
    from topt_deploy.prompts.golden_regions import read_golden, reproduce

    regions, expected = read_golden(bundle)
    with blamed(bundle.path, "the golden regions' tasks"):
        questions = [bundle.templates.question(task) for task in expected]
    for i, region in enumerate(regions):
        prompt = opened.encoder.prompt(region.text, region.images, questions)
        cosine, difference = reproduce(
            opened.encoder.backend, prompt, np.stack([vectors[i] for vectors in expected.values()]),
            bundle.manifest.tolerance, file=bundle.path, failed=failed(region.name), fix=fix,
        )  # fmt: skip
        yield RegionCheck(
            region=region.name, tokens=max(len(sequence.ids) for sequence in prompt.sequences),
            images=len(region.images), cosine=cosine, difference=difference,
        )  # fmt: skip
