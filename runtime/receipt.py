"""The receipt beside every output: what was predicted from what, with what, and how long it took.

Facts of the run live here and not in the output, so that the same input gives the same output bytes.
"""

import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa

from topt_deploy import __version__
from topt_deploy.fileio import sha256_file, write_json

from .predictor import PRECISION, Predictor


class Stopwatch:
    """Seconds per named step."""

    def __init__(self) -> None:
        self.started = datetime.now(UTC)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 4)


def receipt_path(output: Path) -> Path:
    """``predictions.parquet`` → ``predictions.receipt.json``."""
    return output.with_name(f"{output.stem}.receipt.json")


def write_receipt(
    output: Path,
    *,
    inputs: dict[str, Path | None],
    predictor: Predictor,
    predictions: pa.Table,
    options: dict[str, Any],
    watch: Stopwatch,
) -> dict[str, Any]:
    """Write the receipt of an output that already stands; return it.

    Args:
        output: The predictions file.
        inputs: The input files by role.
        options: The options that shaped the output.
    """
    record = {
        "output": {"file": output.name, "sha256": sha256_file(output), "rows": len(predictions)},
        "inputs": {
            role: {"file": str(path), "sha256": sha256_file(path)} for role, path in inputs.items() if path is not None
        },
        "bundle": {"file": str(predictor.bundle.path), "sha256": predictor.bundle.sha256},
        "options": options | {"coverage": {t: predictor.coverage(t, options["coverage"]) for t in options["tasks"]}},
        "status": dict(sorted(Counter(predictions.column("status").to_pylist()).items())),
        "encoder": predictor.encoded,
        "provider": predictor.provider,
        "precision": PRECISION,
        "versions": {
            "topt-deploy": __version__,
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "python": platform.python_version(),
        },
        "started": watch.started.isoformat(timespec="seconds"),
        "seconds": watch.seconds,
    }
    write_json(receipt_path(output), record)
    return record
