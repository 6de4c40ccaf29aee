"""Export a prompt encoder: networks shard by shard, parity gate, golden regions, and last of all the manifest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import transformers

from topt_deploy import __version__
from topt_deploy.bundle.encoder_manifest import (
    EMBEDDING,
    GOLDEN,
    SCHEMA_VERSION,
    TOKENIZER,
    EncoderBundle,
    EncoderManifest,
    open_encoder_bundle,
)
from topt_deploy.bundle.sealed import seal_bundle
from topt_deploy.bundle.tolerances import PROMPTS as TOLERANCE
from topt_deploy.errors import UsageError
from topt_deploy.freed_memory import keep_freed_memory
from topt_deploy.prompts.encode import CONTEXT, limit_pixels
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.families.registry import TEXT
from topt_deploy.prompts.golden_regions import GoldenRegion, write_golden
from topt_deploy.prompts.graph_backend import VISION, GraphBackend
from topt_deploy.prompts.prompt import Array, Family
from topt_deploy.prompts.pytorch.checkpoint import Checkpoint, open_checkpoint, quiet
from topt_deploy.prompts.pytorch.load import torch_backend
from topt_deploy.prompts.templates import Templates, load_templates
from topt_deploy.runtime.processor import deciding_sets
from topt_deploy.runtime.prompt_encoder import OPENVINO
from topt_deploy.storage.atomic import atomic_folder
from topt_deploy.tensorrt.library import RTX
from topt_deploy.tensorrt.profile import Profile, as_record, parse_profile

from ..tensorrt_engines import EngineTarget, Made, make_engines
from .assemble import Assembled, assemble
from .causal_decoder import TOKENS
from .checkpoint_tensors import ExportRecipe, Tensors, recipe
from .default_profiles import default_profile, of_network
from .exported_graph import export_graph, is_graph, open_graph
from .layerwise import Layerwise
from .lower import FORMS, PRECISIONS, TENSORRT
from .outliers import LIMITS, Outliers
from .parity_gate import EncoderParity, gate, golden_regions, reference, ways

WHOLE_MODEL_NUMBERS = 500_000_000
"""A larger model is compared with its own layers in PyTorch, one at a time, and not with transformers' model whole."""
ROWS = 4096
LAYERWISE_CHUNK = 4096
"""Tokens read at once where every pass reads the whole checkpoint."""


def make_encoder(
    model: str,
    out: Path,
    *,
    precision: str,
    templates: Path | None,
    max_pixels: int | None,
    say: Callable[[str], None],
    target: EngineTarget | None = None,
) -> EncoderBundle:
    """Export a model to a bundle of its own; one that is there already and is the same is left as it is.

    Args:
        model: Folder or id. A folder with a graph in place of weights is packed as it is (:mod:`.exported_graph`).
        out: The bundle's folder.
        precision: Of :func:`export_encoder`.
        templates: A templates file; the shipped templates by default.
        max_pixels: The limit that images are resized to, if prompts were encoded so.
        say: Told what is being done.
        target: Of :func:`export_encoder`.

    Raises:
        UsageError: If something else is there, or the model cannot be exported.
        ToptError: Of whatever else goes wrong; nothing is left at ``out`` then.
    """
    quiet()
    as_graph, asked = is_graph(model), load_templates(templates)
    checkpoint = open_graph(model) if as_graph else open_checkpoint(model)
    if max_pixels is not None:
        checkpoint = replace(checkpoint, spec=limit_pixels(checkpoint.spec, max_pixels))
    wanted = {"identity": checkpoint.spec.identity, "precision": precision, "templates": asked.whole_sha256}
    if out.exists():
        there = open_encoder_bundle(out)
        found = {
            "identity": there.spec.identity,
            "precision": there.manifest.precision,
            "templates": there.templates.whole_sha256,
        }
        if target is not None:  # one with engines serves where none are asked for, and not the other way round
            wanted |= {"engines": _asked(target, checkpoint.spec)}
            found |= {"engines": _there(there, target)}
        if found != wanted:
            raise UsageError(
                "another encoder is already there",
                file=out,
                expected=wanted,
                found=found,
                fix="name another --encoder-bundle",
            )
        say(f"{out} already exists")
        return there
    with atomic_folder(out) as folder:
        if as_graph:
            export_graph(checkpoint, folder, precision=precision, templates=asked, say=say, engines=target is not None)
        else:
            export_encoder(checkpoint, folder, precision=precision, templates=asked, say=say, target=target)
    return open_encoder_bundle(out)


def _asked(target: EngineTarget, spec: EncoderSpec) -> str:
    """Flavour, capabilities and profile that are asked for, to be compared and shown."""
    profile = parse_profile(target.profile, default_profile(spec), unnamed=TOKENS)
    return f"{target.flavour}, for {sorted(target.capabilities)}, {sorted(as_record(profile).items())}"


