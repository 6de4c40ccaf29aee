"""The inputs of a command line: one city's table, or many cities."""

import os
from collections.abc import Sequence
from pathlib import Path

from topt_deploy.storage.table_parts import find_table

from .addresses import is_uri

REGIONS, MOBILITY, PREDICTIONS = "regions.parquet", "mobility.parquet", "predictions.parquet"


def one_city(inputs: Sequence[str], out: str | None) -> Path | None:
    """The regions table, where a command line names just one and its output is to be a file; else None."""
    import glob  # a start with one table does not need it

    if len(inputs) != 1 or is_uri(inputs[0]) or (out is not None and (out.endswith("/") or is_uri(out))):
        return None
    if not os.path.exists(inputs[0]) and glob.has_magic(inputs[0]):
        return None
    table = find_table(Path(inputs[0]))
    return None if table is None or (out is not None and os.path.isdir(out)) else table
