"""Import a city from a clone of HAFusion's repository and, where there is one, of Prompt4RE's.

HAFusion (ICDE 2024) publishes Chicago, New York and San Francisco as .npy files whose row i is the same
region in every file; it publishes no ids, no category names and no coordinates. Prompt4RE (the ToPT authors')
adds geo-text with coordinates, and encoded prompts, for Chicago alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.geometry import geo_metadata, geometry_types
from topt_deploy.data.gis_files import Places, read_geometry
from topt_deploy.errors import BadData, NoInput, UsageError, how_many

from .city_files import fixed_lists, flow_table, table, write_city
from .hafusion_files import (
    LABELS,
    Messages,
    check_same_labels,
    city_folder,
    load_array,
    load_label,
    read_messages,
    read_prompts,
)

Array = np.ndarray[Any, Any]
CITIES = {"Chi": "Chicago", "NY": "New York", "SF": "San Francisco"}
"""The names of the cities, by their folders."""
VIEWS = {"poi": "poi_dist.npy", "land_use": "landUse_dist.npy"}
ENCODERS = {"llama": "meta-llama/Llama-3.2-11B-Vision-Instruct", "qwen": "Qwen/Qwen2.5-VL-7B-Instruct"}


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
    _check_options(prompt4re, encoder, geometry, geometry_id, geometry_by_position, geometry_name, src_crs)
    notes = ["categories are named by position (poi_00, …): their names are not published"]
    data = city_folder(Path(directory), city)
    published = _read(data, None if prompt4re is None else prompt4re / "data", encoder, notes)
    messages, labels, flow, target = published.messages, published.labels, published.flow, published.target
    n = len(flow)
    numbers = _numbers(messages, n, notes)
    ids = np.array([f"{number:0{len(str(max(numbers)))}d}" for number in numbers])
    if geometry is not None:
        places = _places(geometry, geometry_id, geometry_name, src_crs, numbers)
    else:
        places = _published_places(messages, data, city)
    name = CITIES.get(city, city)
    encoder_id = ENCODERS[encoder] if encoder else None
    regions = _regions(published, name, ids, places, f"HAFusion data_{city}", encoder_id)
    origin, dest = np.nonzero((flow != 0) | (target != 0))
    flows = {"flow": flow[origin, dest], "target_flow": target[origin, dest]}
    write_city(
        Path(out),
        regions,
        flow_table(name, ids, origin, dest, flows).replace_schema_metadata(
            {"source": (regions.schema.metadata or {})[b"source"]}
        ),
    )
    zero = ids[labels["check_in"] == 0].tolist()
    if zero:
        where = f"{how_many(len(zero), 'region')} ({', '.join(zero)})"
        notes.append(f"no check-ins in {where}: kept as 0; protocol `paper` drops them")
    return ImportReport(
        out=Path(out),
        city=name,
        regions=n,
        categories={view: counts.shape[1] for view, counts in published.views.items()},
        flow_pairs=len(origin),
        trips={"flow": int(flow.sum()), "target_flow": int(target.sum())},
        label_sums={task: int(values.sum()) for task, values in labels.items()},
        zero_check_ins=zero,
        prompts={task: vectors.shape[1] for task, vectors in published.prompts.items()},
        encoder=encoder_id,
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Published:
    """The published files of a city, row by region.

    Attributes:
        views: Counts per view, (N, C).
        flow, target: Flows by origin and destination, (N, N), and what stage 1 learns of them.
        labels: Counts per task, (N,).
        prompts: Vectors per task, (N, H).
        messages: What Prompt4RE says of the regions.
    """

    views: Mapping[str, Array]
    flow: Array
    target: Array
    labels: Mapping[str, Array]
    prompts: Mapping[str, Array]
    messages: "Messages | None"


def _read(data: Path, prompt4re: Path | None, encoder: str | None, notes: list[str]) -> _Published:
    """Everything that is published of a city; what is not is noted."""
    views = {view: load_array(data / file, (None, None)) for view, file in VIEWS.items()}
    n = len(views["poi"])
    views["land_use"] = load_array(data / VIEWS["land_use"], (n, None))
    flow, target = load_array(data / "mob_dist.npy", (n, n)), load_array(data / "mob-adj.npy", (n, n))
    labels = {task: load_label(data / f"{stem}_counts.npy", n) for task, stem in LABELS.items()}
    messages = None
    prompts: dict[str, Array] = {}
    if prompt4re is not None:
        messages = read_messages(prompt4re / "prompt_data.json", n)
        check_same_labels(prompt4re, data, labels)
        if encoder is not None:
            prompts = read_prompts(prompt4re, encoder, n)
        notes.append(f"the {messages.images:,} image paths are of the authors' disk and are left out")
    return _Published(
        views=views,
        flow=flow,
        target=target,
        labels=labels,
        prompts=prompts,
        messages=messages,
    )


def _check_options(
    prompt4re: Path | None,
    encoder: str | None,
    geometry: Path | None,
    geometry_id: str | None,
    geometry_by_position: bool,
    geometry_name: str | None,
    src_crs: str | None,
) -> None:
    """Refuse options that do not go together."""
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


def _published_places(messages: "Messages | None", data: Path, city: str) -> Places:
    """The regions' places by Prompt4RE's texts.

    Raises:
        NoInput: If there are none.
    """
    if messages is not None:
        return Places(ids=None, lonlat=messages.lonlat, wkb=None)
    raise NoInput(
        "HAFusion publishes no coordinates",
        file=data,
        expected="the place of every region",
        fix=("add --prompt4re DIR (its geo-texts have Chicago's), or " if city == "Chi" else "add ")
        + "--geometry FILE with --geometry-id COLUMN or --geometry-order position",
    )


def _regions(
    published: _Published, name: str, ids: Array, places: Places, source: str, encoder_id: str | None
) -> pa.Table:
    """The regions table of the contract."""
    messages = published.messages
    columns: dict[str, Any] = {"region_id": ids, "city_id": [name] * len(ids)}
    if places.names is not None:
        columns["name"] = pa.array(places.names, pa.string())
    columns |= {"lon": places.lonlat[:, 0], "lat": places.lonlat[:, 1]}
    metadata: dict[str, str | bytes] = {
        "source": source + (" and Prompt4RE data" if messages else ""),
        "categories": "named by position: names not published",
    }
    if places.wkb is not None:
        columns["geometry"] = places.wkb
        metadata["geo"] = geo_metadata(geometry_types(places.wkb))
    if messages is not None:
        columns["text"] = messages.text
    for view, counts in published.views.items():
        columns |= {f"{view}_{position:02d}": counts[:, position] for position in range(counts.shape[1])}
    columns |= published.labels
    columns |= {f"prompt_{task}": fixed_lists(vectors) for task, vectors in published.prompts.items()}
    if encoder_id:
        metadata["encoder"] = encoder_id
    fields = {f"prompt_{task}": {"encoder": str(encoder_id)} for task in published.prompts}
    return table(columns, metadata, fields)


def _numbers(messages: Messages | None, n: int, notes: list[str]) -> list[int]:
    """Each row's region number: that of its images' folder where all rows have one, else its position."""
    if messages is not None and None not in messages.number and len(set(messages.number)) == n:
        notes.append("region_id is the number that the images are filed under (Chicago's community area)")
        return [number for number in messages.number if number is not None]
    notes.append("region_id is the row's position, from 1: no ids are published")
    return list(range(1, n + 1))


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
