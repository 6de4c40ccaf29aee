"""The columns of a regions table that the encoder reads, and the table of prompt vectors that it writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.city import infer_schema, read_city
from topt_deploy.data.columns import CITY_ID, PROMPT_PREFIX, REGION_ID, TableReader, some, strings
from topt_deploy.errors import BadData, BadRows

from .geotext import geo_text
from .templates import Wording

Array = np.ndarray[Any, Any]

TEXT = "text"
IMAGES = "images"
ADDRESS = "address"
POI = "poi"
STATUS = "status"
REASON = "reason"


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptRegions:
    """The regions to encode, sorted by region id. N regions.

    Attributes:
        region_id: str (N,).
        city_id: The city's name, where the table gives one.
        texts: Geo-text of each region, of the table or built.
        images: Names of each region's images, in the table's order.
    """

    region_id: Array
    city_id: str | None
    texts: tuple[str, ...]
    images: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.region_id)


def read_regions(regions: Path | pa.Table, wording: Wording, *, id_col: str = REGION_ID) -> PromptRegions:
    """Read geo-texts and the names of images.

    A region's text is its ``text`` where it has one, and is built from position, ``address`` and ``poi_*`` where not.

    Args:
        regions: regions.parquet, or the table itself.
        wording: Of geo-texts that are built.
        id_col: The column that holds the region ids.

    Raises:
        BadData: If a column is not of its type, or a region has nothing to be encoded but its position.
        NoInput: If the file is missing.
    """
    source = TableReader(regions, BadRows.REGIONS, lambda column: column in (TEXT, ADDRESS, IMAGES))
    texts, addresses, images = _strings(source, TEXT), _strings(source, ADDRESS), _images(source)
    counted = None in texts and any(column == POI or column.startswith(f"{POI}_") for column in source.everything)
    if counted:
        _check_named(source)
    schema = infer_schema(regions, views=[POI] if counted else [], mobility=False)
    city = read_city(regions, None, schema, id_col=id_col)
    rows = city.input_row.tolist()
    poor = [not (counted or texts[row] or addresses[row] or images[row]) for row in rows]
    if any(poor):
        raise BadData(
            "some regions have nothing but a position",
            file=source.name,
            ids=city.region_id[poor],
            expected=f"a {TEXT!r}, columns {POI + '_<category>'!r}, an {ADDRESS!r}, or {IMAGES!r}",
            found=f"columns {some(source.everything)}",
            fix="add one of them, or leave these regions out",
        )
    built = []
    for position, row in enumerate(rows):
        lon, lat = city.lonlat[position].tolist()
        pois = dict(zip(schema.views[POI], city.views[POI][position].tolist(), strict=True)) if counted else None
        built.append(texts[row] or geo_text(wording, lon=lon, lat=lat, address=addresses[row], pois=pois))
    return PromptRegions(
        region_id=city.region_id,
        city_id=city.city_id,
        texts=tuple(built),
        images=tuple(images[row] for row in rows),
    )


def prompt_table(
    regions: PromptRegions,
    vectors: Mapping[str, Array],
    *,
    reasons: Sequence[str | None],
    encoder: str,
    precision: str,
    templates: Mapping[str, str],
) -> pa.Table:
    """The table of prompt vectors: region_id, city_id, status, reason, and one column ``prompt_<task>`` per task.

    Args:
        regions: Whose vectors these are.
        vectors: float32 (N, H) per task; rows of skipped regions are not looked at.
        reasons: Why a region was skipped; None where it was not. (N,)
        encoder, precision: The encoder and precision of the vectors, for the columns' metadata.
        templates: The hash of each task's template, for the same.

    Raises:
        BadData: If a vector is no vector: an entry is not finite, or all are 0.
    """
    skipped = np.array([reason is not None for reason in reasons])
    columns: dict[str, Any] = {
        REGION_ID: pa.array(regions.region_id.tolist(), pa.string()),
        CITY_ID: pa.array([regions.city_id] * len(regions), pa.string()),
        STATUS: pa.array(np.where(skipped, "skipped", "ok").tolist(), pa.string()),
        REASON: pa.array(reasons, pa.string()),
    }
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    for task, values in vectors.items():
        name = PROMPT_PREFIX + task
        bad = ~skipped & ~(np.isfinite(values).all(axis=1) & values.any(axis=1))
        if bad.any():
            raise BadData(
                f"the encoder gave no usable vector at precision {precision}", column=name, ids=regions.region_id[bad],
                expected="finite numbers, not all 0", fix="encode in a higher precision",
            )  # fmt: skip
        flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(skipped))
        described = {"encoder": encoder, "template": templates[task], "precision": precision}
        fields.append(pa.field(name, columns[name].type, metadata=described))
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def merge_prompts(regions: pa.Table, prompts: pa.Table, *, id_col: str = REGION_ID) -> pa.Table:
    """The regions table with the prompt columns of ``prompts`` replaced or added, and all else as it was.

    Only the table's own metadata ``encoder`` goes: each prompt column names its own.

    Raises:
        BadData: If the two are not of the same regions of the same city.
    """
    ids, order = _ids(regions, id_col, BadRows.REGIONS), _ids(prompts, REGION_ID, "prompts")
    here, there = _cities(regions), _cities(prompts)
    if here and there and here != there:
        raise BadData(
            "the prompts belong to another city", column=CITY_ID, expected=some(sorted(here)), found=some(sorted(there))
        )
    if ids.keys() != order.keys():
        raise BadData(
            "the prompts are not those of these regions",
            ids=sorted(ids.keys() ^ order.keys(), key=str),
            expected=f"prompts of {len(ids)} regions",
            found=f"{len(ids.keys() - order.keys())} without, {len(order.keys() - ids.keys())} unknown",
            fix="encode this table again",
        )
    rows = pa.array([order[region] for region in ids])
    metadata = {key: value for key, value in (regions.schema.metadata or {}).items() if key != b"encoder"}
    for field in prompts.schema:
        if field.name.startswith(PROMPT_PREFIX):
            column = prompts.column(field.name).take(rows)
            place = regions.schema.get_field_index(field.name)
            regions = regions.append_column(field, column) if place < 0 else regions.set_column(place, field, column)
    return regions.replace_schema_metadata(metadata)


def _ids(table: pa.Table, id_col: str, role: str) -> dict[str | None, int]:
    """Rows by region id."""
    source = TableReader(table, role)
    if not source.has(id_col):
        raise BadData("the region ids are absent", file=source.name, column=id_col, found=some(source.everything))
    ids = strings(source, id_col, fix="encode again")
    rows = {region: row for row, region in enumerate(ids)}
    if len(rows) < len(ids):
        raise BadData("region ids occur more than once", file=source.name, column=id_col, expected="each region once")
    return rows


def _cities(table: pa.Table) -> set[str]:
    return set(table.column(CITY_ID).to_pylist()) - {None} if CITY_ID in table.column_names else set()


def _rows(source: TableReader) -> int:
    return source.table.num_rows if source.file is None else source.file.rows


def _strings(source: TableReader, column: str) -> list[str | None]:
    """A column of texts, None where null, blank or absent."""
    if not source.has(column):
        return [None] * _rows(source)
    kind = source.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_null(kind):
        return [None] * _rows(source)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadData("not text", file=source.name, column=column, expected="string", found=str(kind))
    texts = strings(source, column, fix="write it again")
    return [text if text and text.strip() else None for text in texts]


def _images(source: TableReader) -> list[tuple[str, ...]]:
    """Names of each region's images; none where null or absent."""
    if not source.has(IMAGES) or pa.types.is_null(source.field(IMAGES).type):
        return [()] * _rows(source)
    kind = source.field(IMAGES).type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    text = listed and (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type))
    if not text:
        raise BadData("not lists of files", file=source.name, column=IMAGES, expected="list<string>", found=str(kind))
    try:
        named: list[list[str | None] | None] = source.column(IMAGES).to_pylist()
    except UnicodeDecodeError as error:
        raise BadData(f"not UTF-8 text ({error})", file=source.name, column=IMAGES, fix="write it again") from error
    blank = [f"row {row}" for row, names in enumerate(named) if not all(names or [])]
    if blank:
        raise BadData("a file's name is missing", file=source.name, column=IMAGES, ids=blank, expected="no null entry")
    return [tuple(name for name in names or [] if name) for names in named]


def _check_named(source: TableReader) -> None:
    """Refuse counts in a list without names: "12 of 03" tells a language model nothing."""
    if POI in source.everything and b"categories" not in (source.field(POI).metadata or {}):
        raise BadData(
            "the categories of the POI counts have no names to write",
            file=source.name,
            column=POI,
            expected="names, a JSON list, in the field's metadata `categories`",
            fix=f"name them, or give every region a {TEXT!r}",
        )
