"""An exported prompt encoder: a sealed folder of its own, or the folder ``encoder/`` of a city's bundle."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.families.registry import EXPORTED_TEXT, FAMILIES, TEXT
from topt_deploy.prompts.graph_backend import DECODER, VISION, WHOLE
from topt_deploy.prompts.templates import Templates
from topt_deploy.prompts.tokens import Chat
from topt_deploy.tensorrt.library import TENSORRT

from .manifest import check_engines, check_gated_on
from .sealed import GRAPH_SUFFIX, Sealed, blamed, open_sealed, require, well_formed
from .tolerances import strict_prompt

SCHEMA_VERSION = 1
TOKENIZER = "tokenizer.json"
EMBEDDING = "embedding.weights"
GOLDEN = "golden"
WIDTH_LIMIT = 1 << 17
PIXELS_LIMIT = 1 << 26
"""Of an image as a model reads it, its tiles and frames counted: five times what the largest asks for."""
EDGES = ("patch", "frames", "merge", "window", "side", "patches")
EDGE_LIMIT = 1 << 12


@dataclass(frozen=True, kw_only=True)
class EncoderManifest:
    """The manifest of an exported encoder.

    Attributes:
        schema_version: Version of this record; another one is refused.
        version: topt-deploy's, that wrote it.
        source: Versions that it was made with, and the reference of the parity gate.
        spec: The :class:`EncoderSpec`.
        templates: The templates, in their file's form.
        precision: Of the linear layers' weights.
        kept: Linear layers that are kept in another precision, and which.
        embedding: numpy type and shape of the token embeddings; empty where they are in the graph.
        past: Key heads and width of every past tensor that the decoder reads, by name.
        networks: By name: ``graphs`` (file of each form), and ``weights``, the file that they share; with a form
            ``tensorrt`` also an entry of that name: flavour, profile, library, engines and checked, as a city's bundle
            has them (docs/how-to/tensorrt.md).
        tolerance: ``cosine``, the smallest that passes, and ``difference``, the largest, relative to a vector's
            root mean square.
        parity: The gate's measurements, per golden region.
        golden: Names of the golden regions under ``golden/``.
        exact_without_vnni: True where sums of two products of 8-bit weights fit 16 bits, so that processors without
            VNNI compute the same vectors. Bundles from before this was recorded lack it: their weights may not fit.
        gated_on: Instruction sets of the processor that the gate ran on, of those that its numbers depend on. None
            where the system did not tell them, and in older bundles.
        files: Every other file: size in bytes and SHA-256.
    """

    schema_version: int
    version: str
    source: Mapping[str, Any]
    spec: Mapping[str, Any]
    templates: Mapping[str, Any]
    precision: str
    kept: Mapping[str, str]
    embedding: Mapping[str, Any]
    past: Mapping[str, tuple[int, int]]
    networks: Mapping[str, Mapping[str, Any]]
    tolerance: Mapping[str, float]
    parity: tuple[Mapping[str, Any], ...]
    golden: tuple[str, ...]
    exact_without_vnni: bool = False
    gated_on: tuple[str, ...] | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncoderBundle(Sealed):
    """An opened encoder bundle.

    Attributes:
        manifest: Its manifest.
        spec: The encoder's description.
        templates: The templates that travel with it.
    """

    manifest: EncoderManifest
    spec: EncoderSpec
    templates: Templates


def open_encoder_bundle(path: Path, inside: str = "", *, gated: bool = True) -> EncoderBundle:
    """Open an encoder bundle and check its manifest, its list of files and their sizes.

    Args:
        path: The folder or zip.
        inside: :data:`topt_deploy.bundle.manifest.ENCODER` for that of a city's bundle.
        gated: False where export opens one that is still to pass the parity gate: any other has what it measured.

    Raises:
        NoInput: If there is nothing at ``path``.
        BadBundle: If it is not a sound encoder bundle.
    """
    sealed = open_sealed(path, SCHEMA_VERSION, inside)
    with well_formed(sealed.path):
        manifest = EncoderManifest(**sealed.record)
        require(bool(manifest.parity) or not gated, "parity")
        _check_form(manifest)
        manifest = replace(manifest, parity=tuple(manifest.parity), golden=tuple(manifest.golden))
        manifest = replace(manifest, gated_on=manifest.gated_on and tuple(manifest.gated_on))
        spec = EncoderSpec(**manifest.spec)
    with blamed(sealed.path, "the manifest's image settings"):
        spec.read_settings()
    with blamed(sealed.path, "the manifest's templates"):
        templates = Templates.from_dict(manifest.templates, path)
    return EncoderBundle(**sealed.facts, manifest=manifest, spec=spec, templates=templates)


def _check_form(manifest: EncoderManifest) -> None:
    """Refuse a manifest whose values are not of the kinds that its readers rely on.

    Raises:
        TypeError: Naming the key.
    """
    for key in ("source", "spec", "templates", "kept", "embedding", "past", "networks", "tolerance"):
        require(isinstance(getattr(manifest, key), dict), key)
    require(isinstance(manifest.precision, str) and isinstance(manifest.source.get("reference"), str), "source")
    cosines = [measured.get("cosine") for measured in manifest.parity]
    require(all(type(cosine) in (int, float) for cosine in cosines), "parity")
    _check_spec(manifest.spec)
    require(isinstance(manifest.golden, list) and all(isinstance(name, str) for name in manifest.golden), "golden")
    require(all(type(manifest.tolerance.get(k)) in (int, float) for k in ("cosine", "difference")), "tolerance")
    require(strict_prompt(manifest.precision, manifest.tolerance), "tolerance")
    require(len(manifest.golden) > 0, "golden, without which nothing can be tested,")
    require(isinstance(manifest.exact_without_vnni, bool), "exact_without_vnni")
    check_gated_on(manifest.gated_on)
    require(TOKENIZER in manifest.files, "files")
    for sizes in manifest.past.values():
        require(isinstance(sizes, list) and len(sizes) == 2 and all(type(n) is int for n in sizes), "past")
        require(all(0 < n <= WIDTH_LIMIT for n in sizes), "past")
    needed = {TEXT: {DECODER}, EXPORTED_TEXT: {WHOLE}}.get(manifest.spec["family"], {DECODER, VISION})
    require(needed <= set(manifest.networks), "networks")
    require((WHOLE in manifest.networks) == (WHOLE in needed), "networks")
    if DECODER in needed:
        _check_embedding(manifest)
    for network in manifest.networks.values():
        require(isinstance(network.get("graphs"), dict), "networks")
        require({network.get("weights"), *network["graphs"].values()} <= set(manifest.files), "networks")
        require(all(graph.endswith(GRAPH_SUFFIX) for graph in network["graphs"].values()), "networks")
        require((TENSORRT in network["graphs"]) == (TENSORRT in network), "networks")
        if TENSORRT in network:
            check_engines(network[TENSORRT], manifest.files, "networks")


def _check_embedding(manifest: EncoderManifest) -> None:
    """Refuse token embeddings that are not in their file as the manifest says."""
    shape = manifest.embedding.get("shape")
    require(isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape), "embedding")
    require(manifest.embedding.get("dtype") in ("float16", "float32"), "embedding")
    require(EMBEDDING in manifest.files, "files")
    number = {"float16": 2, "float32": 4}[manifest.embedding["dtype"]]
    require(math.prod(manifest.embedding["shape"]) * number == manifest.files[EMBEDDING]["size"], "embedding")


def _check_spec(spec: Mapping[str, Any]) -> None:
    """Refuse what the host side could not work with."""

    def sound(key: str, value: Any) -> bool:
        if isinstance(value, list):
            return all(sound(key, item) for item in value)
        return type(value) in (int, float) and (
            value > 0 or (value == 0 and key in ("image_token", "mean", "resample"))
        )

    require(all(isinstance(spec.get(key), str) for key in ("family", "name", "weights_sha256")), "spec")
    require(spec["family"] in FAMILIES, "spec")
    require(type(spec.get("width")) is int and 0 < spec["width"] <= WIDTH_LIMIT, "spec")
    require(spec.get("context") is None or (type(spec["context"]) is int and spec["context"] > 0), "spec")
    require(isinstance(spec.get("settings"), dict), "spec")
    require(all(sound(key, value) for key, value in spec["settings"].items()), "spec")
    _check_pixels(spec["settings"])
    for frame in (spec.get("chat"), spec.get("imageless") or spec.get("chat")):
        require(isinstance(frame, dict) and all(isinstance(text, str) for text in frame.values()), "spec")
        Chat(**dict(frame or {}))


def _check_pixels(settings: Mapping[str, Any]) -> None:
    """Refuse preprocessing that would make an image of a few bytes take more memory than any model reads."""
    require(all(settings.get(key, 0) <= EDGE_LIMIT for key in EDGES), "spec")
    images: list[Sequence[int]] = [(settings.get("min_pixels", 0),), (settings.get("max_pixels", 0),)]
    images += [(settings.get("tile", 0), settings.get("tile", 0), settings.get("tiles", 1))]
    images += settings.get("resolutions", [])
    require(all(math.prod(image) * settings.get("frames", 1) <= PIXELS_LIMIT for image in images), "spec")
