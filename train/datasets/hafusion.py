"""Import a city from a clone of HAFusion's repository and, where there is one, of Prompt4RE's.

HAFusion (ICDE 2024) publishes Chicago, New York and San Francisco as .npy files whose row i is the same
region in every file; it publishes no ids, no category names and no coordinates. Prompt4RE (the ToPT authors')
adds geo-text with coordinates, and encoded prompts, for Chicago alone.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.geometry import geo_metadata, geometry_types
from topt_deploy.data.gis_files import Places, read_geometry
from topt_deploy.errors import BadData, NoInput, UsageError
from topt_deploy.storage.os_errors import reading

from .city_files import fixed_lists, flow_table, table, write_city

Array = np.ndarray[Any, Any]

CITIES = {"Chi": "Chicago", "NY": "New York", "SF": "San Francisco"}
"""The names of the cities, by their folders."""
VIEWS = {"poi": "poi_dist.npy", "land_use": "landUse_dist.npy"}
LABELS = {"crime": "crime", "check_in": "check", "service_call": "serviceCall"}
"""Our task names and the stems of both repositories' ``*_counts.npy``."""
PROMPTS = {"crime": "crime", "check_in": "checkIn", "service_call": "serviceCall", "none": "none"}
ENCODERS = {"llama": "meta-llama/Llama-3.2-11B-Vision-Instruct", "qwen": "Qwen/Qwen2.5-VL-7B-Instruct"}

