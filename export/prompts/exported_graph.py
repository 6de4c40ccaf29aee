"""Text encoders that come as a graph, such as optimum exports for feature extraction: packed as a bundle, and gated.

The graph is served as it is. What is gained is all that surrounds it: templates and tokens, a sealed bundle, a gate.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from topt_deploy import __version__
from topt_deploy.bundle.encoder_manifest import GOLDEN, SCHEMA_VERSION, TOKENIZER, EncoderManifest, open_encoder_bundle
from topt_deploy.bundle.sealed import seal_bundle
from topt_deploy.bundle.tolerances import PROMPTS as TOLERANCE
from topt_deploy.errors import BadConfig, BadData, UsageError
from topt_deploy.prompts.cache import content_key
from topt_deploy.prompts.encode import CONTEXT
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.families.registry import EXPORTED_TEXT
from topt_deploy.prompts.golden_regions import write_golden
from topt_deploy.prompts.graph_backend import LAST_HIDDEN, WHOLE, WHOLE_INPUTS, WholeGraph
from topt_deploy.prompts.prompt import Array
from topt_deploy.prompts.pytorch.chat_frames import own_frame
from topt_deploy.prompts.pytorch.checkpoint import Checkpoint, read_config, read_tokenizer, tokens_made_for
from topt_deploy.prompts.templates import Templates
from topt_deploy.runtime.processor import deciding_sets
from topt_deploy.runtime.prompt_encoder import FORMS
from topt_deploy.storage.hashed_file import sha256_file

from .parity_gate import EncoderParity, gate, golden_regions, reference, ways

GRAPH = "model.onnx"
"""optimum's name of it; weights of a large one are in files beside it."""
PRECISION = "fp32"
INEXACT = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "QuantizeLinear"})
SMALLEST_APART = 1024
"""Bytes from which a tensor lies in the file of weights: smaller ones are shapes and the like."""
Say = Callable[[str], None]


def is_graph(model: str) -> bool:
    """True of a folder that holds a graph, and no weights that could be exported."""
    folder = Path(model)
    return (folder / GRAPH).is_file() and not any(folder.glob("*.safetensors"))


def open_graph(model: str) -> Checkpoint:
    """Read the folder of a graph: everything but the graph, whose files are hashed.

    Raises:
        NoInput: If a file is missing.
        BadData, BadConfig: If one is broken, or the graph not a text encoder's.
    """
    path = Path(model)
    config, tokenizer = read_config(path), read_tokenizer(path)
    width = config.get("hidden_size")
    if type(width) is not int:
        raise BadConfig(
            "hidden_size is absent", file=path / "config.json", expected="the configuration of a text encoder"
        )
    weights = tuple(file for file in sorted(path.glob(f"{GRAPH}*")) if file.is_file())
    spec = EncoderSpec(
        family=EXPORTED_TEXT,
        name=path.resolve().name,
        weights_sha256=content_key(files=[(file.name, sha256_file(file)) for file in weights]),
        width=width,
        settings={},
        chat=asdict(own_frame(path)),
        context=tokens_made_for(config),
    )
    return Checkpoint(path=path, config=config, preprocessor={}, tokenizer=tokenizer, weights=weights, spec=spec)


