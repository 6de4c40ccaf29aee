"""The prompt encoder without PyTorch: ONNX graphs, on ONNX Runtime or on OpenVINO, behind the host side of the core."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from topt_deploy.encoder.bundle import EMBEDDING, TOKENIZER, EncoderBundle, open_encoder_bundle
from topt_deploy.encoder.graphs import GraphBackend, Runner
from topt_deploy.encoder.prompt import Array, Family
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
class Encoder:
    """A loaded prompt encoder.

    Attributes:
        spec, precision, templates: What the bundle says.
        engine: What runs it.
        host: Text and images to token ids and arrays.
        backend: Runs the networks.
        sha256: Of the encoder's manifest.
    """

    spec: EncoderSpec
    precision: str
    templates: Templates
    engine: str
    host: Family
    backend: GraphBackend
    sha256: str


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
    loaded: Runner = MappedSession(path, threads=threads) if engine == ONNXRUNTIME else _OpenVino(path, threads)
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
    """

    def __init__(self, path: Path, threads: int) -> None:
        if find_spec("openvino") is None:
            raise NoDevice("OpenVINO is not installed", expected="openvino", fix="pip install 'topt-deploy[openvino]'")
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        model = openvino.Core().compile_model(str(path), "CPU", settings)
        self._tensor, self._request = openvino.Tensor, model.create_infer_request()
        self.inputs = tuple(port.any_name for port in model.inputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Compute the named outputs."""
        for name, array in inputs.items():
            self._request.set_tensor(name, self._tensor(array, shared_memory=True))
        self._request.infer()
        return {name: np.array(self._request.get_tensor(name).data) for name in outputs}


def open_encoder(path: Path, *, inside: str = "", engine: str = ONNXRUNTIME, threads: int = 0) -> Encoder:
    """Open an exported encoder and load its networks, checking every byte that is used.

    Args:
        path: The encoder's bundle, or the city's that holds it.
        inside: The encoder's folder in a city's bundle (:data:`topt_deploy.encoder.bundle.INSIDE`), else "".
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
    return Encoder(
        spec=bundle.spec,
        precision=bundle.manifest.precision,
        templates=bundle.templates,
        engine=engine,
        host=bundle.spec.host(bundle.read(TOKENIZER)),
        backend=_backend(bundle, engine, threads),
        sha256=bundle.sha256,
    )
