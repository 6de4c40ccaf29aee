"""The inputs of a command line: one city's table, or many cities."""

import os
from collections.abc import Sequence
from pathlib import Path

from .addresses import is_uri

REGIONS, MOBILITY, PREDICTIONS = "regions.parquet", "mobility.parquet", "predictions.parquet"


def one_city(inputs: Sequence[str], out: str | None) -> Path | None:
    """The regions table, where a command line names just one and its output is to be a file; else None."""
    import glob  # a start with one table does not need it

    from topt_deploy.data.parquet import is_part, one_file  # with Arrow, which --help does without

    if len(inputs) != 1 or is_uri(inputs[0]) or (out is not None and (out.endswith("/") or is_uri(out))):
        return None
    given = Path(inputs[0])
    if os.path.isdir(given):  # unlike pathlib's, no error for a name that is too long
        if (given / REGIONS).is_dir() or any(is_part(name) for name in os.listdir(given)):
            return one_file(given / REGIONS if (given / REGIONS).is_dir() else given)
        given /= REGIONS
        if not os.path.exists(given):
            return None
    elif not os.path.exists(given) and glob.has_magic(inputs[0]):
        return None
    return None if out is not None and os.path.isdir(out) else given