def _there(bundle: EncoderBundle, target: EngineTarget) -> str:
    """The same of a bundle. TensorRT's engine is of the GPU that was there, and is not asked for."""
    facts = [network[TENSORRT] for network in bundle.manifest.networks.values() if TENSORRT in network]
    if not facts:
        return "none"
    profile = {name: sizes for of in facts for name, sizes in of["profile"].items()}
    capabilities = sorted(facts[0]["engines"]) if facts[0]["flavour"] == RTX else sorted(target.capabilities)
    return f"{facts[0]['flavour']}, for {capabilities}, {sorted(profile.items())}"


def export_encoder(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    precision: str,
    templates: Templates,
    say: Callable[[str], None],
    target: EngineTarget | None = None,
) -> EncoderManifest:
    """Write an encoder bundle into an empty folder.

    No more than a layer's weights is in memory at a time, besides the token embeddings; the gate maps what was written.

    Args:
        checkpoint: The model.
        folder: The folder; what stands there after an error is to be thrown away.
        precision: One of :data:`.lower.PRECISIONS`, of the decoder's linear maps; a vision network is not taken below
            int8, and maps that lose too much (:mod:`.outliers`) are kept in the next higher precision.
        templates: The questions that travel with it.
        say: Told what is being done.
        target: The target of TensorRT's engines; with it graphs have a third form.

    Raises:
        UsageError: If the model or the precision cannot be exported, or what is asked of engines does not go together.
        BadBundle: If the parity gate fails, or TensorRT cannot build a network.
        NoDevice: If engines are asked of a library that is not here.
    """
    if precision not in PRECISIONS:
        raise UsageError("no such precision", expected=f"one of {', '.join(PRECISIONS)}", found=precision)
    made = recipe(checkpoint)
    profile, forms = default_profile(checkpoint.spec), [*FORMS]
    if target is not None:
        target.check()
        profile, forms = parse_profile(target.profile, profile, unnamed=TOKENS), [*FORMS, TENSORRT]
    tensors, host = Tensors(checkpoint, made.canonical), checkpoint.spec.host(checkpoint.tokenizer)
    work = _Work(
        checkpoint=checkpoint,
        host=host,
        recipe=made,
        tensors=tensors,
        precision=precision,
        embedding=_embedding(tensors, made, folder / EMBEDDING, "float32" if precision == "fp32" else "float16"),
        regions=golden_regions(
            templates,
            host,
            images=checkpoint.spec.family != TEXT,
            context=checkpoint.spec.context or CONTEXT,
        ),
        questions=list(templates.questions.values()),
        say=say,
    )
    kept, layerwise = work.layer_by_layer()
    networks = work.assemble(kept, folder, forms)
    expected = work.reference() if layerwise is None or work.whole else layerwise
    (folder / TOKENIZER).write_bytes(checkpoint.tokenizer)
    vectors = dict(zip(templates.questions, expected.transpose(1, 0, 2), strict=True))
    write_golden(folder / GOLDEN, work.regions, vectors, templates)
    # The gate opens a sealed bundle, as whoever serves it does. Its figures, and engines, are added to that.
    seal_bundle(folder, work.manifest(templates, kept, networks, work.unbuilt(target, profile, folder), ()))
    staged = open_encoder_bundle(folder, gated=False)
    parity = work.gate(staged, expected, engines=target is not None)
    engines = {} if target is None else work.engines(target, networks, profile, folder)
    manifest = work.manifest(templates, kept, networks, engines, parity)
    seal_bundle(folder, manifest, known=staged.record["files"])
    open_encoder_bundle(folder).verify()  # what no reader would take must not leave this machine
    return manifest


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """An encoder on its way into a bundle: what its steps have in common.

    Attributes:
        checkpoint, recipe, tensors: The model, how it is taken apart, and its weights.
        host: The host side, which makes the networks' inputs.
        precision: Of the decoder's linear maps.
        embedding: Token embeddings, mapped.
        regions, questions: What the bundle is compared on, in every form of its networks.
        say: Told what is being done.
    """

    checkpoint: Checkpoint
    host: Family
    recipe: ExportRecipe
    tensors: Tensors
    precision: str
    embedding: Array
    regions: tuple[GoldenRegion, ...]
    questions: Sequence[str]
    say: Callable[[str], None]

    @property
    def spec(self) -> EncoderSpec:
        """The model as an encoder."""
        return self.checkpoint.spec

    @cached_property
    def whole(self) -> bool:
        """True if the model is small enough to be compared with as a whole."""
        return self.tensors.count() <= WHOLE_MODEL_NUMBERS

    @cached_property
    def past(self) -> dict[str, tuple[int, int]]:
        """Heads and width of the decoder's keys and values, by name."""
        return {
            name: (int(form.dims[1]), int(form.dims[3]))
            for name, form in self.recipe.networks[-1].inputs.items()
            if name.startswith("past_")
        }

    def layer_by_layer(self) -> tuple[dict[str, str], Array | None]:
        """Maps that lose too much in few bits, with the precision they are kept in, and the golden regions' vectors.

        No vectors where nothing asks for them: the model is compared with as a whole, and not in few bits.
        """
        outliers = Outliers(precision=self.precision) if self.precision in LIMITS else None
        if outliers is None and self.whole:
            return {}, None
        self.say("running the model in PyTorch, layer by layer")
        layerwise = Layerwise(networks=self.recipe.networks, load=self.tensors.load, observe=outliers)
        backend = GraphBackend(
            layerwise.runners(), embedding=self.embedding, past=self.past, spec=self.spec, chunk=LAYERWISE_CHUNK
        )
        keep_freed_memory()
        vectors = layerwise.side_by_side(
            lambda region: reference(self.host, backend, [region], self.questions), self.regions
        )
        return outliers.kept() if outliers else {}, np.concatenate(vectors)

    def assemble(self, kept: Mapping[str, str], folder: Path, forms: Sequence[str]) -> dict[str, Assembled]:
        """Every network's graphs, written."""
        networks = {}
        for network in self.recipe.networks:
            self.say(f"exporting the {network.name} network at {self.precision}")
            own = "int8" if network.name == VISION and self.precision == "int4" else self.precision
            networks[network.name] = assemble(network, self.tensors.load, kept, own, folder, forms)
        return networks

    def reference(self) -> Array:
        """The golden regions' vectors by transformers' own model."""
        self.say("running the model in PyTorch, as transformers has it")
        backend = torch_backend(self.checkpoint, device="cpu", precision="fp32")
        return reference(self.host, backend, self.regions, self.questions)

    def gate(self, staged: EncoderBundle, expected: Array, *, engines: bool) -> list[EncoderParity]:
        """The parity of every way in which the staged bundle is run.

        Raises:
            BadBundle: If one fails.
        """
        self.say("parity gate: PyTorch against the bundle as topt-run opens it")
        tried = ways(whole=self.whole, engines=engines)
        parity: list[EncoderParity] = []
        for way in tried:
            measured = gate(staged, expected, way)
            parity += measured
            self.say(f"  {way}: smallest cosine {min(p.cosine for p in measured):.6f}")
        if OPENVINO not in {way.engine for way in tried}:
            self.say("  not on OpenVINO, which is not installed: run topt-run selftest --encoder-engine openvino there")
        return parity

    def unbuilt(self, target: EngineTarget | None, profile: Profile, folder: Path) -> dict[str, dict[str, Any]]:
        """The manifest's entries of TensorRT's engines before there are any."""
        if target is None:
            return {}
        none = Made(library=None, engines={}, checked=())
        return {
            network.name: {TENSORRT: {"flavour": target.flavour} | none.as_record(of_network(network, profile), folder)}
            for network in self.recipe.networks
        }

    def engines(
        self, target: EngineTarget, networks: Mapping[str, Assembled], profile: Profile, folder: Path
    ) -> dict[str, dict[str, Any]]:
        """TensorRT's engines of every network; what the manifest says of them."""
        engines = {}
        for network in self.recipe.networks:
            own = of_network(network, profile)
            done = make_engines(target, networks[network.name].graphs[TENSORRT], own)
            self.say(f"{network.name}: {done.told}")
            engines[network.name] = {TENSORRT: {"flavour": target.flavour} | done.as_record(own, folder)}
        return engines

    def manifest(
        self,
        templates: Templates,
        kept: Mapping[str, str],
        networks: Mapping[str, Assembled],
        engines: Mapping[str, Mapping[str, Any]],
        parity: Sequence[EncoderParity],
    ) -> EncoderManifest:
        """The manifest; its files are listed when it is sealed."""
        return EncoderManifest(
            schema_version=SCHEMA_VERSION,
            version=__version__,
            source={
                "reference": "transformers" if self.whole else "PyTorch, layer by layer",
                "versions": {
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "onnxruntime": ort.__version__,
                },
            },
            spec=asdict(self.spec),
            templates=templates.as_dict(),
            precision=self.precision,
            kept=kept,
            embedding={"dtype": self.embedding.dtype.name, "shape": list(self.embedding.shape)},
            past=self.past,
            networks={
                name: {
                    "graphs": {form: path.name for form, path in done.graphs.items()},
                    "weights": done.weights.name,
                    **engines.get(name, {}),
                }
                for name, done in networks.items()
            },
            tolerance=TOLERANCE[self.precision],
            parity=tuple(asdict(measured) for measured in parity),
            golden=tuple(region.name for region in self.regions),
            exact_without_vnni=True,  # quantize_weights.in_8_bits
            gated_on=deciding_sets(),
        )


def _embedding(tensors: Tensors, made: ExportRecipe, path: Path, dtype: str) -> Array:
    """Write the token embeddings; they are then mapped, for a text touches few of their rows."""
    rows, width = tensors.shape(made.embedding)
    with path.open("xb") as file:
        for start in range(0, rows, ROWS):
            part = tensors.rows(made.embedding, start, min(start + ROWS, rows)).float().numpy()
            file.write(np.ascontiguousarray(part.astype(dtype)).data)
    return np.memmap(path, dtype=dtype, mode="r", shape=(rows, width))
