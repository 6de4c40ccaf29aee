"""The options of ``--format trt``, and the engines and checks that this machine can make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from topt_deploy.bundle.manifest import ENGINE_SUFFIX
from topt_deploy.errors import NoDevice, UsageError
from topt_deploy.tensorrt.build import build_engine, check_capability, parse
from topt_deploy.tensorrt.library import RTX, TENSORRT, Library, find_library
from topt_deploy.tensorrt.profile import Profile, as_record

CHECKER = "onnx.checker"


@dataclass(frozen=True, kw_only=True)
class EngineTarget:
    """The target of engines.

    Attributes:
        flavour: One of :data:`topt_deploy.tensorrt.library.FLAVOURS`.
        precision: Of the products.
        profile: ``--profile``'s texts (:func:`topt_deploy.tensorrt.profile.parse_profile`).
        capabilities: Compute capabilities that engines are built for ahead of time; TensorRT builds for the GPU that is
            here.
    """

    flavour: str
    precision: str
    profile: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse, before the work, what could not be built after it.

        Raises:
            UsageError: If capabilities are named for TensorRT or none for TensorRT-RTX, or one that it does not know.
            NoDevice: If engines are asked of a TensorRT-RTX that is not installed.
        """
        if self.flavour == RTX and not self.capabilities:
            raise UsageError(
                "--flavour rtx builds engines ahead of time, and is to be told what for",
                expected="one or more --capability", found="none", fix="--capability 8.0 --capability 8.9, for example",
            )  # fmt: skip
        if self.flavour == TENSORRT and self.capabilities:
            raise UsageError(
                "TensorRT builds for the GPU that it runs on", expected="no --capability",
                found=", ".join(self.capabilities), fix="leave it out, or choose --flavour rtx",
            )  # fmt: skip
        if self.flavour == RTX:
            library = find_library(RTX)
            for capability in self.capabilities:
                check_capability(library, capability)

    @property
    def variant(self) -> str:
        """The variant's name in a manifest."""
        return f"{self.flavour}-{self.precision}"


@dataclass(frozen=True, kw_only=True)
class Made:
    """The engines and checks of one graph.

    Attributes:
        library: Name and version of what built the engines; None where the target does.
        engines: Their files, by compute capability.
        checked: The parser or checker that checked the graph.
    """

    library: str | None
    engines: Mapping[str, Path]
    checked: tuple[str, ...]

    @property
    def told(self) -> str:
        """For people."""
        checked = f"checked by {' and '.join(self.checked)}"
        if not self.engines:
            return f"{checked}; no engine is built here: the target builds it at first use"
        return f"{checked}; engines by {self.library} for {', '.join(self.engines)}"

    def as_record(self, profile: Profile, folder: Path) -> dict[str, Any]:
        """As it stands in a manifest, files by their names within the bundle's folder."""
        return {
            "profile": as_record(profile),
            "library": self.library,
            "engines": {name: path.relative_to(folder).as_posix() for name, path in self.engines.items()},
            "checked": list(self.checked),
        }


def make_engines(target: EngineTarget, graph: Path, profile: Profile) -> Made:
    """Check a graph, and build its engines beside it where that can be done here.

    Args:
        target: The target of the engines.
        graph: The ONNX file, beside its weights. Engines are written as ``<graph>.sm80.engine``.
        profile: Sizes of its inputs' dimensions.

    Raises:
        BadBundle: If a parser refuses the graph, or no engine can be built of it.
        UsageError: If the profile is not the graph's.
        NoDevice: If TensorRT-RTX, whose engines are asked for, is not there.
    """
    onnx.checker.check_model(str(graph), full_check=True)
    checked = [CHECKER]
    if target.flavour == RTX:
        library: Library | None = find_library(RTX)
        capabilities: Sequence[str] = target.capabilities
    else:
        library, capabilities = _here()
    parser = library or _installed(RTX)
    if parser is not None:
        parse(parser, graph)
        checked.append(f"{parser.title}'s parser")
    engines = {}
    for capability in capabilities if library is not None else ():
        assert library is not None
        place = graph.with_name(f"{graph.stem}.sm{capability.replace('.', '')}{ENGINE_SUFFIX}")
        asked = capability if target.flavour == RTX else None
        place.write_bytes(build_engine(library, graph, profile, capability=asked).engine)
        engines[capability] = place
    return Made(library=library.title if library and engines else None, engines=engines, checked=tuple(checked))


def _here() -> tuple[Library | None, Sequence[str]]:
    """TensorRT and the compute capability of the GPU, where both are here."""
    library = _installed(TENSORRT)
    if library is None or not torch.cuda.is_available():
        return None, ()
    major, minor = torch.cuda.get_device_capability()
    return library, (f"{major}.{minor}",)


def _installed(flavour: str) -> Library | None:
    try:
        return find_library(flavour)
    except NoDevice:
        return None