_COORDINATES = re.compile(r"Centroid Coordinates: \(\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\)")
_REGION_IN_PATH = re.compile(r"/matched_images_by_region/(\d+)/")


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """A summary of what was imported, for the user to compare with what they expected."""

    out: Path
    city: str
    regions: int
    categories: dict[str, int]
    flow_pairs: int
    trips: dict[str, int]
    label_sums: dict[str, int]
    zero_check_ins: list[str]
    prompts: dict[str, int]
    encoder: str | None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{width} {name}" for name, width in self.categories.items())
        trips = ", ".join(f"{name} {total:,}" for name, total in self.trips.items())
        labels = ", ".join(f"{task} {total:,}" for task, total in self.label_sums.items())
        prompts = ", ".join(f"{task} ({width})" for task, width in self.prompts.items())
        lines = [
            f"{self.city}: {self.regions} regions",
            f"  categories  {counts}",
            f"  flows       {self.flow_pairs:,} pairs; {trips}",
            f"  labels      {labels}",
            f"  prompts     {f'{prompts} by {self.encoder}' if prompts else 'none'}",
            *(f"  note        {note}" for note in self.notes),
            f"next: cd {self.out} && topt-deploy train",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Messages:
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


def import_hafusion(
    directory: Path,
    city: str,
    *,
    out: Path,
    prompt4re: Path | None = None,
    encoder: str | None = None,
    geometry: Path | None = None,
    geometry_id: str | None = None,
    geometry_by_position: bool = False,
    geometry_name: str | None = None,
    src_crs: str | None = None,
) -> ImportReport:
    """Write ``out``/regions.parquet and mobility.parquet from the published files.

    Args:
        directory: Clone of HAFusion, with ``data_<city>/``.
        city: "Chi", "NY" or "SF", as the folder names it.
        out: Folder to write to.
        prompt4re: Clone of Prompt4RE, with ``data/``.
        encoder: "llama" or "qwen", whose prompt vectors to take; None takes none.
        geometry: GIS file or table with the regions' places; needed where no coordinates are published.
        geometry_id: Its column that holds each region's number, 1 to N.
        geometry_by_position: Its features are in the order of the .npy rows, which nothing can check.
        geometry_name: Its column of names for people.
        src_crs: Its reference system, where it states none.

    Raises:
        UsageError: If the options do not go together.
        NoInput: If a file, or the regions' coordinates, are missing.
        BadData: If a file is not what was published.
    """
    if encoder is not None and prompt4re is None:
        raise UsageError("--encoder chooses among Prompt4RE's vectors", fix="add --prompt4re DIR")
    if geometry is None and (geometry_id or geometry_by_position or geometry_name or src_crs):
        raise UsageError(
            "--geometry-id, --geometry-order, --geometry-name and --src-crs say how to read --geometry",
            fix="add --geometry",
        )
    if geometry is not None and (geometry_id is not None) == geometry_by_position:
        raise UsageError(
            "how features and regions belong together is not stated, or twice",
            file=geometry,
            expected="either --geometry-id COLUMN, with each region's number from 1 as in the .npy rows,"
            " or --geometry-order position",
            fix="no ids are published; trust the position only of a file made from the published rows",
        )
    data = _city_folder(Path(directory), city)
    views = {view: _load(data / file, (None, None)) for view, file in VIEWS.items()}
    n = len(views["poi"])
    views["land_use"] = _load(data / VIEWS["land_use"], (n, None))
    flow, target = _load(data / "mob_dist.npy", (n, n)), _load(data / "mob-adj.npy", (n, n))
    labels = {task: _label(data / f"{stem}_counts.npy", n) for task, stem in LABELS.items()}

    notes = ["categories are named by position (poi_00, …): their names are not published"]
    messages = None
    prompts: dict[str, Array] = {}
    if prompt4re is not None:
        messages = _messages(prompt4re / "data" / "prompt_data.json", n)
        _same_labels(prompt4re / "data", data, labels)
        if encoder is not None:
            prompts = _prompts(prompt4re / "data", encoder, n)
        notes.append(f"the {messages.images:,} image paths are of the authors' disk and are left out")
    numbers = _numbers(messages, n, notes)
    ids = np.array([f"{number:0{len(str(max(numbers)))}d}" for number in numbers])
    if geometry is not None:
        places = _places(geometry, geometry_id, geometry_name, src_crs, numbers)
    elif messages is not None:
        places = Places(ids=None, lonlat=messages.lonlat, wkb=None)
    else:
        raise NoInput(
            "HAFusion publishes no coordinates",
            file=data,
            expected="the place of every region",
            fix=("add --prompt4re DIR (its geo-texts have Chicago's), or " if city == "Chi" else "add ")
            + "--geometry FILE with --geometry-id COLUMN or --geometry-order position",
        )

    name = CITIES.get(city, city)
    columns: dict[str, Any] = {"region_id": ids, "city_id": [name] * n}
    if places.names is not None:
        columns["name"] = pa.array(places.names, pa.string())
    columns |= {"lon": places.lonlat[:, 0], "lat": places.lonlat[:, 1]}
    metadata: dict[str, str | bytes] = {
        "source": f"HAFusion data_{city}" + (" and Prompt4RE data" if messages else ""),
        "categories": "named by position: names not published",
    }
    if places.wkb is not None:
        columns["geometry"] = places.wkb
        metadata["geo"] = geo_metadata(geometry_types(places.wkb))
    if messages is not None:
        columns["text"] = messages.text
    for view, counts in views.items():
        columns |= {f"{view}_{position:02d}": counts[:, position] for position in range(counts.shape[1])}
    columns |= labels
    columns |= {f"prompt_{task}": fixed_lists(vectors) for task, vectors in prompts.items()}
    encoder_id = ENCODERS[encoder] if encoder else None
    if encoder_id:
        metadata["encoder"] = encoder_id
    fields = {f"prompt_{task}": {"encoder": str(encoder_id)} for task in prompts}

    origin, dest = np.nonzero((flow != 0) | (target != 0))
    flows = {"flow": flow[origin, dest], "target_flow": target[origin, dest]}
    write_city(
        Path(out),
        table(columns, metadata, fields),
        flow_table(name, ids, origin, dest, flows).replace_schema_metadata({"source": metadata["source"]}),
    )
    zero = ids[labels["check_in"] == 0].tolist()
    if zero:
        notes.append(f"no check-ins in {len(zero)} regions ({', '.join(zero)}): kept as 0; protocol `paper` drops them")
    return ImportReport(
        out=Path(out),
        city=name,
        regions=n,
        categories={view: counts.shape[1] for view, counts in views.items()},
        flow_pairs=len(origin),
        trips={"flow": int(flow.sum()), "target_flow": int(target.sum())},
        label_sums={task: int(values.sum()) for task, values in labels.items()},
        zero_check_ins=zero,
        prompts={task: vectors.shape[1] for task, vectors in prompts.items()},
        encoder=encoder_id,
        notes=notes,
    )


def _city_folder(directory: Path, city: str) -> Path:
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


def _load(path: Path, shape: tuple[int | None, ...]) -> Array:
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


def _label(path: Path, n: int) -> Array:
    array = _array(path)
    if array.ndim == 2 and array.shape[1] == 1:  # as New York's and San Francisco's are
        array = array[:, 0]
    return _counts(_shaped(array, path, (n,)), path)


def _messages(path: Path, n: int) -> _Messages:
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
    return _Messages(
        text=text,
        lonlat=lonlat,
        number=[next(iter(numbers)) if len(numbers) == 1 else None for numbers in named],
        images=sum(map(len, images)),
    )


def _numbers(messages: _Messages | None, n: int, notes: list[str]) -> list[int]:
    """Each row's region number: that of its images' folder where all rows have one, else its position."""
    if messages is not None and None not in messages.number and len(set(messages.number)) == n:
        notes.append("region_id is the number that the images are filed under (Chicago's community area)")
        return [number for number in messages.number if number is not None]
    notes.append("region_id is the row's position, from 1: no ids are published")
    return list(range(1, n + 1))


def _same_labels(folder: Path, hafusion: Path, labels: dict[str, Array]) -> None:
    """Both repositories publish the labels: where these agree, so do their rows."""
    for task, stem in LABELS.items():
        path = folder / f"{stem}_counts.npy"
        if path.exists() and not np.array_equal(_label(path, len(labels[task])), labels[task]):
            raise BadData(
                "labels are not those of HAFusion, so the rows may be other regions",
                file=path,
                expected=f"the numbers of {hafusion / path.name}",
                fix="take both clones as published",
            )


def _prompts(folder: Path, encoder: str, n: int) -> dict[str, Array]:
    """Prompt vectors by task, float (N, H); ``none``, without a task's question, exists for llama alone."""
    paths = {task: folder / f"prompt_embs_{encoder}_{stem}.npy" for task, stem in PROMPTS.items()}
    if not paths["none"].exists():
        del paths["none"]
    prompts = {task: _shaped(_array(path), path, (n, None)) for task, path in paths.items()}
    for task, vectors in prompts.items():
        if vectors.dtype.kind != "f" or not np.isfinite(vectors).all():
            raise BadData("not finite floats", file=paths[task], found=vectors.dtype)
    return prompts


def _places(path: Path, id_col: str | None, name_col: str | None, crs: str | None, numbers: list[int]) -> Places:
    """The places of the regions in the order of ``numbers``."""
    places = read_geometry(path, id_col, name_col=name_col, crs=crs)
    if places.ids is None:
        if len(places.lonlat) != len(numbers):
            raise BadData(
                "another number of features", file=path, expected=len(numbers), found=len(places.lonlat),
                fix="give the file with exactly the published regions, or match by --geometry-id",
            )  # fmt: skip
        return places
    row = {int(value): row for row, value in enumerate(places.ids) if value.isascii() and value.isdigit()}
    missing = [number for number in numbers if number not in row]
    if missing:
        raise BadData(
            "regions without a feature", file=path, column=id_col, ids=missing,
            expected=f"the numbers {min(numbers)} to {max(numbers)}",
            found=", ".join(map(repr, places.ids[:5].tolist())),
            fix="number the features as the published rows are numbered, from 1",
        )  # fmt: skip
    order = np.array([row[number] for number in numbers])
    wkb = None if places.wkb is None else places.wkb.take(pa.array(order))
    names = None if places.names is None else [places.names[place] for place in order.tolist()]
    return Places(ids=places.ids[order], lonlat=places.lonlat[order], wkb=wkb, names=names)
