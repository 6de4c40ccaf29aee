"""The prompt encoder without PyTorch: ONNX graphs, on ONNX Runtime or on OpenVINO, behind the host side of the core."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.bundle import ENCODER, open_bundle, open_sealed
from topt_deploy.encoder.bundle import EMBEDDING, SCHEMA_VERSION, TOKENIZER, EncoderBundle, open_encoder_bundle
from topt_deploy.encoder.encode import PooledEncoder
from topt_deploy.encoder.graphs import GraphBackend, Runner
from topt_deploy.encoder.prompt import Array
from topt_deploy.encoder.spec import EncoderSpec
from topt_deploy.encoder.templates import Templates
from topt_deploy.errors import BadBundle, NoDevice, UsageError

from .session import MappedSession

ONNXRUNTIME, OPENVINO = ENGINES = ("onnxruntime", "openvino")
FORMS = {ONNXRUNTIME: "onnxruntime", OPENVINO: "standard"}
"""Which form of a graph an engine runs."""
CHUNKS = {ONNXRUNTIME: 128, OPENVINO: 2048}
"""Tokens read at once: ONNX Runtime's attention is fastest while its scores fit a core's cache, OpenVINO's is fused."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedEncoder:
    """A loaded prompt encoder.

    Attributes:
        encoder: What encodes.
        templates: Those that travel with it.
        sha256: Of its manifest.
    """

    encoder: PooledEncoder
    templates: Templates
    sha256: str

    @property
    def spec(self) -> EncoderSpec:
        """What encoder it is."""
        return self.encoder.spec


def _backend(bundle: EncoderBundle, engine: str, threads: int) -> GraphBackend:
    facts = bundle.manifest.embedding
    data = bundle.read(EMBEDDING)
    try:
        embedding = np.frombuffer(data, facts["dtype"]).reshape(facts["shape"])
    except ValueError as error:
        raise BadBundle(f"the token embeddings have another size ({error})", file=bundle.path) from error
    networks = {name: _network(bundle, name, engine, threads) for name in bundle.manifest.networks}
    past = bundle.manifest.past
    return GraphBackend(networks, embedding=embedding, past=past, spec=bundle.spec, chunk=CHUNKS[engine])


def _network(bundle: EncoderBundle, name: str, engine: str, threads: int) -> Runner:
    """A network, which the engine maps from files that have been checked and must not change meanwhile."""
    if not bundle.path.is_dir():
        raise UsageError(
            "an encoder's weights are mapped, not unpacked", file=bundle.path, expected="a folder",
            found="a zip file", fix="unzip the bundle",
        )  # fmt: skip
    facts = bundle.manifest.networks[name]
    folder = bundle.path / bundle.inside
    files = [facts["graphs"][FORMS[engine]], facts["weights"]]
    before = [_stamp(folder / file) for file in files]
    bundle.verify(skip=frozenset(bundle.manifest.files) - frozenset(files))
    path = folder / files[0]
    exact = bundle.manifest.precision == "fp32"
    loaded: Runner = (
        MappedSession(path, threads=threads) if engine == ONNXRUNTIME else _OpenVino(path, threads=threads, exact=exact)
    )
    if [_stamp(folder / file) for file in files] != before:
        raise BadBundle("files changed while they were read", file=bundle.path, fix="nothing may write to a bundle")
    return loaded


def _stamp(path: Path) -> tuple[int, ...]:
    facts = os.stat(path, follow_symlinks=False)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


class _OpenVino:
    """A network on OpenVINO.

    Args:
        path: The graph, beside its weights.
        threads: Threads within an operator; 0 leaves the choice to OpenVINO.
        exact: Whether to compute in float32, where OpenVINO would take bfloat16 on processors that are fast at it.
    """

    def __init__(self, path: Path, *, threads: int, exact: bool) -> None:
        if find_spec("openvino") is None:
            raise NoDevice("OpenVINO is not installed", expected="openvino", fix="pip install 'topt-deploy[openvino]'")
        import openvino

        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        if exact:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        model = openvino.Core().compile_model(str(path), "CPU", settings)
        self._tensor, self._request = openvino.Tensor, model.create_infer_request()
        self.inputs = tuple(port.any_name for port in model.inputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Compute the named outputs."""
        for name, array in inputs.items():
            self._request.set_tensor(name, self._tensor(array, shared_memory=True))
        self._request.infer()
        return {name: np.array(self._request.get_tensor(name).data) for name in outputs}


def is_encoder(path: Path) -> bool:
    """Whether a bundle is an encoder's own."""
    return "spec" in open_sealed(path, SCHEMA_VERSION).record


def locate(path: Path) -> tuple[Path, str]:
    """Where the encoder of a bundle is: the bundle's path and the folder inside it, "" for an encoder's own.

    Raises:
        NoInput, BadBundle: If there is no sound bundle.
        UsageError: If it has no encoder.
    """
    if is_encoder(path):
        return path, ""
    facts = open_bundle(path).manifest.encoder
    if facts is None:
        raise UsageError(
            "the bundle has no prompt encoder", file=path, fix="export it with topt-deploy export --prompt-encoder"
        )
    return (path, ENCODER) if facts["bundle"] is None else (path.parent / facts["bundle"], "")


def open_encoder(path: Path, *, inside: str = "", engine: str = ONNXRUNTIME, threads: int = 0) -> OpenedEncoder:
    """Open an exported encoder and load its networks, checking every byte that is used.

    Args:
        path: The encoder's bundle, or the city's that holds it.
        inside: The encoder's folder in a city's bundle (:data:`topt_deploy.bundle.ENCODER`), else "".
        engine: One of :data:`ENGINES`.
        threads: Threads within an operator; 0 leaves the choice to the engine.

    Raises:
        NoInput, BadBundle: If there is none, or it is not sound.
        NoDevice: If the engine is not installed.
        UsageError: If the engine is unknown.
    """
    if engine not in ENGINES:
        raise UsageError("no such engine", expected=f"one of {', '.join(ENGINES)}", found=engine)
    bundle = open_encoder_bundle(path, inside)
    encoder = PooledEncoder(
        spec=bundle.spec,
        precision=bundle.manifest.precision,
        runtime=engine,
        sha256=bundle.sha256,
        host=bundle.spec.host(bundle.read(TOKENIZER)),
        backend=_backend(bundle, engine, threads),
    )
    return OpenedEncoder(encoder=encoder, templates=bundle.templates, sha256=bundle.sha256)
