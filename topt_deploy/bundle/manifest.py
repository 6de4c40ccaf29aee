"""The bundle: a folder ``name.topt/`` (or one zip of it) that says what it holds and proves it.

``manifest.json`` lists every other file with size and SHA-256, and ``manifest.json.sha256`` seals the manifest.
A file that is missing, not listed, changed, a link, or named outside the folder is refused before any model is
opened. Bytes are hashed as they are read, and what was hashed is what is used: nothing can be swapped in between.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from topt_deploy.data.city import Schema
from topt_deploy.data.features import all_widths
from topt_deploy.errors import BadBundle
from topt_deploy.intervals import FOLDS, LEVERAGE, SizeTrend

from .archive import FILE_NAME
from .sealed import GRAPH_SUFFIX, Sealed, open_sealed, require, well_formed
from .tolerances import strict_prediction

SCHEMA_VERSION = 1
CARD = "MODEL_CARD.md"
SUFFIX = ".topt"
ENCODER = "encoder/"
"""The folder of a prompt encoder inside a city's bundle: a sealed folder of its own."""
ENLARGED_LIMIT = 10_000
"""Regions of a golden city that is made when it is needed: a manifest must not make a machine work for hours."""
ENGINE_SUFFIX = ".engine"
"""Of what TensorRT or TensorRT-RTX built of a graph."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """The manifest of a bundle.

    Attributes:
        schema_version: Version of this record; another one is refused.
        version: topt-deploy's, that wrote it.
        source: Its origin: run, city, number of regions, hashes of the tables.
        tasks: By name: the prompt column (or null), the run's figures, its held-out scores, which intervals are made
            of, with their scale; and, where the graph puts out the folds' fits, ``fold_scores``, the same by fold, and
            ``size_trend``, how they grow with the prediction.
        views: Categories of every count view, in order.
        mobility: True if flows are read.
        prompts: By column: ``width``, and ``encoder``, ``template`` (its hash) and ``precision`` where the training
            table named them.
        ranges: Smallest and largest training value of every count and total flow.
        inputs: Names of the graph's inputs, in order. Its outputs are the tasks, in order.
        leverage: ``threshold``, beyond which a region is extrapolated; null where the graph puts out no leverage, and
            the ranges tell instead.
        opset: ONNX operator set.
        variants: By name: graph, weights and where each initialiser lies in them, providers, tolerance and what the
            parity gate measured. One for TensorRT (docs/how-to/tensorrt.md) has ``flavour``, ``precision``, ``profile``
            (:mod:`topt_deploy.tensorrt.profile`), ``library`` and ``engines`` by compute capability where they were
            built, and ``checked``, what looked through the graph.
        golden: Base names of the golden cities under ``golden/``.
        enlarged: Golden cities that are made when they are needed (:mod:`.enlarged_city`), by name: ``of``, the golden
            city whose values they have, ``regions``, how many, and ``rows``, the regions whose expected values are
            under ``golden/``. Older bundles have none.
        encoder: The prompt encoder that goes with it, if any: ``identity``, ``sha256`` of its manifest, and ``bundle``,
            the name of its own bundle, or null where it is inside.
        gated_on: Instruction sets of the processor that the gate ran on, as an encoder's manifest has them.
        files: Every other file: size in bytes and SHA-256.
    """

    schema_version: int
    version: str
    source: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    views: Mapping[str, tuple[str, ...]]
    mobility: bool
    prompts: Mapping[str, Mapping[str, Any]]
    ranges: Mapping[str, tuple[float, float]]
    inputs: tuple[str, ...]
    opset: int
    variants: Mapping[str, Mapping[str, Any]]
    golden: tuple[str, ...]
    encoder: Mapping[str, Any] | None = None
    leverage: Mapping[str, Any] | None = None
    enlarged: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gated_on: tuple[str, ...] | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs, in order."""
        folds = [task + FOLDS for task, facts in self.tasks.items() if "fold_scores" in facts]
        return [*self.tasks, *folds, *([LEVERAGE] if self.leverage else [])]

    @property
    def schema(self) -> Schema:
        """The tables and columns of a city that the model reads."""
        return Schema(
            views={view: tuple(names) for view, names in self.views.items()},
            mobility=self.mobility,
            prompts={column: int(facts["width"]) for column, facts in self.prompts.items()},
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle(Sealed):
    """An opened bundle.

    Attributes:
        manifest: Its manifest.
    """

    manifest: Manifest


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check its manifest, its list of files and their sizes.

    Raises:
        NoInput: If there is nothing at ``path``.
        BadBundle: If it is not a sound bundle.
    """
    sealed = open_sealed(path, SCHEMA_VERSION)
    if sealed.is_encoder:
        raise BadBundle(
            "a prompt encoder's bundle, not a city's",
            file=path,
            fix="name the city's; this one goes to --encoder-bundle",
        )
    with well_formed(sealed.path):
        manifest = Manifest(**sealed.record)
        _check_form(manifest)
        manifest = replace(manifest, inputs=tuple(manifest.inputs), golden=tuple(manifest.golden))
        manifest = replace(manifest, gated_on=manifest.gated_on and tuple(manifest.gated_on))
    return Bundle(**sealed.facts, manifest=manifest)


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(v) in (int, float) for v in value)


def _check_form(manifest: Manifest) -> None:
    """Refuse a manifest whose values are not of the kinds that its readers rely on.

    Raises:
        TypeError: Naming the key.
    """

    def names(value: object) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)

    def size(value: object, low: int = 0) -> bool:
        return type(value) is int and value >= low

    for key in ("source", "tasks", "views", "prompts", "ranges", "variants", "files"):
        require(isinstance(getattr(manifest, key), dict), key)
    for key in ("tasks", "prompts", "variants", "files"):
        require(all(isinstance(v, dict) for v in getattr(manifest, key).values()), key)
    for key in ("inputs", "golden"):
        require(names(getattr(manifest, key)), key)
    require(len(manifest.golden) > 0, "golden, without which nothing can be tested,")
    _check_enlarged(manifest)
    check_gated_on(manifest.gated_on)
    require(all(names(v) for v in manifest.views.values()), "views")
    for facts in manifest.tasks.values():
        scores = facts.get("scores")
        require(_numbers(scores), "tasks")
        folds = facts.get("fold_scores", [scores])
        require(isinstance(folds, list) and bool(folds) and all(map(_numbers, folds)), "tasks")
        if "fold_scores" in facts:
            require(manifest.leverage is not None, "leverage")
            _check_trend(facts.get("size_trend"))
    if manifest.leverage is not None:
        require(isinstance(manifest.leverage, dict), "leverage")
        threshold = manifest.leverage.get("threshold")
        require(isinstance(threshold, int | float) and not isinstance(threshold, bool), "leverage")
        require(not math.isnan(manifest.leverage["threshold"]), "leverage")
    require(isinstance(manifest.mobility, bool), "mobility")
    if manifest.encoder is not None:
        require(isinstance(manifest.encoder, dict), "encoder")
        require(all(isinstance(manifest.encoder.get(key), str) for key in ("identity", "sha256")), "encoder")
        require("bundle" in manifest.encoder, "encoder")
        require(
            manifest.encoder.get("bundle") is None or FILE_NAME.match(manifest.encoder["bundle"]) is not None, "encoder"
        )
    require(all(size(facts.get("width"), 1) for facts in manifest.prompts.values()), "prompts")
    require({*manifest.inputs} <= {*all_widths(manifest.schema), *manifest.prompts}, "inputs")
    ranged = {f"{view}_{name}" for view, categories in manifest.views.items() for name in categories}
    ranged |= {"outflow", "inflow"} if manifest.mobility else set()
    require(ranged <= set(manifest.ranges), "ranges")
    for ends in manifest.ranges.values():
        require(isinstance(ends, list) and len(ends) == 2 and all(type(x) in (int, float) for x in ends), "ranges")
    for variant in manifest.variants.values():
        require({variant.get("graph"), variant.get("weights")} <= set(manifest.files), "variants")
        require(variant["graph"].endswith(GRAPH_SUFFIX), "variants")
        require(isinstance(variant.get("initializers"), dict), "variants")
        require(strict_prediction(variant.get("precision", "fp32"), variant.get("tolerance")), "a variant's tolerance")
        for place in variant["initializers"].values():
            require(isinstance(place, list) and len(place) == 2 and size(place[0]), "variants")
            require(isinstance(place[1], list) and all(size(n) for n in place[1]), "variants")
        if "flavour" in variant:
            require(isinstance(variant.get("precision"), str), "variants")
            check_engines(variant, manifest.files, "variants")


def _check_trend(trend: object) -> None:
    """Refuse what is no :class:`topt_deploy.intervals.SizeTrend`."""
    require(isinstance(trend, dict) and trend.keys() == {f.name for f in fields(SizeTrend)}, "size_trend")
    assert isinstance(trend, dict)
    require(_numbers(list(trend.values())), "size_trend")
    require(trend["deviation"] > 0, "size_trend")


def _check_enlarged(manifest: Manifest) -> None:
    require(isinstance(manifest.enlarged, dict), "enlarged")
    for facts in manifest.enlarged.values():
        require(isinstance(facts, dict) and facts.get("of") in manifest.golden, "enlarged")
        require(type(facts.get("regions")) is int and 0 < facts["regions"] <= ENLARGED_LIMIT, "enlarged")
        rows = facts.get("rows", [])
        require(isinstance(rows, list) and bool(rows), "enlarged")
        require(all(type(row) is int and 0 <= row < facts["regions"] for row in rows), "enlarged")


def check_gated_on(sets: object) -> None:
    """Refuse names of instruction sets that are none.

    Raises:
        TypeError: Naming the key.
    """
    require(sets is None or (isinstance(sets, list) and all(isinstance(name, str) for name in sets)), "gated_on")


def check_engines(record: Mapping[str, Any], files: Mapping[str, Any], key: str) -> None:
    """Refuse what a manifest says of engines where it is not of the kinds that its readers rely on.

    Args:
        record: With flavour, profile, library, engines and checked.
        files: The bundle's.
        key: Of the manifest, for the error.

    Raises:
        TypeError: Naming the key.
    """
    from topt_deploy.tensorrt.library import FLAVOURS
    from topt_deploy.tensorrt.profile import read_profile

    require(record.get("flavour") in FLAVOURS, key)
    require(isinstance(record.get("profile"), dict) and bool(read_profile(record["profile"])), key)
    require(record.get("library") is None or isinstance(record["library"], str), key)
    require(isinstance(record.get("checked"), list) and all(isinstance(by, str) for by in record["checked"]), key)
    engines = record.get("engines")
    require(isinstance(engines, dict) and set(engines.values()) <= set(files), key)
    require(all(name.endswith(ENGINE_SUFFIX) for name in record["engines"].values()), key)
    require(not engines or record["library"] is not None, key)
