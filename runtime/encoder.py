"""The prompt encoder without PyTorch: ONNX graphs, on ONNX Runtime or on OpenVINO, behind the host side of the core."""

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.bundle import ENCODER, Bundle, open_bundle, open_sealed, well_formed
from topt_deploy.encoder.bundle import EMBEDDING, SCHEMA_VERSION, TOKENIZER, EncoderBundle, open_encoder_bundle
from topt_deploy.encoder.encode import PooledEncoder
from topt_deploy.encoder.graphs import PAST, PRESENT, GraphBackend, Runner, import_openvino
from topt_deploy.encoder.spec import EncoderSpec
from topt_deploy.encoder.templates import Templates
from topt_deploy.errors import BadBundle, UsageError

from .session import MappedSession

ONNXRUNTIME, OPENVINO = ENGINES = ("onnxruntime", "openvino")
FORMS = {ONNXRUNTIME: "onnxruntime", OPENVINO: "standard"}
"""Which form of a graph an engine runs."""
CHUNKS = {ONNXRUNTIME: 128, OPENVINO: 512}
"""Tokens read at once: ONNX Runtime's attention is fastest while its scores fit a core's cache, OpenVINO's is fused."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedEncoder:
    """A loaded prompt encoder.

    Attributes:
        encoder: What encodes.
        templates: Those that travel with it.
        sha256: Of its manifest.
        checked: Names of the files whose bytes were found to be the manifest's.
    """

    encoder: PooledEncoder
    templates: Templates
    sha256: str
    checked: frozenset[str]

    @property
    def spec(self) -> EncoderSpec:
        """What encoder it is."""
        return self.encoder.spec


@contextmanager
def _mapped(bundle: EncoderBundle, files: frozenset[str]) -> Iterator[Path]:
    """The folder of files that are checked, and that something then maps instead of reading: they must not change."""
    if not bundle.path.is_dir():
        raise UsageError(
            "an encoder's weights are mapped, not unpacked", file=bundle.path, expected="a folder",
            found="a zip file", fix="unzip the bundle",
        )  # fmt: skip
    folder = bundle.path / bundle.inside
    before = [_stamp(folder / file) for file in files]
    bundle.verify(skip=frozenset(bundle.manifest.files) - files)
    yield folder
    if [_stamp(folder / file) for file in files] != before:
        raise BadBundle("files changed while they were read", file=bundle.path, fix="nothing may write to a bundle")


def _stamp(path: Path) -> tuple[int, ...]:
    facts = os.stat(path, follow_symlinks=False)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


M_MMAP_THRESHOLD, BLOCK_BYTES = -3, 1 << 16
"""glibc's number of the parameter, and the size from which a block is the system's own."""


class _OpenVino:
    """A network on OpenVINO.

    A decoder's keys and values, the largest thing in memory, stay OpenVINO's own tensors, in the type that it computes
    in, and are valid until the call after the next one.

    Args:
        path: The graph, beside its weights.
        threads: Threads within an operator; 0 leaves the choice to OpenVINO.
        exact: Whether to compute in float32, where OpenVINO would take bfloat16 on processors that are fast at it.
    """

    def __init__(self, path: Path, *, threads: int, exact: bool) -> None:
        openvino = import_openvino()
        _free_at_once()
        core = openvino.Core()
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        if exact:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        self._tensor, self._kind = openvino.Tensor, core.get_property("CPU", "INFERENCE_PRECISION_HINT")
        if exact:
            self._kind = openvino.Type.f32
        model = core.read_model(path)
        typed = openvino.preprocess.PrePostProcessor(model)
        for port in model.inputs:
            if port.any_name.startswith(PAST):
                typed.input(port.any_name).tensor().set_element_type(self._kind)
        for port in model.outputs:
            if port.any_name.startswith(PRESENT):
                typed.output(port.any_name).tensor().set_element_type(self._kind)
        compiled = core.compile_model(typed.build(), "CPU", settings)
        self.inputs = tuple(port.any_name for port in compiled.inputs)
        self._requests = cycle([compiled.create_infer_request() for _ in range(2)])

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Compute the named outputs."""
        request = next(self._requests)
        for name, value in inputs.items():
            if not isinstance(value, self._tensor):
                empty = name.startswith(PAST)  # only the past before the first token comes as an array
                value = self._tensor(self._kind, value.shape) if empty else self._tensor(value, shared_memory=True)
            request.set_tensor(name, value)
        request.infer()
        found = {name: request.get_tensor(name) for name in outputs}
        return {name: kept if name.startswith(PRESENT) else kept.data.copy() for name, kept in found.items()}


