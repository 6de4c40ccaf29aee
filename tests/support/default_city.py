"""A bundle with all parts that the default has, in their size, from training of two epochs: what it costs to run it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from commands import Said, shell

from topt_deploy.data.parquet import read_parquet, write_parquet
from topt_deploy.prompts.options import TASKS

WIDTH = 4096
"""Of the prompts, as Llama-3.2-11B has it."""
SHORT = "--set srel.epochs=2 --set ensemble.epochs=2 --set ensemble.steps=2 --set prompt4re.epochs=2"


def make_default_city(folder: Path) -> Said:
    """Train and export a city of 77 regions with prompts of random numbers.

    Args:
        folder: To be made; ``model.topt`` is the bundle.
    """
    shell(f"topt-deploy sample --out {folder} --regions 77", folder.parent)
    regions = read_parquet(folder / "regions.parquet")
    numbers = np.random.default_rng(0)
    for task in TASKS:
        entries = numbers.standard_normal(len(regions) * WIDTH, np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(entries), WIDTH)
        place = regions.schema.get_field_index(f"prompt_{task}")
        regions = regions.set_column(place, f"prompt_{task}", column)
    write_parquet(folder / "regions.parquet", regions)
    trained = shell(f"topt-deploy train --preset default {SHORT}", folder)
    return trained if trained.code else shell("topt-deploy export", folder)
