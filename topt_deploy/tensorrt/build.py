"""From an ONNX file to an engine, by TensorRT or TensorRT-RTX; or only looked through by their parser.

TensorRT builds for the GPU that it runs on. TensorRT-RTX builds for named compute capabilities, also where there is
no GPU. Networks are strongly typed: every tensor has the type that the graph gives it, and none is chosen by the
builder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topt_deploy.errors import BadBundle, NoDevice, NoInput, UsageError

from .library import RTX, Library
from .profile import Profile, Shapes, shapes

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX builds for: Turing, Ampere, Ada and Blackwell, and not Hopper (9.0)."""
MESSAGES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine.

    Attributes:
        engine: The serialised plan.
        timing_cache: TensorRT's, for the next build on the same kind of GPU; TensorRT-RTX has none.
        messages: The library's messages, from warnings upwards.
    """

    engine: bytes
    timing_cache: bytes | None
    messages: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The result of parsing a graph with the library's parser.

    Attributes:
        inputs: Dimensions of each input, by its name: a number, or the name of a free one.
        layers: How many the network has.
        messages: The parser's messages, from warnings upwards.
    """

    inputs: Mapping[str, tuple[int | str | None, ...]]
    layers: int
    messages: tuple[str, ...]


@dataclass(eq=False)
class _Work:
    """A network and what made it; the library's objects must outlive what comes of them."""

    builder: Any
    network: Any
    parser: Any
    log: Sequence[tuple[int, str]]


def parse(library: Library, graph: Path) -> Parsed:
    """Have the library's parser read a graph.

    Args:
        library: The library.
        graph: The ONNX file, beside its external weights.

    Raises:
        NoInput: If there is no such file.
        BadBundle: If the parser refuses it; names operators and nodes.
        NoDevice: If the library does not start here.
    """
    work = _parse(library, graph)
    return Parsed(inputs=_inputs(work), layers=int(work.network.num_layers), messages=_messages(work))


def build_engine(
    library: Library, graph: Path, profile: Profile, *, capability: str | None = None, timing_cache: bytes | None = None
) -> Built:
    """Build an engine.

    Args:
        library: The library.
        graph: The ONNX file, beside its external weights.
        profile: Sizes of the free dimensions of the graph's inputs, by their names.
        capability: Compute capability to build for, one of :data:`CAPABILITIES`; None builds for the GPU that is here.
            TensorRT builds for that alone.
        timing_cache: Of an earlier build (:attr:`Built.timing_cache`).

    Raises:
        NoInput: If there is no such file.
        UsageError: If the profile lacks a dimension or is not what the graph takes, or the capability is none that the
            library builds for.
        BadBundle: If the library cannot build the graph; names operators and nodes where the parser refuses them.
        NoDevice: If the library does not start here.
    """
    target = None if capability is None else check_capability(library, capability)
    work = _parse(library, graph)
    trt = library.module
    config = work.builder.create_builder_config()
    sizes = shapes(_inputs(work), profile)
    _add_profile(work, config, sizes)
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)
    if library.flavour != RTX:  # whose timing cache does nothing, and is deprecated
        config.set_timing_cache(config.create_timing_cache(timing_cache or b""), False)
    plan = work.builder.build_serialized_network(work.network, config)
    if plan is None:
        raise BadBundle(
            f"{library.title} cannot build an engine of the graph",
            file=graph,
            expected=f"an engine for {f'compute capability {capability}' if capability else 'the GPU that is here'},"
            f" for {_listed(sizes)}",
            found=_errors(trt, work) or "no reason given",
            fix="see whether the GPU and its driver are there, and whether the model takes every size of the profile",
        )
    cache = None if library.flavour == RTX else bytes(config.get_timing_cache().serialize())
    return Built(engine=bytes(plan), timing_cache=cache, messages=_messages(work))


def check_capability(library: Library, capability: str) -> Any:
    """The library's own name of a compute capability.

    Raises:
        UsageError: If it does not build for that one.
    """
    if library.flavour != RTX:
        raise UsageError(
            "TensorRT builds for the GPU that it runs on", expected="no capability", found=capability,
            fix="build on the target, or choose --flavour rtx",
        )  # fmt: skip
    known = library.module.ComputeCapability.__members__
    name = f"SM{capability.replace('.', '')}"
    if capability not in CAPABILITIES or name not in known:
        raise UsageError(
            f"{library.title} does not build for this compute capability",
            expected=f"one of {', '.join(CAPABILITIES)}",
            found=capability,
            fix="name one of these; for Hopper (9.0) use --flavour tensorrt",
        )
    return known[name]


