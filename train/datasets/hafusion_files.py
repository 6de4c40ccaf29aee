"""The published files of HAFusion and Prompt4RE, read and checked."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.errors import BadData, NoInput
from topt_deploy.storage.os_errors import reading

Array = np.ndarray[Any, Any]

LABELS = {"crime": "crime", "check_in": "check", "service_call": "serviceCall"}
"""Our task names and the stems of both repositories' ``*_counts.npy``."""
PROMPTS = {"crime": "crime", "check_in": "checkIn", "service_call": "serviceCall", "none": "none"}
_COORDINATES = re.compile(r"Centroid Coordinates: \(\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\)")
_REGION_IN_PATH = re.compile(r"/matched_images_by_region/(\d+)/")


@dataclass(frozen=True, kw_only=True)
class Messages:
    """The entries of prompt_data.json for each region. N regions.

    Attributes:
        text: The geo-texts.
        lonlat: float64 (N, 2), degrees.
        number: The region's own number in its image paths, or None where the paths do not tell.
        images: How many image paths are named.
    """

    text: list[str]
    lonlat: Array
    number: list[int | None]
    images: int


def city_folder(directory: Path, city: str) -> Path:
    folder = directory / f"data_{city}"
    if not folder.is_dir():
        there = sorted(p.name.removeprefix("data_") for p in directory.glob("data_*"))
        raise NoInput(
            f"no data of city {city!r}",
            file=folder,
            found=f"cities {', '.join(there)}" if there else "no data_* folder",
            fix="give the clone's top folder and one of its cities with --city",
        )
    return folder


def _array(path: Path) -> Array:
    with reading(path):
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise BadData(f"not a plain .npy array ({error})", file=path, fix="clone the repository again") from error
    return np.asarray(array)


def _shaped(array: Array, path: Path, shape: tuple[int | None, ...]) -> Array:
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        wanted = " × ".join("any" if size is None else str(size) for size in shape)
        raise BadData(
            "wrong shape", file=path, expected=wanted, found=" × ".join(map(str, array.shape)) or "a scalar",
            fix="row i of every file is the same region; take all files from the same clone",
        )  # fmt: skip
    return array


def load_array(path: Path, shape: tuple[int | None, ...]) -> Array:
    """Counts of a given shape; int64 where all are whole, whatever type they are stored in, else float64."""
    return _counts(_shaped(_array(path), path, shape), path)


def _counts(array: Array, path: Path) -> Array:
    if array.dtype.kind not in "iuf":
        raise BadData("not numbers", file=path, expected="integers or floats", found=array.dtype)
    bad = ~np.isfinite(array) | (array < 0)
    if bad.any():
        rows = [f"row {row}" for row in np.unique(np.nonzero(bad)[0])]
        raise BadData(
            "counts must be finite and not negative", file=path, ids=rows, expected="numbers ≥ 0",
            found=", ".join(f"{value:g}" for value in array[bad][:5]),
        )  # fmt: skip
    whole = array.astype(np.int64)
    return whole if (whole == array).all() else array.astype(np.float64)


def load_label(path: Path, n: int) -> Array:
    array = _array(path)
    if array.ndim == 2 and array.shape[1] == 1:  # as New York's and San Francisco's are
        array = array[:, 0]
    return _counts(_shaped(array, path, (n,)), path)


def read_messages(path: Path, n: int) -> Messages:
    with reading(path):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            contents = [message["content"] for message in raw]
            text = ["\n".join(part["text"] for part in c if part["type"] == "text") for c in contents]
            images = [[part["image"] for part in c if part["type"] == "image"] for c in contents]
        except (ValueError, KeyError, TypeError) as error:
            raise BadData(f"not Prompt4RE's chat messages ({error!r})", file=path, fix="clone it again") from error
    if len(text) != n:
        raise BadData(
            "another number of regions", file=path, expected=f"{n}, as in HAFusion", found=len(text),
            fix="Prompt4RE covers Chicago alone; import other cities without --prompt4re",
        )  # fmt: skip
    found = [_COORDINATES.search(t) for t in text]
    without = [f"row {row}" for row, match in enumerate(found) if match is None]
    if without:
        raise BadData(
            "geo-texts without coordinates",
            file=path,
            ids=without,
            expected="Centroid Coordinates: (lat, lon)",
        )
    lonlat = np.array([(float(match[2]), float(match[1])) for match in found if match])
    named = [{int(k) for image in paths for k in _REGION_IN_PATH.findall(image)} for paths in images]
    return Messages(
        text=text,
        lonlat=lonlat,
        number=[next(iter(numbers)) if len(numbers) == 1 else None for numbers in named],
        images=sum(map(len, images)),
    )


def check_same_labels(folder: Path, hafusion: Path, labels: dict[str, Array]) -> None:
    """Both repositories publish the labels: where these agree, so do their rows."""
    for task, stem in LABELS.items():
        path = folder / f"{stem}_counts.npy"
        if path.exists() and not np.array_equal(load_label(path, len(labels[task])), labels[task]):
            raise BadData(
                "labels are not those of HAFusion, so the rows may be other regions",
                file=path,
                expected=f"the numbers of {hafusion / path.name}",
                fix="take both clones as published",
            )


def read_prompts(folder: Path, encoder: str, n: int) -> dict[str, Array]:
    """Prompt vectors by task, float (N, H); ``none``, without a task's question, exists for llama alone."""
    paths = {task: folder / f"prompt_embs_{encoder}_{stem}.npy" for task, stem in PROMPTS.items()}
    if not paths["none"].exists():
        del paths["none"]
    prompts = {task: _shaped(_array(path), path, (n, None)) for task, path in paths.items()}
    for task, vectors in prompts.items():
        if vectors.dtype.kind != "f" or not np.isfinite(vectors).all():
            raise BadData("not finite floats", file=paths[task], found=vectors.dtype)
    return prompts
