"""The prompt encoder without PyTorch: ONNX graphs, on ONNX Runtime or on OpenVINO, behind the host side of the core."""

import ctypes
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.arguments import Location
from topt_deploy.bundle.encoder_manifest import EMBEDDING, SCHEMA_VERSION, TOKENIZER, EncoderBundle, open_encoder_bundle
from topt_deploy.bundle.manifest import ENCODER, Bundle, open_bundle
from topt_deploy.bundle.sealed import blamed, open_sealed, well_formed
from topt_deploy.bundle.signature import check_signature
from topt_deploy.errors import BadBundle, NoInput, UsageError
from topt_deploy.prompts.encode import Encoder, PooledEncoder
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.graph_backend import (
    DECODER,
    PAST,
    PRESENT,
    VISION,
    Between,
    GraphBackend,
    Runner,
    import_openvino,
)
from topt_deploy.prompts.prompt import Array
from topt_deploy.prompts.templates import Templates

from .device_choice import CPU, CUDA, TENSORRT, Chosen, choose
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


GROUP, MOST_SCALED_TOGETHER = 32, 256
"""Inputs that share a scale: OpenVINO's own choice, and the most that do."""
M_MMAP_THRESHOLD, BLOCK_BYTES = -3, 1 << 16
"""glibc's number of the parameter, and the size from which a block is the system's own."""
MADV_DONTNEED = 4


class _OpenVino:
    """A network on OpenVINO.

    A decoder's keys and values, the largest thing in memory besides the weights, are kept in the type that it computes
    in, and once: it is asked for those of new tokens alone, and they are put behind the others when they are read.

    Args:
        path: The graph, beside its weights.
        weights: The weights. OpenVINO maps them, and rearranges them to a copy of its own in the first run.
        threads: Threads within an operator; 0 leaves the choice to OpenVINO.
        precision: Of the weights. With fp32 it computes in float32, where OpenVINO would take bfloat16 on processors
            that are fast at it.
    """

    def __init__(self, path: Path, *, weights: Path, threads: int, precision: str) -> None:
        openvino = import_openvino()
        _free_at_once()
        core = openvino.Core()
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        model = core.read_model(path)
        self._tensor, self._kind = openvino.Tensor, core.get_property("CPU", "INFERENCE_PRECISION_HINT")
        if precision == "fp32":
            settings["INFERENCE_PRECISION_HINT"], self._kind = "f32", openvino.Type.f32
        elif precision == "int8":
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(_scaled_together(model))
        _new_alone(model)
        typed = openvino.preprocess.PrePostProcessor(model)
        for port in model.inputs:
            if port.any_name.startswith(PAST):
                typed.input(port.any_name).tensor().set_element_type(self._kind)
        for port in model.outputs:
            if port.any_name.startswith(PRESENT):
                typed.output(port.any_name).tensor().set_element_type(self._kind)
        compiled = core.compile_model(typed.build(), "CPU", settings)
        self.inputs = tuple(port.any_name for port in compiled.inputs)
        self._request = compiled.create_infer_request()
        self._unread: Path | None = weights

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Compute the named outputs."""
        past: dict[str, list[Any]] = {}
        for name, value in inputs.items():
            if name.startswith(PAST):  # parts of ours, or before the first token an array of none
                past[name] = value if isinstance(value, list) else [self._tensor(self._kind, value.shape)]
                self._request.set_tensor(name, self._joined(past[name]))
            else:
                self._request.set_tensor(name, self._tensor(value, shared_memory=True))
        self._request.infer(share_outputs=True)  # else every output would be copied, for a result that nobody reads
        if self._unread is not None:
            _let_go(self._unread)
            self._unread = None
        found: dict[str, Any] = {}
        for name in outputs:
            output = self._request.get_tensor(name)
            if name.startswith(PRESENT):
                new = self._tensor(self._kind, output.shape)
                output.copy_to(new)
                found[name] = [*past[name.replace(PRESENT, PAST, 1)], new]
            else:
                found[name] = output.data.copy()
        return found

    def _joined(self, parts: list[Any]) -> Any:
        """One tensor (B, K, P, D) of the parts, which takes their place in the list, so that nothing is kept twice."""
        if len(parts) > 1:
            b, k, _, d = parts[0].shape
            whole = self._tensor(self._kind, (b, k, sum(part.shape[2] for part in parts), d))
            np.concatenate([part.data for part in parts], axis=2, out=whole.data)
            parts[:] = [whole]
        return parts[0]


def _scaled_together(model: Any) -> int:
    """The number of inputs of a linear map that share a scale, if the processor multiplies in 8 bits (VNNI, no AMX).

    With OpenVINO's 32 a sixth of the time goes into scales. A divisor of every map's inputs: others are slower.
    """
    weights = [op.input_value(1).get_partial_shape() for op in model.get_ops() if op.get_type_name() == "MatMul"]
    widths = [weight[0].get_length() for weight in weights if weight.is_static and len(weight) == 2]
    common = math.gcd(*widths)
    return max((size for size in range(GROUP, MOST_SCALED_TOGETHER + 1) if common % size == 0), default=GROUP)


def _let_go(path: Path) -> None:
    """Take a mapped file's pages out of this process's memory; whoever touches one gets it from the file again."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        ends, rights, *_, name = line.split(maxsplit=5)
        if name == str(path.resolve()) and rights.startswith("r--"):  # never written to: nothing is lost
            start, stop = (int(end, 16) for end in ends.split("-"))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)


