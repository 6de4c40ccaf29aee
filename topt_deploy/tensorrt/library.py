"""The installed TensorRT library: TensorRT itself, or its sibling TensorRT-RTX."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from topt_deploy.errors import NoDevice, UsageError

TENSORRT, RTX = FLAVOURS = ("tensorrt", "rtx")
MODULES: Mapping[str, str] = {TENSORRT: "tensorrt", RTX: "tensorrt_rtx"}
HINTS: Mapping[str, str] = {
    TENSORRT: (
        "pip install 'topt-deploy[trt]' where NVIDIA's own package index can be reached; it brings TensorRT 11, while"
        " ONNX Runtime's TensorRT provider (onnxruntime-gpu 1.31) loads TensorRT 10's libnvinfer.so.10"
    ),
    RTX: "pip install 'topt-deploy[rtx]'",
}


@dataclass(frozen=True, kw_only=True)
class Library:
    """An installed library.

    Attributes:
        flavour: One of :data:`FLAVOURS`.
        version: Its version; an engine runs with that one.
        module: Its Python module.
    """

    flavour: str
    version: str
    module: ModuleType

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{'TensorRT' if self.flavour == TENSORRT else 'TensorRT-RTX'} {self.version}"


def find_library(flavour: str | None = None) -> Library:
    """The installed library of a flavour.

    Args:
        flavour: One of :data:`FLAVOURS`; None takes the first of them that is installed.

    Raises:
        UsageError: If there is no such flavour.
        NoDevice: If it is not installed, or does not load; each is named with the reason and what to install.
    """
    if flavour is not None and flavour not in FLAVOURS:
        raise UsageError("no such flavour", expected=f"one of {', '.join(FLAVOURS)}", found=flavour)
    asked = FLAVOURS if flavour is None else (flavour,)
    reasons = []
    for one in asked:
        try:
            module = import_module(MODULES[one])
            return Library(flavour=one, version=str(module.__version__), module=module)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            # The bindings import libraries of their own by hand, and say in any of these ways that one is absent.
            reasons.append(f"{MODULES[one]}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    raise NoDevice(
        f"{' or '.join(MODULES[one] for one in asked)} is not installed, or does not load",
        expected=" or ".join(f"Python package {MODULES[one]}" for one in asked),
        found="; ".join(reasons),
        fix="; or ".join(HINTS[one] for one in asked),
    )
