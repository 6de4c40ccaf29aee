"""The prompt encoder without PyTorch: ONNX graphs, on ONNX Runtime or on OpenVINO, behind the host side of the core."""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topt_deploy.arguments import Location
from topt_deploy.bundle.encoder_manifest import EMBEDDING, TOKENIZER, EncoderBundle, open_encoder_bundle
from topt_deploy.bundle.sealed import blamed, well_formed
from topt_deploy.errors import BadBundle, NoDevice, UsageError
from topt_deploy.prompts.encode import Encoder, PooledEncoder
from topt_deploy.prompts.encoder_spec import EncoderSpec, check_image_token
from topt_deploy.prompts.graph_backend import (
    DECODER,
    VISION,
    WHOLE,
    WHOLE_INPUTS,
    Connector,
    GraphBackend,
    Runner,
    WholeGraph,
)
from topt_deploy.prompts.pooling import Backend, WholeReader
from topt_deploy.prompts.prompt import Array
from topt_deploy.prompts.templates import Templates

from .backends.openvino import OpenVinoNetwork
from .device_choice import CPU, CUDA, TENSORRT, Chosen, choose
from .encoder_bundles import find_encoder
from .memory_mapping import mapped, survives
from .processor import processor_name, saturates_8_bit_sums

ONNXRUNTIME, OPENVINO = ENGINES = ("onnxruntime", "openvino")
FORMS = {ONNXRUNTIME: "onnxruntime", OPENVINO: "standard"}
"""The form of a graph that each backend runs."""
STANDARD, HALF = "standard", "tensorrt"
"""The forms that CUDA runs. The second, if present, computes products in half precision for weights in fp16."""
MULTIPLIES_IN_8_BITS = b"MatMulIntegerToFloat"
"""The operator of ONNX Runtime that multiplies 8-bit numbers, as a graph's file names it."""
GPU_CHUNK = 512
CHUNKS = {ONNXRUNTIME: 128, OPENVINO: 384}
"""Tokens read at once: ONNX Runtime's attention is fastest while its scores fit a core's cache; OpenVINO's is fused,
and with more tokens at once hardly faster, but in more memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedEncoder:
    """A loaded prompt encoder.

    Attributes:
        encoder: The encoder.
        templates: Those that travel with it.
        sha256: Of its manifest.
        checked: Names of the files whose bytes were found to be the manifest's.
        device: Where it runs, and why there.
    """

    encoder: PooledEncoder
    templates: Templates
    sha256: str
    checked: frozenset[str]
    device: Chosen

    @property
    def spec(self) -> EncoderSpec:
        """The encoder's description."""
        return self.encoder.spec


class _Embedding:
    """Token embeddings (vocabulary, H), read from their file by the row: a map would bring each row's neighbours along.

    Args:
        path: A file of nothing else, held open.
        dtype: Of its numbers.
        width: H.
    """

    def __init__(self, path: Path, *, dtype: str, width: int) -> None:
        self._dtype, self._width = np.dtype(dtype), width
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, ids: Array) -> Array:
        """Rows (n, H) of int64 (n,)."""
        size = self._width * self._dtype.itemsize
        rows = [os.pread(self._file, size, size * token) for token in ids.tolist()]
        if any(len(row) < size for row in rows):
            raise BadBundle(
                "the tokenizer gives tokens that the model does not have", found=int(ids.max()), file=TOKENIZER,
                fix="export the encoder again",
            )  # fmt: skip
        return np.frombuffer(b"".join(rows), self._dtype).reshape(-1, self._width)


@contextmanager
def encoder_for(
    bundle: Location,
    *,
    device: str,
    threads: int,
    encoder_engine: str,
    require_signature: Location | None,
) -> Iterator[tuple[Encoder, Templates]]:
    """A bundle's encoder and its templates (:func:`topt_deploy.prompts.encode_regions.encode`)."""
    check_engine(encoder_engine, device)
    found = find_encoder(Path(bundle), None if require_signature is None else Path(require_signature))
    opened = load_encoder(found, engine=encoder_engine, device=device, threads=threads)
    yield opened.encoder, opened.templates


def open_encoder(
    path: Path, *, inside: str = "", engine: str = ONNXRUNTIME, device: str = CPU, threads: int = 0
) -> OpenedEncoder:
    """Open an exported encoder and load it.

    Args:
        path: The encoder's bundle, or the city's that holds it.
        inside: The encoder's folder in a city's bundle (:data:`topt_deploy.bundle.manifest.ENCODER`), else "".
        engine, device, threads: Of :func:`load_encoder`.

    Raises:
        NoInput, BadBundle: If there is none, or it is not sound.
        NoDevice: If the engine is not installed, or the device not there.
        UsageError: If the engine is unknown, or is not for the device.
    """
    return load_encoder(open_encoder_bundle(path, inside), engine=engine, device=device, threads=threads)