def _new_alone(model: Any) -> None:
    """Have a decoder put out new tokens' keys and values, which its graph puts behind the past ones to attend to."""
    for result in model.get_results():
        everything = result.input_value(0)
        names = everything.get_names()
        if any(name.startswith(PRESENT) for name in names):
            _, new = everything.get_node().input_values()
            everything.get_tensor().set_names(set())
            new.get_tensor().set_names(names)
            result.input(0).replace_source_output(new)


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


def _free_at_once() -> None:
    """Have glibc give blocks back to the system as soon as they are freed.

    A decoder's tensors grow with every call; glibc would keep the smaller ones, a third of the memory in the end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES)


def info(path: Path, key: Path | None) -> tuple[list[str], dict[str, Any]]:
    """A description of an encoder's bundle, for people and for machines; every byte and the signature are checked."""
    bundle = open_encoder_bundle(path)
    check_signature(bundle, key)
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


def locate(city: Bundle, place: Path | None = None) -> tuple[Path, str]:
    """The place of a city's encoder: the path of a bundle, which need not exist, and the folder inside it, or "".

    Args:
        city: The city's bundle.
        place: The encoder's own bundle; None looks beside the city's. Ignored where the city's holds the encoder.

    Raises:
        UsageError: If it has no encoder.
    """
    facts = city.manifest.encoder
    if facts is None:
        raise UsageError(
            "the bundle has no prompt encoder", file=city.path,
            fix="export it with topt-deploy export --prompt-encoder",
        )  # fmt: skip
    return (city.path, ENCODER) if facts["bundle"] is None else (place or city.path.parent / facts["bundle"], "")


def encoder_of(city: Bundle, place: Path | None = None) -> EncoderBundle:
    """The encoder that a city's bundle goes with, opened.

    Args:
        city: The city's bundle.
        place: Of :func:`locate`.

    Raises:
        NoInput: If the encoder's bundle is not there.
        BadBundle: If it is not sound, or another one.
        UsageError: If the city's bundle goes with none.
    """
    path, inside = locate(city, place)
    facts = city.manifest.encoder
    assert facts is not None
    if not path.exists():
        raise NoInput(
            "the bundle's prompt encoder was not found", file=path, expected=facts["identity"],
            fix="copy it there, or name its place with --encoder-bundle",
        )  # fmt: skip
    found = open_encoder_bundle(path, inside)
    if found.sha256 != facts["sha256"]:
        raise BadBundle(
            "not the prompt encoder that the bundle was exported with", file=path,
            expected=f"{facts['identity']}, manifest {facts['sha256'][:16]}…",
            found=f"{found.spec.identity}, manifest {found.sha256[:16]}…", fix="name the right one",
        )  # fmt: skip
    return found