def _free_at_once() -> None:
    """Have glibc give blocks back to the system as soon as they are freed.

    A decoder's tensors grow with every call; glibc would keep the smaller ones, a third of the memory in the end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES)


def info(path: Path) -> tuple[list[str], dict[str, Any]]:
    """What an encoder's bundle is, for people and for machines; every byte of it is checked."""
    bundle = open_encoder_bundle(path)
    bundle.verify()
    m, spec = bundle.manifest, bundle.spec
    worst = min(measured["cosine"] for measured in m.parity)
    lines = [
        f"bundle     {path}, a prompt encoder (schema {m.schema_version}, topt-deploy {m.version})",
        f"sha256     {bundle.sha256}",
        f"encoder    {spec.identity}, family {spec.family}, {spec.width} wide",
        f"precision  {m.precision}; {len(m.kept)} linear maps in another one",
        f"templates  {', '.join(bundle.templates.questions)} (version {bundle.templates.version})",
        f"parity     smallest cosine {worst:.6f}, against {m.source['reference']}",
    ]
    return lines, {"sha256": bundle.sha256, "encoder": spec.identity, "precision": m.precision, "parity": m.parity}


def locate(bundle: Path | Bundle, place: Path | None = None) -> tuple[Path, str]:
    """Where the encoder of a bundle is: a bundle's path, which need not exist, and the folder inside it, or "".

    Args:
        bundle: A city's bundle, opened or not, or an encoder's own.
        place: The encoder's own bundle; None looks beside the city's. Ignored where the city's holds the encoder.

    Raises:
        NoInput, BadBundle: If there is no sound bundle.
        UsageError: If it has no encoder.
    """
    if not isinstance(bundle, Bundle):
        if open_sealed(bundle, SCHEMA_VERSION).is_encoder:
            return bundle, ""
        bundle = open_bundle(bundle)
    facts = bundle.manifest.encoder
    if facts is None:
        raise UsageError(
            "the bundle has no prompt encoder", file=bundle.path,
            fix="export it with topt-deploy export --prompt-encoder",
        )  # fmt: skip
    return (bundle.path, ENCODER) if facts["bundle"] is None else (place or bundle.path.parent / facts["bundle"], "")


def open_encoder(path: Path, *, inside: str = "", engine: str = ONNXRUNTIME, threads: int = 0) -> OpenedEncoder:
    """Open an exported encoder and load it.

    Args:
        path: The encoder's bundle, or the city's that holds it.
        inside: The encoder's folder in a city's bundle (:data:`topt_deploy.bundle.ENCODER`), else "".
        engine, threads: Of :func:`load_encoder`.

    Raises:
        NoInput, BadBundle: If there is none, or it is not sound.
        NoDevice: If the engine is not installed.
        UsageError: If the engine is unknown.
    """
    return load_encoder(open_encoder_bundle(path, inside), engine=engine, threads=threads)


def load_encoder(bundle: EncoderBundle, *, engine: str, threads: int) -> OpenedEncoder:
    """Load the networks of an exported encoder, checking every byte that is used.

    Args:
        bundle: The encoder's.
        engine: One of :data:`ENGINES`.
        threads: Threads within an operator; 0 leaves the choice to the engine.

    Raises:
        BadBundle: If a file is not the manifest's.
        NoDevice: If the engine is not installed.
        UsageError: If the engine is unknown.
    """
    if engine not in ENGINES:
        raise UsageError("no such engine", expected=f"one of {', '.join(ENGINES)}", found=engine)
    m = bundle.manifest
    with well_formed(bundle.path):
        graphs = {name: facts["graphs"][FORMS[engine]] for name, facts in m.networks.items()}
    files = frozenset([EMBEDDING, *graphs.values(), *(facts["weights"] for facts in m.networks.values())])
    networks: dict[str, Runner] = {}
    with _mapped(bundle, files) as folder:
        try:
            embedding = np.memmap(folder / EMBEDDING, m.embedding["dtype"], "r", shape=tuple(m.embedding["shape"]))
        except ValueError as error:
            raise BadBundle(f"the token embeddings have another size ({error})", file=bundle.path) from error
        for name, graph in graphs.items():
            networks[name] = (
                MappedSession(folder / graph, threads=threads)
                if engine == ONNXRUNTIME
                else _OpenVino(folder / graph, threads=threads, exact=m.precision == "fp32")
            )
    encoder = PooledEncoder(
        spec=bundle.spec,
        precision=m.precision,
        runtime=engine,
        sha256=bundle.sha256,
        host=bundle.spec.host(bundle.read(TOKENIZER)),
        backend=GraphBackend(networks, embedding=embedding, past=m.past, spec=bundle.spec, chunk=CHUNKS[engine]),
    )
    return OpenedEncoder(encoder=encoder, templates=bundle.templates, sha256=bundle.sha256, checked=files | {TOKENIZER})
