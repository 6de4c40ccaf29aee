"""The encoder's parity gate: a finished bundle's vectors against PyTorch's, on regions unlike each other.

The gate is the runtime's self-test, run on every way in which the bundle serves, before it has a name.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import numpy as np

from topt_deploy.bundle.encoder_manifest import EncoderBundle
from topt_deploy.errors import BadBundle
from topt_deploy.prompts.golden_regions import GoldenRegion, read_golden
from topt_deploy.prompts.pooling import Backend, WholeReader, pooled
from topt_deploy.prompts.prompt import Array, Family
from topt_deploy.prompts.templates import Templates
from topt_deploy.runtime.golden_checks import check_golden_regions
from topt_deploy.runtime.prompt_encoder import CHUNKS, FORMS, ONNXRUNTIME, OPENVINO, load_encoder

from .lower import STANDARD, TENSORRT

LONGEST = 2
"""The number of the golden region with the longest text."""
READ_IN_PARTS = max(CHUNKS.values()) * 5 // 4
"""Tokens beyond which a text, without questions, is longer than what any engine reads at once."""


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


def golden_regions(templates: Templates, host: Family, *, images: bool, context: int) -> tuple[GoldenRegion, ...]:
    """Three regions that nobody lives in, with texts of unlike length and, where asked for, 0, 1 and 3 images.

    The last one's text is read in parts by every engine, where the model's context is long enough for that.

    Args:
        templates: Their wording and questions.
        host: The host side of the encoder.
        images: True if it reads images.
        context: Tokens that it can read.
    """
    rng = np.random.default_rng(0)
    sizes: Sequence[Sequence[tuple[int, int]]] = ((), ((61, 97),), ((120, 45), (33, 34), (150, 211)))
    questions, regions = list(templates.questions.values()), []
    for i, (kinds, shapes) in enumerate(zip((2, 7, 13), sizes, strict=True)):
        pictures = tuple(_picture(rng, *shape) for shape in shapes) if images else ()
        text = _text(templates, i, kinds)
        while i == LONGEST and _tokens(host, text, (), [""]) <= READ_IN_PARTS:
            longer = _text(templates, i, kinds := kinds + 4)
            if _tokens(host, longer, pictures, questions) > context:
                break
            text = longer
        regions.append(GoldenRegion(name=f"golden-{i}", text=text, images=pictures))
    return tuple(regions)


def _text(templates: Templates, number: int, kinds: int) -> str:
    """A region's geo-text with places of several kinds."""
    from topt_deploy.prompts.geotext import geo_text

    counts = {f"kind {k}": float(1 + (37 * k + 11 * number) % 89) for k in range(kinds)}
    return geo_text(templates.wording, lon=-30.0 - number, lat=40.0 + number / 7, pois=counts)


def _tokens(host: Family, text: str, images: Sequence[Array], questions: Sequence[str]) -> int:
    return max(len(sequence.ids) for sequence in host.prompt(text, images, questions).sequences)


def _picture(rng: np.random.Generator, height: int, width: int) -> Array:
    """Waves of colour, as smooth as photographs are."""
    y, x = np.mgrid[:height, :width] / 30.0
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-2, 2, size=(3, 3))]
    return np.asarray(127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8)


def reference(
    host: Family, backend: Backend | WholeReader, regions: Sequence[GoldenRegion], questions: Sequence[str]
) -> Array:
    """Pooled vectors (regions, T, H) of a backend."""
    prompts = [host.prompt(region.text, region.images, questions) for region in regions]
    return np.concatenate([pooled(backend, [prompt]) for prompt in prompts])


@dataclass(frozen=True, kw_only=True)
class Way:
    """One form of an exported encoder, and the engine that runs it in the gate."""

    form: str
    engine: str

    def __str__(self) -> str:
        return f"{self.form} form on {self.engine}"


def ways(*, whole: bool, engines: bool) -> tuple[Way, ...]:
    """The ways in which an encoder is run by the gate: those in which it serves on a processor, and those for GPUs on
    the processor, for where there is no GPU nothing else can try them.

    Args:
        whole: True if the model is small. Of a large one the form for CUDA is left out: ONNX Runtime would unpack it to
            float32 on a processor.
        engines: True if there is a form for TensorRT.
    """
    found = [Way(form=FORMS[ONNXRUNTIME], engine=ONNXRUNTIME)]
    if find_spec(OPENVINO) is not None:
        found.append(Way(form=FORMS[OPENVINO], engine=OPENVINO))
    if whole:
        found.append(Way(form=STANDARD, engine=ONNXRUNTIME))
    if engines:
        found.append(Way(form=TENSORRT, engine=ONNXRUNTIME))
    return tuple(found)


def gate(bundle: EncoderBundle, expected: Array, way: Way) -> list[EncoderParity]:
    """Compare a finished bundle with PyTorch on its golden regions, by the runtime's own loader and host side.

    Args:
        bundle: The bundle, opened.
        expected: PyTorch's vectors (regions, T, H).
        way: The form, and what runs it.

    Raises:
        BadBundle: If a vector is further off than the bundle's tolerance, or the vectors that travel with the bundle
            are not PyTorch's.
    """
    _, stored = read_golden(bundle)
    if not np.array_equal(np.stack(list(stored.values()), axis=1), expected):
        raise BadBundle(
            "parity gate failed: the golden regions' vectors are not PyTorch's", file=bundle.path,
            fix="this is a fault of the export; please report it",
        )  # fmt: skip
    opened = load_encoder(bundle, engine=way.engine, threads=0, form=way.form)
    precision = bundle.manifest.precision
    checks = check_golden_regions(
        bundle, opened, lambda region: f"parity gate failed on {region}, {way}, at {precision}",
        "export with a higher --encoder-precision",
    )  # fmt: skip
    return [EncoderParity(form=way.form, engine=way.engine, **asdict(check)) for check in checks]