def find_encoder(path: Path, key: Path | None = None) -> EncoderBundle:
    """The encoder that a path means: its own bundle, or that of a city.

    Args:
        path: The bundle.
        key: The public key that must have signed it; None asks for no signature.

    Raises:
        NoInput, BadBundle, UsageError: If there is none, it is not sound, or not signed.
    """
    if open_sealed(path, SCHEMA_VERSION).is_encoder:
        found = open_encoder_bundle(path)
        check_signature(found, key)
        return found
    city = open_bundle(path)
    check_signature(city, key)
    return encoder_of(city)


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


def load_encoder(bundle: EncoderBundle, *, engine: str, threads: int, device: str = CPU) -> OpenedEncoder:
    """Load the networks of an exported encoder, checking every byte that is used.

    Args:
        bundle: The encoder's.
        engine: One of :data:`ENGINES`.
        threads: Threads within an operator; 0 leaves the choice to the engine.
        device: One of :data:`.device_choice.DEVICES`.

    Raises:
        BadBundle: If a file is not the manifest's.
        NoDevice: If the engine is not installed, or the device not there.
        UsageError: If the engine is unknown, or is not for the device.
    """
    check_engine(engine, device)
    ways = {
        CPU: lambda: _on_cpu(bundle, engine, threads),
        CUDA: lambda: _on_cuda(bundle, threads),
        TENSORRT: lambda: _on_tensorrt(bundle, threads),
    }
    loaded, chosen = choose(device, ways, what="prompt encoder")
    m = bundle.manifest
    tokenizer = bundle.read(TOKENIZER)
    with blamed(bundle.path, TOKENIZER):
        survives(lambda: bundle.spec.host(tokenizer), bundle.path, TOKENIZER)
        host = bundle.spec.host(tokenizer)
    encoder = PooledEncoder(
        spec=bundle.spec,
        precision=m.precision,
        runtime=loaded.runtime,
        sha256=bundle.sha256,
        host=host,
        backend=GraphBackend(
            loaded.networks, embedding=loaded.embedding, past=m.past, spec=bundle.spec, chunk=loaded.chunk,
            between=loaded.between,
        ),
    )  # fmt: skip
    return OpenedEncoder(
        encoder=encoder, templates=bundle.templates, sha256=bundle.sha256, checked=loaded.files | {TOKENIZER},
        device=chosen,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """An encoder's networks, loaded.

    Attributes:
        runtime: The runtime: vectors of one are not taken for another's.
        networks, embedding, chunk, between: Of :class:`.graphs.GraphBackend`.
        files: That were checked.
        how: For the log.
    """

    runtime: str
    networks: Mapping[str, Runner]
    embedding: _Embedding
    chunk: int
    files: frozenset[str]
    between: Between | None = None
    how: str = ""


def _graphs(bundle: EncoderBundle, form: str) -> dict[str, str]:
    """Each network's graph in a form."""
    with well_formed(bundle.path):
        return {name: facts["graphs"][form] for name, facts in bundle.manifest.networks.items()}


def _needed(bundle: EncoderBundle, graphs: Mapping[str, str]) -> frozenset[str]:
    weights = (facts["weights"] for facts in bundle.manifest.networks.values())
    return frozenset([EMBEDDING, *graphs.values(), *weights])


def _embedding(bundle: EncoderBundle, folder: Path) -> _Embedding:
    facts = bundle.manifest.embedding
    return _Embedding(folder / EMBEDDING, dtype=facts["dtype"], width=facts["shape"][1])


def _on_cpu(bundle: EncoderBundle, engine: str, threads: int) -> _Loaded:
    m, graphs = bundle.manifest, _graphs(bundle, FORMS[engine])
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
                networks[name] = _OpenVino(folder / graph, weights=weights, threads=threads, precision=m.precision)
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


def _on_cuda(bundle: EncoderBundle, threads: int) -> _Loaded:
    """On ONNX Runtime's CUDA, which has kernels for the standard's operators, and for its own of 8 bits none."""
    from .backends.onnxruntime import check_device
    from .backends.onnxruntime_bound import BetweenBound, BoundSession

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
    between = BetweenBound(
        networks[DECODER], networks.get(VISION), width=bundle.spec.width, device=CUDA, threads=threads
    )
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
        between=way.between(networks, bundle.spec.width), how=way.how,
    )  # fmt: skip
