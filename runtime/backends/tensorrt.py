"""Runs networks with TensorRT: by its own Python package, or else by ONNX Runtime's provider of it.

The package of pip is TensorRT 11 (or TensorRT-RTX), and the provider of onnxruntime-gpu 1.31 loads TensorRT 10's
libnvinfer.so.10: as a rule one machine has one of them, and the log says which was taken, and why not the other.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topt_deploy.bundle.encoder_manifest import EncoderBundle
from topt_deploy.bundle.manifest import Bundle
from topt_deploy.bundle.sealed import Sealed
from topt_deploy.errors import NoDevice
from topt_deploy.hardening.onnx_operators import graph_inputs
from topt_deploy.prompts.graph_backend import DECODER, VISION, Connector
from topt_deploy.tensorrt.build import build_engine
from topt_deploy.tensorrt.cuda_driver import Driver, Gpu, driver
from topt_deploy.tensorrt.library import TENSORRT, Library, find_library
from topt_deploy.tensorrt.profile import Profile, as_record, read_profile, shapes

from ..device_choice import reason
from ..memory_mapping import mapped
from .onnxruntime import check_device, no_device
from .onnxruntime_bound import BoundConnector, BoundSession
from .tensorrt_cache import EngineCache, Fingerprint, cache_folder, cache_limit, own_folder
from .tensorrt_engine import Engine, EngineConnector

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorRTNetwork:
    """A network for TensorRT.

    Attributes:
        graph: Its file, beside its weights, both checked.
        graph_sha256, weights_sha256: Of the two, as the manifest has them.
        precision: Of the weights.
        profile: Sizes of its free dimensions.
        engines: Engines that were built ahead of time, checked too, by compute capability.
        library: Name and version of what built them, which alone runs them.
    """

    graph: Path
    graph_sha256: str
    weights_sha256: str
    precision: str
    profile: Profile
    engines: Mapping[str, Path] = field(default_factory=dict)
    library: str | None = None

    def fingerprint(self, gpu: Gpu, flavour: str, version: str) -> Fingerprint:
        """Everything that an engine depends on which this library builds for this GPU."""
        return Fingerprint(
            graph=self.graph_sha256, weights=self.weights_sha256, flavour=flavour, version=version, cuda=gpu.cuda,
            driver=gpu.driver, gpu=gpu.name, capability=gpu.capability, precision=self.precision,
            profile=as_record(self.profile),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnRuntime:
    """TensorRT's own Python package.

    Attributes:
        library: The package.
        driver: The GPU's.
        how: For the log.
    """

    library: Library
    driver: Driver
    how: str

    @property
    def runtime(self) -> str:
        """A word for it: vectors of one are not taken for another's."""
        return self.library.flavour

    def between(self, networks: Mapping[str, Any]) -> Connector:
        """Create the steps between an encoder's networks."""
        return EngineConnector(self.driver, networks[DECODER], networks.get(VISION))

    def open(self, target: TensorRTNetwork) -> Engine:
        """A network on the GPU: its engine from the bundle, from this machine's cache, or built.

        Raises:
            NoDevice, BadBundle, CannotCreate, IOFailure: Saying what is wrong.
        """
        gpu, source = self.driver.gpu, target.graph
        shipped = target.engines.get(gpu.capability)
        if shipped is not None and target.library == self.library.title:
            log.info("%s: the bundle's engine for compute capability %s", source.name, gpu.capability)
            return Engine(self.library, shipped.read_bytes(), self.driver, source=shipped)
        if shipped is not None:
            log.info("%s: the bundle's engine is for %s, not %s", source.name, target.library, self.library.title)
        cache = EngineCache(cache_folder(), cache_limit())
        engine = cache.engine(
            target.fingerprint(gpu, self.library.flavour, self.library.version),
            lambda timing: build_engine(self.library, target.graph, target.profile, timing_cache=timing),
        )
        return Engine(self.library, engine, self.driver, source=source)


@dataclass(frozen=True, kw_only=True)
class Provider:
    """ONNX Runtime's provider of TensorRT, which keeps engines itself, in a folder of this network's own.

    Attributes:
        how: For the log.
        threads: Of the sessions.
    """

    how: str
    threads: int
    runtime: str = "onnxruntime-tensorrt"

    def between(self, networks: Mapping[str, Any]) -> Connector:
        """Create the steps between an encoder's networks."""
        return BoundConnector(networks[DECODER], networks.get(VISION), device="cuda", threads=self.threads)

    def open(self, target: TensorRTNetwork) -> BoundSession:
        """A network on the GPU.

        Raises:
            NoDevice, BadBundle, CannotCreate, IOFailure: Saying what is wrong.
        """
        import onnxruntime

        # Two models of one graph would share an entry of ONNX Runtime's own cache, which knows no weights.
        fingerprint = target.fingerprint(driver().gpu, "onnxruntime", onnxruntime.__version__)
        kept = own_folder(own_folder(cache_folder()) / fingerprint.key)
        options = {
            "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(kept),
            "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(kept),
            **provider_shapes(target),
        }  # fmt: skip
        exact = target.precision == "fp32"
        return BoundSession(target.graph, device="tensorrt", threads=self.threads, exact=exact, tensorrt=options)


def provider_shapes(target: TensorRTNetwork) -> dict[str, str]:
    """The profile as ONNX Runtime's provider is told it: ``hidden:1x1x64,positions:1x1x1``."""
    sizes = shapes(graph_inputs(target.graph.read_bytes()), target.profile)
    return {
        f"trt_profile_{name}_shapes": ",".join(
            f"{tensor}:{'x'.join(map(str, getattr(of, name)))}" for tensor, of in sizes.items()
        )
        for name in ("min", "opt", "max")
    }


