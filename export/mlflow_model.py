"""The exported bundle as an MLflow model, which MLflow itself writes (extra ``mlflow``), without any pickle."""

import errno
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa

from topt_deploy import __version__
from topt_deploy.bundle.manifest import Bundle, Manifest, open_bundle
from topt_deploy.data.columns import CITY_ID, REGION_ID
from topt_deploy.data.parquet import ParquetFile
from topt_deploy.errors import BadConfig, UsageError
from topt_deploy.storage.atomic import atomic_folder
from topt_deploy.storage.os_errors import write_error

LOADER = "topt_deploy.runtime.mlflow"
LEAVING = ("dest_id", "flow")
"""The loader's columns of flows: per region, lists of where they lead and of how large they are."""


def check_mlflow_place(folder: Path) -> None:
    """Refuse, before the work, a place that an MLflow model cannot be written to, and an absent MLflow.

    Raises:
        BadConfig: If MLflow or pandas is not installed.
        UsageError: If something is there already.
        CannotCreate: If its parent is no folder.
    """
    absent = [name for name in ("mlflow", "pandas") if find_spec(name) is None]
    if absent:
        raise BadConfig(
            f"an MLflow model is written by {' and '.join(absent)}, which is not installed",
            fix="pip install 'topt-deploy[mlflow]'",
        )
    if folder.exists() or folder.is_symlink():
        raise UsageError("already exists", file=folder, fix="name a new folder with --mlflow, or remove this one")
    if not folder.parent.is_dir():
        raise write_error(folder, FileNotFoundError(errno.ENOENT, "no such folder"))


def write_mlflow(folder: Path, bundle: Path) -> None:
    """Write an MLflow model that holds a copy of a bundle; the folder stands there whole, or not at all.

    Args:
        folder: The MLflow model; must not exist.
        bundle: A bundle's folder or zip.

    Raises:
        BadBundle: If the copy is not what its manifest says.
    """
    check_mlflow_place(folder)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # or importing MLflow sends usage statistics
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import ModelSignature

    opened = open_bundle(bundle)
    encodes = _encodes(opened.manifest)
    signature = {"inputs": json.dumps(_inputs(opened.manifest, encodes)), "outputs": json.dumps(_outputs())}
    with atomic_folder(folder) as temporary:
        pyfunc.save_model(
            temporary,
            loader_module=LOADER,
            data_path=str(bundle),
            signature=ModelSignature.from_dict(signature),
            input_example=pd.DataFrame(**_example(opened)),
            pip_requirements=[
                "mlflow-skinny>=3",
                "pandas>=2",
                f"topt-deploy[cpu{',encoder' if encodes else ''}]=={__version__}",
                *(f"{module.__name__}=={module.__version__}" for module in (ort, np, pa)),
            ],
            metadata={"bundle_sha256": opened.sha256},
        )
        open_bundle(temporary / "data" / bundle.name).verify()


def _encodes(manifest: Manifest) -> bool:
    """True if the bundle has an encoder, so that regions need no prompts."""
    return manifest.encoder is not None and manifest.encoder["bundle"] is None


def _inputs(manifest: Manifest, encodes: bool) -> list[dict[str, Any]]:
    """MLflow's schema of the DataFrame.

    Counts and flows are of any type there, for MLflow refuses whole numbers where it was told of fractions; the loader
    checks them as it does a table's.
    """
    numbers = {"type": "array", "items": {"type": "double"}}
    counts = [f"{view}_{category}" for view, categories in manifest.views.items() for category in categories]
    columns: list[dict[str, Any]] = [
        {"name": REGION_ID, "type": "string", "required": True},
        {"name": CITY_ID, "type": "string", "required": False},
        *({"name": name, "type": "double", "required": True} for name in ("lon", "lat")),
        *({"name": name, "type": "any", "required": False} for name in [*counts, *LEAVING * manifest.mobility]),
        *({"name": name, **numbers, "required": not encodes} for name in manifest.prompts),
    ]
    if encodes:
        columns += [{"name": name, "type": "string", "required": False} for name in ("text", "address")]
    return columns


def _outputs() -> list[dict[str, Any]]:
    """MLflow's schema of the long predictions table."""
    numbers = ("prediction", "lower", "upper")
    names = ("city_id", "region_id", "task", *numbers, "status", "reason")
    optional = {"city_id", "lower", "upper", "reason"}
    return [
        {"name": name, "type": "double" if name in numbers else "string", "required": name not in optional}
        for name in names
    ]


def _example(bundle: Bundle) -> dict[str, Any]:
    """The smallest golden city as the DataFrame that MLflow keeps as its example."""
    golden = f"golden/{bundle.manifest.golden[0]}"

    def rows(part: str) -> list[dict[str, Any]]:
        name = f"{golden}.{part}.parquet"
        return ParquetFile(bundle.read(name), name).read().to_pylist()

    regions = rows("regions")
    if bundle.manifest.mobility:
        flows = rows("mobility")
        for region in regions:
            mine = [pair for pair in flows if pair["origin_id"] == region[REGION_ID]]
            region |= {name: [pair[name] for pair in mine] for name in LEAVING}
    return {"columns": list(regions[0]), "data": [list(region.values()) for region in regions]}
