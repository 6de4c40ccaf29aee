"""Finished runs of small cities, trained within this process."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from builders import quiet

from topt_deploy.config.settings import Config
from topt_deploy.data.parquet import write_parquet
from topt_deploy.train.loop import TrainingDevice
from topt_deploy.train.run import start_run, train_run


@pytest.fixture(scope="session")
def make_run() -> Callable[[Path, pa.Table, pa.Table, Config], Path]:
    """Write a city below a folder, and a finished run of it, whose folder is returned."""

    def make(folder: Path, regions: pa.Table, mobility: pa.Table, config: Config) -> Path:
        city = folder / "city"
        city.mkdir(parents=True)
        files = {name: city / f"{name}.parquet" for name in ("regions", "mobility")}
        write_parquet(files["regions"], regions)
        write_parquet(files["mobility"], mobility)
        run = start_run(city / "runs" / "a", city, config, **files)
        train_run(run, **files, engine=TrainingDevice(device=torch.device("cpu")), reporter=quiet())
        return run.path

    return make