def _parse(library: Library, graph: Path) -> _Work:
    if not graph.is_file():
        raise NoInput("no such graph", file=graph)
    trt = library.module
    log: list[tuple[int, str]] = []
    try:
        builder = trt.Builder(keeping_logger(trt, log))
        # TensorRT 11 knows no other networks, and no flag for them.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
    except (TypeError, RuntimeError) as error:  # what pybind11 makes of a builder that is null
        raise NoDevice(
            f"{library.title} does not start here",
            expected="an NVIDIA GPU and its driver",
            found="; ".join(text for _, text in log[-MESSAGES_SHOWN:]) or str(error),
            fix="run it where there is a GPU; --flavour rtx builds without one",
        ) from error
    parser = trt.OnnxParser(network, builder.logger)
    work = _Work(builder=builder, network=network, parser=parser, log=log)
    if not parser.parse_from_file(str(graph)):
        faults = [parser.get_error(i) for i in range(parser.num_errors)]
        refused = dict.fromkeys(_fault(fault) for fault in faults if fault.node_operator())
        raise BadBundle(
            f"{library.title} cannot read the graph",
            file=graph,
            expected="operators of the standard that it knows",
            found=_shortened(list(refused)) or _shortened([fault.desc() for fault in faults]) or "no reason given",
            fix="export it with --format trt, which uses no other operators",
        )
    if not network.num_outputs:  # a file that is no ONNX at all is read without a word
        raise BadBundle(f"{library.title} found no network in the file", file=graph, fix="export it again")
    return work


def _fault(fault: Any) -> str:
    """Operator, node, and the reason where the parser gives one."""
    name = fault.node_name()
    reason = " ".join(line.strip() for line in fault.desc().splitlines() if not _harmless(line))
    return f"{fault.node_operator()} (node {name or f'number {fault.node()}'})" + (
        f": {reason}" if reason and reason != "false" else ""
    )


def _harmless(text: str) -> bool:
    """True for the message that there is no driver, which comes with every other one."""
    return "cudaError 35" in text


def _inputs(work: _Work) -> dict[str, tuple[int | str | None, ...]]:
    found = {}
    for i in range(work.network.num_inputs):
        tensor = work.network.get_input(i)
        sizes = enumerate(tuple(tensor.shape))
        found[tensor.name] = tuple(
            int(size) if size >= 0 else (tensor.get_dimension_name(axis) or None) for axis, size in sizes
        )
    return found


def _add_profile(work: _Work, config: Any, sizes: Mapping[str, Shapes]) -> None:
    profile = work.builder.create_optimization_profile()
    for name, of in sizes.items():
        profile.set_shape(name, of.min, of.opt, of.max)
    if sizes and config.add_optimization_profile(profile) < 0:
        raise UsageError("the library rejects the profile", expected="a valid one", found=_listed(sizes))


def _listed(sizes: Mapping[str, Shapes]) -> str:
    each = (f"{name} {list(of.min)}, {list(of.opt)}, {list(of.max)}" for name, of in sizes.items())
    return "; ".join(each) or "inputs of fixed size"


def keeping_logger(trt: Any, log: list[tuple[int, str]]) -> Any:
    """A logger that keeps warnings and errors, and prints nothing."""

    class Kept(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                log.append((int(severity), message))

    return Kept()


def _errors(trt: Any, work: _Work) -> str:
    worst = int(trt.ILogger.ERROR)
    return _shortened([text for severity, text in work.log if severity <= worst and not _harmless(text)])


def _messages(work: _Work) -> tuple[str, ...]:
    return tuple(text for _, text in work.log)


def _shortened(texts: Sequence[str]) -> str:
    shown = "; ".join(texts[:MESSAGES_SHOWN])
    return shown if len(texts) <= MESSAGES_SHOWN else f"{shown}; and {len(texts) - MESSAGES_SHOWN} more"
