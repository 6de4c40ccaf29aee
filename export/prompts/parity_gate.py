"""The encoder's parity gate: pooled vectors of every form against PyTorch, on regions unlike each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from topt_deploy.bundle.tolerances import PROMPTS as TOLERANCE
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.golden_regions import GoldenRegion, reproduce
from topt_deploy.prompts.graph_backend import GraphBackend, Runner, import_openvino
from topt_deploy.prompts.pooling import Backend, pooled
from topt_deploy.prompts.prompt import Array, Family
from topt_deploy.prompts.templates import Templates

from .pieces import Network, execute

CHUNK = 64
"""Prefix tokens read at once in the gate: few, so that every golden region needs several passes."""


@dataclass(frozen=True, kw_only=True)
class EncoderParity:
    """The measured parity on one region: over its tasks, the smallest cosine and the largest relative difference."""

    region: str
    form: str
    engine: str
    tokens: int
    images: int
    cosine: float
    difference: float


def golden_regions(templates: Templates, *, images: bool) -> tuple[GoldenRegion, ...]:
    """Three regions that nobody lives in, with texts of unlike length and, where asked for, 0, 1 and 3 images."""
    from topt_deploy.prompts.geotext import geo_text

    rng = np.random.default_rng(0)
    sizes: Sequence[Sequence[tuple[int, int]]] = ((), ((61, 97),), ((120, 45), (33, 34), (150, 211)))
    regions = []
    for i, (pois, shapes) in enumerate(zip((2, 7, 13), sizes, strict=True)):
        counts = {f"kind {k}": float(rng.integers(1, 90)) for k in range(pois)}
        text = geo_text(templates.wording, lon=-30.0 - i, lat=40.0 + i / 7, pois=counts)
        pictures = tuple(_picture(rng, *shape) for shape in shapes) if images else ()
        regions.append(GoldenRegion(name=f"golden-{i}", text=text, images=pictures))
    return tuple(regions)


def _picture(rng: np.random.Generator, height: int, width: int) -> Array:
    """Waves of colour, as smooth as photographs are."""
    y, x = np.mgrid[:height, :width] / 30.0
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-2, 2, size=(3, 3))]
    return np.asarray(127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8)


def reference(host: Family, backend: Backend, regions: Sequence[GoldenRegion], questions: Sequence[str]) -> Array:
    """Pooled vectors (regions, T, H) of a backend."""
    prompts = [host.prompt(region.text, region.images, questions) for region in regions]
    return np.concatenate([pooled(backend, [prompt]) for prompt in prompts])


class TorchRunner:
    """Runs a network's pieces in PyTorch, one layer's weights in memory at a time.

    Args:
        network: The network.
        load: Gives the checkpoint's tensor of a name.
        observe: Told of every linear map (:func:`.pieces.execute`).
    """

    def __init__(
        self, network: Network, load: Callable[[str], Tensor], observe: Callable[[str, nn.Linear, Tensor], None] | None
    ) -> None:
        self._network, self._load, self._observe = network, load, observe
        self.inputs = tuple(network.inputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Compute the named outputs."""
        tensors = {name: torch.tensor(array) for name, array in inputs.items()}
        found = execute(self._network, lambda name: self._load(name).float(), tensors, self._observe)
        return {name: found[name].numpy() for name in outputs}


class FileRunner:
    """Runs a graph on ONNX Runtime from its two files, as any tool would, mapped and not copied.

    Args:
        path: The graph, beside its weights.
    """

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_prepacking", "1")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(value.name for value in self._session.get_inputs())

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Compute the named outputs."""
        return dict(zip(outputs, self._session.run(list(outputs), dict(inputs)), strict=True))


class OpenVinoRunner:
    """Runs a graph on OpenVINO, in float32.

    Args:
        path: The graph, beside its weights.
    """

    def __init__(self, path: Path) -> None:
        model = import_openvino().Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self._request = model.create_infer_request()
        self.inputs = tuple(port.any_name for port in model.inputs)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Compute the named outputs."""
        found = self._request.infer(dict(inputs))
        return {name: np.array(found[name]) for name in outputs}


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One form of an exported encoder, and what runs it.

    Attributes:
        form, engine: Their names.
        files: Each network's graph.
        load: Makes what runs a graph.
    """

    form: str
    engine: str
    files: Mapping[str, Path]
    load: Callable[[Path], Runner]


def gate(
    candidate: Candidate,
    *,
    expected: Array,
    regions: Sequence[GoldenRegion],
    questions: Sequence[str],
    host: Family,
    spec: EncoderSpec,
    embedding: Array,
    past: Mapping[str, tuple[int, int]],
    precision: str,
) -> list[EncoderParity]:
    """Compare a form with PyTorch on every golden region.

    Args:
        candidate: The form.
        expected: PyTorch's vectors (regions, T, H).
        regions, questions: The regions and questions that were encoded.
        host, spec, embedding, past: The encoder besides its networks.
        precision: Of the weights, which the tolerance goes by.

    Raises:
        BadBundle: If a vector is further off than :data:`TOLERANCE`.
    """
    networks = {name: candidate.load(path) for name, path in candidate.files.items()}
    backend = GraphBackend(networks, embedding=embedding, past=past, spec=spec, chunk=CHUNK)
    measured = []
    for region, vectors in zip(regions, expected, strict=True):
        prompt = host.prompt(region.text, region.images, questions)
        cosine, difference = reproduce(
            backend, prompt, vectors, TOLERANCE[precision],
            failed=f"parity gate failed on {region.name}, {candidate.form} form on {candidate.engine}, at {precision}",
            fix="export with a higher --encoder-precision",
        )  # fmt: skip
        longest = max(len(sequence.ids) for sequence in prompt.sequences)
        measured.append(
            EncoderParity(
                region=region.name, form=candidate.form, engine=candidate.engine, tokens=longest,
                images=len(region.images), cosine=cosine, difference=difference,
            )
        )  # fmt: skip
    return measured