def check_engine(engine: str, device: str) -> None:
    """Refuse an engine that there is not, or not for the device.

    Raises:
        UsageError: Saying which there are.
    """
    if engine not in ENGINES:
        raise UsageError("no such engine", expected=f"one of {', '.join(ENGINES)}", found=engine)
    if engine == OPENVINO and device != CPU:
        raise UsageError(
            "OpenVINO runs the encoder on the CPU alone", expected="--device cpu", found=f"--device {device}",
            fix="leave --encoder-engine out",
        )  # fmt: skip


def load_encoder(
    bundle: EncoderBundle, *, engine: str, threads: int, device: str = CPU, form: str | None = None
) -> OpenedEncoder:
    """Load the networks of an exported encoder, checking every byte that is used.

    Args:
        bundle: The encoder's.
        engine: One of :data:`ENGINES`.
        threads: Threads within an operator; 0 leaves the choice to the engine.
        device: One of :data:`.device_choice.DEVICES`.
        form: The form of the graphs, where it is another than the engine's own: the exporter's gate tries those for
            GPUs on the processor.

    Raises:
        BadBundle: If a file is not the manifest's.
        NoDevice: If the engine is not installed, or the device not there.
        UsageError: If the engine is unknown, or is not for the device.
    """
    check_engine(engine, device)
    ways = {
        CPU: lambda: _on_cpu(bundle, engine, threads, form or FORMS[engine]),
        CUDA: lambda: _on_cuda(bundle, threads),
        TENSORRT: lambda: _on_tensorrt(bundle, threads),
    }
    if WHOLE in bundle.manifest.networks:
        ways |= dict.fromkeys((CUDA, TENSORRT), lambda: _no_gpu(bundle))
    loaded, chosen = choose(device, ways, what="prompt encoder")
    m = bundle.manifest
    tokenizer = bundle.read(TOKENIZER)
    with blamed(bundle.path, TOKENIZER):
        survives(lambda: bundle.spec.host(tokenizer), bundle.path, TOKENIZER)
        host = bundle.spec.host(tokenizer)
        check_image_token(bundle.spec, tokenizer)
    encoder = PooledEncoder(
        spec=bundle.spec,
        precision=m.precision,
        runtime=loaded.runtime,
        sha256=bundle.sha256,
        host=host,
        backend=_backend(bundle, loaded),
    )
    return OpenedEncoder(
        encoder=encoder, templates=bundle.templates, sha256=bundle.sha256, checked=loaded.files | {TOKENIZER},
        device=chosen,
    )  # fmt: skip


