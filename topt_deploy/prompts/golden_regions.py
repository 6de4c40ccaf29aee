"""Golden regions of an encoder: made up, with PyTorch's vectors, they travel with it and are encoded again."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from topt_deploy.bundle.encoder_manifest import GOLDEN, EncoderBundle
from topt_deploy.bundle.sealed import blamed
from topt_deploy.data.columns import PROMPT_PREFIX, REGION_ID
from topt_deploy.data.parquet import ParquetFile, write_parquet
from topt_deploy.errors import BadBundle

from .images import decode_image
from .pooling import Backend, WholeReader, pooled
from .prompt import Array, Prompt
from .table import IMAGES, TEXT
from .templates import Templates

TABLE = "regions.parquet"
TEMPLATE = "template"
"""The key of a template's hash in the metadata of a task's column, as in a city's table."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GoldenRegion:
    """A made-up region.

    Attributes:
        name: Of the region.
        text: Its geo-text.
        images: uint8 (h, w, 3) each, of unlike sizes.
    """

    name: str
    text: str
    images: tuple[Array, ...]


def write_golden(
    folder: Path, regions: tuple[GoldenRegion, ...], expected: Mapping[str, Array], templates: Templates
) -> None:
    """Write regions as a city would have them, with the vectors (regions, H) of each task.

    Every task's column names the template that its vectors were made with: in few bits, another question changes them
    by less than the rounding does.
    """
    from PIL import Image

    folder.mkdir()
    names = []
    for region in regions:
        names.append([f"{region.name}-{i}.png" for i in range(len(region.images))])
        for name, pixels in zip(names[-1], region.images, strict=True):
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "png")
            (folder / name).write_bytes(data.getvalue())
    columns = {
        REGION_ID: [region.name for region in regions],
        TEXT: [region.text for region in regions],
        IMAGES: pa.array(names, pa.list_(pa.string())),
    }
    for task, vectors in expected.items():
        columns[PROMPT_PREFIX + task] = pa.array(list(vectors), pa.list_(pa.float32(), vectors.shape[1]))
    table = pa.table(columns)
    for i, field in enumerate(table.schema):
        if field.name.startswith(PROMPT_PREFIX):
            made_with = {TEMPLATE: templates.sha256(field.name.removeprefix(PROMPT_PREFIX))}
            table = table.set_column(i, field.with_metadata(made_with), table.column(i))
    write_parquet(folder / TABLE, table)


def read_golden(bundle: EncoderBundle) -> tuple[tuple[GoldenRegion, ...], dict[str, Array]]:
    """The golden regions of a bundle, and the vectors (regions, H) of each task.

    Raises:
        BadBundle: If they are not what was written.
    """
    name = f"{GOLDEN}/{TABLE}"
    with blamed(bundle.path, name):
        table = ParquetFile(bundle.read(name), name).read()
        if not {REGION_ID, TEXT, IMAGES} <= set(table.column_names):
            raise BadBundle("the golden regions lack a column", file=bundle.path, found=table.column_names)
        regions = tuple(
            GoldenRegion(
                name=str(row[REGION_ID]),
                text=str(row[TEXT]),
                images=tuple(decode_image(bundle.read(f"{GOLDEN}/{image}"), image) for image in row[IMAGES]),
            )
            for row in table.select([REGION_ID, TEXT, IMAGES]).to_pylist()
        )
        tasks = [
            column.removeprefix(PROMPT_PREFIX) for column in table.column_names if column.startswith(PROMPT_PREFIX)
        ]
        expected = {task: np.array(table.column(PROMPT_PREFIX + task).to_pylist(), np.float32) for task in tasks}
        if not regions or not tasks:
            raise BadBundle("has no golden regions, or no vectors of theirs: nothing can be tested", file=bundle.path)
        for task in tasks:
            made_with = (table.schema.field(PROMPT_PREFIX + task).metadata or {}).get(TEMPLATE.encode(), b"").decode()
            if made_with and made_with != bundle.templates.sha256(task):  # older bundles name none
                raise BadBundle(
                    "the golden regions' vectors were made with another template than the bundle's", file=bundle.path,
                    column=task, expected=made_with, found=bundle.templates.sha256(task),
                    fix="export the encoder again",
                )  # fmt: skip
        if any(vectors.shape != (len(regions), bundle.spec.width) for vectors in expected.values()):
            raise BadBundle("the golden regions' vectors are of another size", file=bundle.path, found=name)
    return regions, expected


def compare(expected: Array, found: Array) -> tuple[float, float]:
    """Smallest cosine of vectors (T, H), and largest difference relative to the expected one's root mean square.

    Zero and infinity where a vector is none.
    """
    if not all(np.isfinite(vectors).all() and vectors.any(axis=1).all() for vectors in (expected, found)):
        return 0.0, float("inf")
    a, b = expected.astype(np.float64), found.astype(np.float64)
    cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    scale = np.sqrt((a**2).mean(axis=1, keepdims=True))
    return float(cosine.min()), float((np.abs(a - b) / scale).max())


def reproduce(
    backend: Backend | WholeReader,
    prompt: Prompt,
    expected: Array,
    tolerance: Mapping[str, float],
    *,
    failed: str,
    fix: str,
    file: Path | None = None,
) -> tuple[float, float]:
    """Encode a region again: what :func:`compare` finds of its vectors and the expected ones (T, H).

    Args:
        backend, prompt: The encoder, and its input.
        expected: The vectors to reproduce.
        tolerance: ``cosine``, the smallest that passes, and ``difference``, the largest.
        failed, fix, file: Of the error.

    Raises:
        BadBundle: Saying ``failed``, if the vectors are further off than that.
    """
    cosine, difference = compare(expected, pooled(backend, [prompt])[0])
    if not (cosine >= tolerance["cosine"] and difference <= tolerance["difference"]):
        raise BadBundle(
            failed,
            file=file,
            expected=f"cosine ≥ {tolerance['cosine']}, relative difference ≤ {tolerance['difference']}",
            found=f"cosine {cosine:.6f}, relative difference {difference:.3g}",
            fix=fix,
        )
    return cosine, difference