def find_way(flavours: Sequence[str] = (), *, threads: int) -> OwnRuntime | Provider:
    """Find a way to run TensorRT on this machine.

    Args:
        flavours: Of the library that the bundle was exported for, which are taken before others.
        threads: Of ONNX Runtime's sessions.

    Raises:
        NoDevice: If nothing does: no GPU, or neither package nor provider; each with the reason.
    """
    gpu_driver = driver()
    reasons: dict[str, None] = {}
    for flavour in (*flavours, None):
        try:
            library = find_library(flavour)
            return OwnRuntime(library=library, driver=gpu_driver, how=f"{library.title} by its own Python package")
        except NoDevice as absent:
            reasons[reason(absent)] = None
    own = list(reasons)[-1]
    try:
        check_device("tensorrt")
    except NoDevice as refused:
        raise no_device("tensorrt", f"{own}; ONNX Runtime's provider: {refused.found}") from refused
    return Provider(
        how=f"ONNX Runtime's TensorRT provider, for there is no package of TensorRT's own: {own}", threads=threads
    )


class HostSession:
    """A network between arrays of the host: the fused model's, as :class:`.onnxruntime.Session` is.

    Args:
        runner: The network on the GPU.
        how: Of the way that it was opened.
        variant: Of the bundle's.
        checked: The bundle's files that it took, which were the manifest's.
    """

    def __init__(
        self, runner: Engine | BoundSession, how: str, *, variant: str = "", checked: frozenset[str] = frozenset()
    ) -> None:
        self._runner, self.how, self.variant, self.checked = runner, how, variant, checked
        self.provider, self.inputs, self.outputs = runner.provider, runner.inputs, runner.outputs

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Compute the named outputs.

        Raises:
            BadData, BadBundle, NoDevice: Saying what is wrong.
        """
        return self._runner.host(inputs, outputs)


def open_model(bundle: Bundle, *, threads: int) -> HostSession:
    """The fused model on TensorRT.

    Args:
        bundle: The city's.
        threads: Of ONNX Runtime's sessions.

    Raises:
        NoDevice: If the bundle was not exported for it, or it is not here.
        UsageError: If the bundle is a zip.
        BadBundle: If a file is not the manifest's.
    """
    variants = {name: facts for name, facts in bundle.manifest.variants.items() if "flavour" in facts}
    if not variants:
        raise no_variant("the bundle", bundle.path, ", ".join(bundle.manifest.variants))
    way = find_way([facts["flavour"] for facts in variants.values()], threads=threads)
    # Of several the one for the library that is here; TensorRT builds of the other one's graph too.
    name = next((n for n, facts in variants.items() if facts["flavour"] == way.runtime), next(iter(variants)))
    facts = variants[name]
    files = frozenset([facts["graph"], facts["weights"], *facts["engines"].values()])
    with mapped(bundle, files) as folder:
        target = _target(bundle, folder, facts["graph"], facts["weights"], facts["precision"], facts)
        session = HostSession(way.open(target), way.how, variant=name, checked=files)
    return session


def _target(
    bundle: Sealed, folder: Path, graph: str, weights: str, precision: str, record: Mapping[str, Any]
) -> TensorRTNetwork:
    """A network of a bundle; the record has its profile, and what was built of it."""
    listed = bundle.record["files"]
    return TensorRTNetwork(
        graph=folder / graph,
        graph_sha256=listed[graph]["sha256"],
        weights_sha256=listed[weights]["sha256"],
        precision=precision,
        profile=read_profile(record["profile"]),
        engines={capability: folder / file for capability, file in record["engines"].items()},
        library=record["library"],
    )


def encoder_files(bundle: EncoderBundle) -> tuple[frozenset[str], list[str]]:
    """The files that an encoder's networks need on TensorRT, and the flavours that they were exported for.

    Raises:
        NoDevice: If they were not exported for it.
    """
    networks = bundle.manifest.networks
    if not all(TENSORRT in facts for facts in networks.values()):
        forms = {form for facts in networks.values() for form in facts["graphs"]}
        raise no_variant("the prompt encoder", bundle.path, ", ".join(sorted(forms)))
    files: set[str] = set()
    for facts in networks.values():
        files |= {facts["graphs"][TENSORRT], facts["weights"], *facts[TENSORRT]["engines"].values()}
    return frozenset(files), [facts[TENSORRT]["flavour"] for facts in networks.values()]


def encoder_targets(bundle: EncoderBundle, folder: Path) -> dict[str, TensorRTNetwork]:
    """An encoder's networks for TensorRT, in a folder whose files were checked."""
    return {
        name: _target(
            bundle, folder, facts["graphs"][TENSORRT], facts["weights"], bundle.manifest.precision, facts[TENSORRT]
        )
        for name, facts in bundle.manifest.networks.items()
    }


def tokens_at_once(decoder: TensorRTNetwork) -> int:
    """The number of tokens that a decoder's profile lets it read at once."""
    _, tokens, _ = graph_inputs(decoder.graph.read_bytes())["hidden"]
    return decoder.profile[str(tokens)].max


def no_variant(what: str, path: Path, found: Any) -> NoDevice:
    """The error of a bundle without anything for TensorRT."""
    return NoDevice(
        f"{what} has no form for TensorRT", file=path, expected="one exported with --format trt", found=found,
        fix="topt-deploy export --format trt, or use --device cuda or cpu",
    )  # fmt: skip