def export_graph(
    checkpoint: Checkpoint, folder: Path, *, precision: str, templates: Templates, say: Say, engines: bool
) -> EncoderManifest:
    """Write the bundle of a graph into an empty folder.

    Args:
        checkpoint: Of :func:`open_graph`.
        folder: The folder; what stands there after an error is to be thrown away.
        precision: Must be fp32: the graph is not changed.
        templates: The questions that travel with it.
        say: Told what is being done.
        engines: True if TensorRT's are asked for, which there are none of.

    Raises:
        UsageError: If something else than the graph as it is was asked for.
        BadConfig, BadData: If the graph is not a text encoder's in float32.
        BadBundle: If the parity gate fails.
    """
    if precision != PRECISION or engines:
        raise UsageError(
            "a graph is taken as it is", file=checkpoint.path / GRAPH,
            expected=f"--encoder-precision {PRECISION}, and no engines", found=precision,
            fix="or name the folder of the model's own weights, which can be exported in every precision",
        )  # fmt: skip
    model = _read(checkpoint.path / GRAPH)
    say(f"running {GRAPH} on ONNX Runtime, as it came")
    host = checkpoint.spec.host(checkpoint.tokenizer)
    regions = golden_regions(templates, host, images=False, context=checkpoint.spec.context or CONTEXT)
    expected = reference(host, WholeGraph(_AsItCame(checkpoint.path / GRAPH)), regions, [*templates.questions.values()])
    if expected.shape[-1] != checkpoint.spec.width:
        raise BadConfig(
            "hidden_size is not the graph's", file=checkpoint.path / "config.json",
            expected=expected.shape[-1], found=checkpoint.spec.width,
        )  # fmt: skip
    vectors = dict(zip(templates.questions, expected.transpose(1, 0, 2), strict=True))
    write_golden(folder / GOLDEN, regions, vectors, templates)
    (folder / TOKENIZER).write_bytes(checkpoint.tokenizer)
    graph, weights = f"{WHOLE}.onnx", f"{WHOLE}.weights"
    onnx.save_model(model, folder / graph, save_as_external_data=True, location=weights, size_threshold=SMALLEST_APART)
    manifest = EncoderManifest(
        schema_version=SCHEMA_VERSION,
        version=__version__,
        source={"reference": f"{GRAPH} on ONNX Runtime, as it came", "versions": {"onnxruntime": ort.__version__}},
        spec=asdict(checkpoint.spec),
        templates=templates.as_dict(),
        precision=PRECISION,
        kept={},
        embedding={},
        past={},
        networks={WHOLE: {"graphs": dict.fromkeys(FORMS.values(), graph), "weights": weights}},
        tolerance=TOLERANCE[PRECISION],
        parity=(),
        golden=tuple(region.name for region in regions),
        exact_without_vnni=True,  # there are no products in 8 bits
        gated_on=deciding_sets(),
    )
    seal_bundle(folder, manifest)
    staged = open_encoder_bundle(folder, gated=False)
    say(f"parity gate: {GRAPH} as it came against the bundle as topt-run opens it")
    parity: list[EncoderParity] = []
    for way in ways(whole=False, engines=False):
        parity += gate(staged, expected, way)
        say(f"  {way.engine}: smallest cosine {min(p.cosine for p in parity if p.engine == way.engine):.6f}")
    manifest = replace(manifest, parity=tuple(asdict(measured) for measured in parity))
    seal_bundle(folder, manifest, known=staged.record["files"])
    open_encoder_bundle(folder).verify()
    return manifest


class _AsItCame:
    """ONNX Runtime with its own settings: the reference, which shares nothing with what serves."""

    def __init__(self, graph: Path) -> None:
        try:
            self._session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises half a dozen unrelated types here
            raise BadData(f"ONNX Runtime cannot load the graph ({error})", file=graph, fix="export it again") from error
        self.inputs = tuple(port.name for port in self._session.get_inputs())

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Array]:
        """Compute the named outputs."""
        return {
            name: np.asarray(array)
            for name, array in zip(outputs, self._session.run(outputs, dict(inputs)), strict=True)
        }


def _read(path: Path) -> onnx.ModelProto:
    """The graph with its weights.

    Raises:
        BadData: If it is none.
        BadConfig: If it is not a text encoder's in float32 and in the standard's own operators.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's, the system's, onnx's
        raise BadData(f"not a graph of ONNX ({error})", file=path, fix="export it again") from error
    inputs = {port.name for port in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    outputs = {port.name for port in model.graph.output}
    if not ("input_ids" in inputs and inputs <= WHOLE_INPUTS and LAST_HIDDEN in outputs):
        raise BadConfig(
            "the graph is not a text encoder's", file=path,
            expected=f"inputs among {', '.join(sorted(WHOLE_INPUTS))}, and an output {LAST_HIDDEN}",
            found=f"{', '.join(sorted(inputs))}, and {', '.join(sorted(outputs))}",
            fix="optimum-cli export onnx --task feature-extraction",
        )  # fmt: skip
    used = {(node.domain or "ai.onnx", node.op_type) for node in model.graph.node}
    odd = sorted({name for domain, name in used if domain != "ai.onnx" or name in INEXACT})
    if odd:
        raise BadConfig(
            "the graph was quantized, or made for one runtime", file=path,
            expected="float32, and operators of the standard alone", found=", ".join(odd),
            fix="export it without --optimize, and do not quantize it",
        )  # fmt: skip
    return model