def _backend(bundle: EncoderBundle, loaded: "_Loaded") -> Backend | WholeReader:
    """The backend of the networks."""
    if WHOLE in loaded.networks:
        graph = loaded.networks[WHOLE]
        if unknown := {*graph.inputs} - WHOLE_INPUTS:
            raise BadBundle(
                "the encoder's graph asks for what there is not", file=bundle.path,
                expected=", ".join(sorted(WHOLE_INPUTS)), found=", ".join(sorted(unknown)),
            )  # fmt: skip
        return WholeGraph(graph)
    assert loaded.embedding is not None
    return GraphBackend(
        loaded.networks, embedding=loaded.embedding, past=bundle.manifest.past, spec=bundle.spec, chunk=loaded.chunk,
        between=loaded.between,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """An encoder's networks, loaded.

    Attributes:
        runtime: The runtime: vectors of one are not taken for another's.
        networks, embedding, chunk, between: Of :class:`.graphs.GraphBackend`; no embedding where the graph has it.
        files: That were checked.
        how: For the log.
    """

    runtime: str
    networks: Mapping[str, Runner]
    embedding: _Embedding | None
    chunk: int
    files: frozenset[str]
    between: Connector | None = None
    how: str = ""


def _graphs(bundle: EncoderBundle, form: str) -> dict[str, str]:
    """Each network's graph in a form."""
    with well_formed(bundle.path):
        return {name: facts["graphs"][form] for name, facts in bundle.manifest.networks.items()}


def _needed(bundle: EncoderBundle, graphs: Mapping[str, str]) -> frozenset[str]:
    weights = (facts["weights"] for facts in bundle.manifest.networks.values())
    own = [] if WHOLE in graphs else [EMBEDDING]
    return frozenset([*own, *graphs.values(), *weights])


def _embedding(bundle: EncoderBundle, folder: Path) -> _Embedding | None:
    if WHOLE in bundle.manifest.networks:
        return None
    facts = bundle.manifest.embedding
    return _Embedding(folder / EMBEDDING, dtype=facts["dtype"], width=facts["shape"][1])


def _on_cpu(bundle: EncoderBundle, engine: str, threads: int, form: str) -> _Loaded:
    m, graphs = bundle.manifest, _graphs(bundle, form)
    files = _needed(bundle, graphs)
    networks: dict[str, Runner] = {}
    with mapped(bundle, files) as folder:
        embedding = _embedding(bundle, folder)
        if engine == ONNXRUNTIME:
            _check_8_bit_sums(bundle, [folder / graph for graph in graphs.values()])
        for name, graph in graphs.items():
            if engine == ONNXRUNTIME:
                from .backends.onnxruntime import MappedSession

                networks[name] = MappedSession(folder / graph, threads=threads)
            else:
                weights = folder / m.networks[name]["weights"]
                networks[name] = OpenVinoNetwork(
                    folder / graph, weights=weights, threads=threads, precision=m.precision
                )
    return _Loaded(runtime=engine, networks=networks, embedding=embedding, chunk=CHUNKS[engine], files=files)


def _check_8_bit_sums(bundle: EncoderBundle, graphs: Sequence[Path]) -> None:
    """Refuse 8-bit weights whose sums this processor would cut off: vectors would be wrong without a word.

    Raises:
        BadBundle: If the bundle is from a topt-deploy that did not limit its weights, and the processor has no VNNI.
    """
    if bundle.manifest.exact_without_vnni or not saturates_8_bit_sums():
        return
    if any(MULTIPLIES_IN_8_BITS in graph.read_bytes() for graph in graphs):
        raise BadBundle(
            "the encoder's 8-bit weights are too large for this processor, which would compute wrong vectors",
            file=bundle.path, expected="an encoder that is exact without VNNI, or a processor with VNNI",
            found=f"an encoder of topt-deploy {bundle.manifest.version} on {processor_name()}",
            fix="export the encoder again, or run it with --encoder-engine openvino",
        )  # fmt: skip


def _no_gpu(bundle: EncoderBundle) -> _Loaded:
    raise NoDevice(
        "an encoder that came as a graph runs on the CPU alone", expected="--device cpu", found=bundle.path,
        fix="export the model's own weights with --prompt-encoder",
    )  # fmt: skip


def _on_cuda(bundle: EncoderBundle, threads: int) -> _Loaded:
    """On ONNX Runtime's CUDA, which has kernels for the standard's operators, and for its own of 8 bits none."""
    from .backends.onnxruntime import check_device
    from .backends.onnxruntime_bound import BoundConnector, BoundSession

    check_device(CUDA)
    m = bundle.manifest
    halved = m.precision == "fp16" and all(HALF in facts["graphs"] for facts in m.networks.values())
    graphs = _graphs(bundle, HALF if halved else STANDARD)
    files = _needed(bundle, graphs)
    with mapped(bundle, files) as folder:
        embedding = _embedding(bundle, folder)
        networks = {
            name: BoundSession(folder / graph, device=CUDA, threads=threads, exact=m.precision == "fp32")
            for name, graph in graphs.items()
        }
    between = BoundConnector(networks[DECODER], networks.get(VISION), device=CUDA, threads=threads)
    return _Loaded(
        runtime="onnxruntime-cuda", networks=networks, embedding=embedding, chunk=GPU_CHUNK, files=files,
        between=between, how="ONNX Runtime's CUDA provider",
    )  # fmt: skip


def _on_tensorrt(bundle: EncoderBundle, threads: int) -> _Loaded:
    """On TensorRT, in the form that was exported for it."""
    from .backends.tensorrt import encoder_files, encoder_targets, find_way, tokens_at_once

    needed, flavours = encoder_files(bundle)
    way = find_way(flavours, threads=threads)
    files = needed | {EMBEDDING}
    with mapped(bundle, files) as folder:
        embedding = _embedding(bundle, folder)
        targets = encoder_targets(bundle, folder)
        networks: dict[str, Runner] = {name: way.open(target) for name, target in targets.items()}
        chunk = min(GPU_CHUNK, tokens_at_once(targets[DECODER]))
    return _Loaded(
        runtime=way.runtime, networks=networks, embedding=embedding, chunk=chunk, files=files,
        between=way.between(networks), how=way.how,
    )  # fmt: skip
