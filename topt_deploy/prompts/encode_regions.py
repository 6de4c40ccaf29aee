"""``topt_deploy.encode``: prompt vectors in one call, of files or of tables in memory, with either kind of encoder."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, overload

import pyarrow as pa

from topt_deploy.arguments import Location, check_choice, check_least, several
from topt_deploy.data.dataframes import ArrowDataset, ArrowStream, as_given, as_kind_of
from topt_deploy.data.parquet import read_parquet
from topt_deploy.errors import BadRows, UsageError

from .encode import FAIL, SKIP, Encoded, Encoder
from .encode import encode as encode_texts_and_images
from .encode_job import EncodeJob
from .options import TASKS
from .table import merge_prompts, read_regions
from .templates import Templates, load_templates

Frame = TypeVar("Frame", bound=ArrowStream)
Opened: TypeAlias = AbstractContextManager[tuple[Encoder, Templates]]

OPENERS = {
    "bundle": "topt_deploy.runtime.prompt_encoder",
    "model": "topt_deploy.prompts.pytorch.load",
}
"""The module whose ``encoder_for`` opens an encoder, by how it is given. PyTorch and ONNX Runtime are imported then."""


@overload
def encode(
    regions: Location | ArrowDataset,
    *,
    bundle: Location | None = None,
    model: Location | None = None,
    tasks: str | Iterable[str] = (),
    templates: Location | None = None,
    out: Location | None = None,
    update_regions: bool = False,
    images_root: Location | None = None,
    on_bad_image: Literal["fail", "skip"] = "fail",
    resume: bool = False,
    no_cache: bool = False,
    batch: int = 1,
    threads: int = 1,
    device: Literal["cpu", "cuda", "tensorrt", "auto"] = "cpu",
    encoder_engine: Literal["onnxruntime", "openvino"] = "onnxruntime",
    require_signature: Location | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    max_pixels: int | None = None,
    allow_download: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table: ...
@overload
def encode(
    regions: Frame,
    *,
    bundle: Location | None = None,
    model: Location | None = None,
    tasks: str | Iterable[str] = (),
    templates: Location | None = None,
    out: Location | None = None,
    update_regions: bool = False,
    images_root: Location | None = None,
    on_bad_image: Literal["fail", "skip"] = "fail",
    resume: bool = False,
    no_cache: bool = False,
    batch: int = 1,
    threads: int = 1,
    device: Literal["cpu", "cuda", "tensorrt", "auto"] = "cpu",
    encoder_engine: Literal["onnxruntime", "openvino"] = "onnxruntime",
    require_signature: Location | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    max_pixels: int | None = None,
    allow_download: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Frame: ...
def encode(
    regions: object,
    *,
    bundle: Location | None = None,
    model: Location | None = None,
    tasks: str | Iterable[str] = (),
    templates: Location | None = None,
    out: Location | None = None,
    update_regions: bool = False,
    images_root: Location | None = None,
    on_bad_image: Literal["fail", "skip"] = "fail",
    resume: bool = False,
    no_cache: bool = False,
    batch: int = 1,
    threads: int = 1,
    device: Literal["cpu", "cuda", "tensorrt", "auto"] = "cpu",
    encoder_engine: Literal["onnxruntime", "openvino"] = "onnxruntime",
    require_signature: Location | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    max_pixels: int | None = None,
    allow_download: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Encode texts and images of regions to prompt vectors with a frozen language model (docs/how-to/encode.md).

    Args:
        regions: A path, of a ``regions.parquet`` or its folder, is encoded as the commands do it: ``prompts.parquet``
            is written, and what was encoded before is taken from the cache. Of a table in memory nothing is written.
        bundle: A bundle with an exported encoder, as for ``topt-run encode``; needs no PyTorch.
        model: In place of it a model's folder or its id on the Hugging Face hub, as for ``topt-deploy encode``; PyTorch
            runs it.
        tasks: One task or several; crime, check_in and service_call by default.
        templates: A TOML file with tasks and wordings of your own.
        out: The file that is written, ``prompts.parquet`` beside the regions by default. For paths.
        update_regions: Return the regions with the vectors in them, and put them into the regions' file where there
            is one.
        images_root: The folder that images lie below; that of the regions' file by default.
        on_bad_image: ``fail``, or ``skip``, which leaves such regions out and says why.
        resume: Go on with a run that was cut off; an error if there is none. For paths.
        no_cache: Neither read nor write the cache beside the regions.
        batch: Regions at once.
        threads: CPU threads.
        device: ``cpu`` or ``cuda``; for a bundle also ``tensorrt`` or ``auto``.
        encoder_engine, require_signature: Of a bundle: what runs it, and the key that must have signed it.
        precision, max_pixels, allow_download, revision: Of a model: what it computes in, the size that images are
            reduced to, whether it may be fetched from the hub, and at which commit.
        progress: Called with how many regions are done, and of how many.

    Returns:
        One row per region: ``region_id, city_id, status, reason`` and ``prompt_<task>``; a DataFrame of the same
        library as ``regions``, or a ``pyarrow.Table`` for paths. Arrow's tables alone keep the names of encoder and
        template with each column, by which prompts of another encoder are refused.

    Raises:
        UsageError: If not one of ``bundle`` and ``model`` is given, or options do not go together.
        ToptError: If the encoder is not there or not sound, or a text or an image cannot be encoded.
    """
    check_choice("on_bad_image", on_bad_image, (FAIL, SKIP))
    check_least("batch", batch)
    check_least("threads", threads)
    given = as_given(regions, BadRows.REGIONS)
    job = None
    if isinstance(given, Path):
        job = EncodeJob(
            city=given, tasks=several(tasks), out=None if out is None else Path(out), update_regions=update_regions,
            images_root=None if images_root is None else Path(images_root), on_bad_image=on_bad_image, resume=resume,
            no_cache=no_cache,
        )  # fmt: skip
    elif out is not None or resume:
        raise UsageError("a table in memory has no files", expected="no out and no resume", fix="pass a path instead")
    with _open(
        bundle, model, device=device, threads=threads,
        of_bundle={"encoder_engine": encoder_engine, "require_signature": require_signature},
        of_model={
            "precision": precision, "max_pixels": max_pixels, "allow_download": allow_download, "revision": revision,
        },
    ) as (encoder, own):  # fmt: skip
        asked = own if templates is None else load_templates(Path(templates))
        told = progress or (lambda done, total: None)
        if job is not None:
            done = job.run(encoder, asked, batch=batch, progress=told)
            return read_parquet(job.regions) if update_regions else done.table
        done = _in_memory(
            given, encoder, asked, several(tasks) or TASKS, batch=batch, on_bad_image=on_bad_image, progress=told,
            root=None if images_root is None else Path(images_root),
        )  # fmt: skip
    return as_kind_of(regions, merge_prompts(given, done.table) if update_regions else done.table)


def _open(
    bundle: Location | None,
    model: Location | None,
    *,
    device: str,
    threads: int,
    of_bundle: dict[str, Any],
    of_model: dict[str, Any],
) -> Opened:
    """The encoder, ready to run, and its templates."""
    if (bundle is None) == (model is None):
        raise UsageError(
            "one encoder is needed", expected="bundle or model", found="neither" if bundle is None else "both"
        )
    way, place, options = ("model", model, of_model) if bundle is None else ("bundle", bundle, of_bundle)
    opened: Opened = import_module(OPENERS[way]).encoder_for(place, device=device, threads=threads, **options)
    return opened


def _in_memory(
    table: pa.Table, encoder: Encoder, templates: Templates, tasks: tuple[str, ...], *, root: Path | None, **how: Any
) -> Encoded:
    regions = read_regions(table, templates.wording)
    if root is None and any(regions.images):
        raise UsageError(
            "a table in memory names images, and has no folder that they may lie in", fix="name it: images_root=…"
        )
    return encode_texts_and_images(regions, encoder, templates, tasks, root=root, **how)
