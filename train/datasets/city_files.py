"""Writing a city as the two files of the contract: regions.parquet and mobility.parquet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy.data.parquet import ParquetFile, write_parquet
from topt_deploy.errors import ToptError
from topt_deploy.storage.os_errors import writing
from topt_deploy.storage.outputs import check_outputs

Array = np.ndarray[Any, Any]

REGIONS = "regions.parquet"
MOBILITY = "mobility.parquet"


def write_city(folder: Path, regions: pa.Table, mobility: pa.Table) -> None:
    """Write both tables into ``folder``, which is made where absent, each file atomically.

    Raises:
        CannotCreate, IOFailure: If the operating system refuses.
        UsageError: If there are tables that the command did not write (:func:`check_city`).
    """
    check_city(folder, (regions.schema.metadata or {})[b"source"].decode())
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, table in ((MOBILITY, mobility), (REGIONS, regions)):
        write_parquet(folder / name, table)


def check_city(folder: Path, source: str) -> None:
    """Refuse to replace tables of a city unless they come from the same source.

    Args:
        folder: The city's folder.
        source: As the tables' metadata name it; its first two words are compared, without a command's options.

    Raises:
        UsageError: Naming the table.
    """

    def ours(file: Path) -> bool:
        try:
            found = ParquetFile(file).metadata.get(b"source", b"").decode(errors="replace")
        except ToptError:
            return False
        return found.split()[:2] == source.split()[:2]

    check_outputs([folder / REGIONS, folder / MOBILITY], ours=ours)


def fixed_lists(values: Array) -> pa.FixedSizeListArray:
    """Rows of a float32 (N, W) array as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32).ravel()), values.shape[1])


def table(
    columns: Mapping[str, Any],
    metadata: Mapping[str, str | bytes],
    fields: Mapping[str, Mapping[str, str]] | None = None,
) -> pa.Table:
    """A table with metadata for the whole and, by column name, for single fields."""
    built = pa.table(dict(columns))
    described = [field.with_metadata((fields or {}).get(field.name)) for field in built.schema]
    return built.cast(pa.schema(described, metadata=dict(metadata)))


def flow_table(city_id: str, ids: Array, origin: Array, dest: Array, flows: Mapping[str, Array]) -> pa.Table:
    """A mobility table; ``origin`` and ``dest`` (E,) are positions in ``ids``, each of ``flows`` is (E,)."""
    city = pa.array([city_id] * len(origin))
    return pa.table({"city_id": city, "origin_id": ids[origin], "dest_id": ids[dest], **flows})
