"""The receipt beside every output: what was predicted from what, with what, and how long it took.

Facts of the run live here and not in the output, so that the same input gives the same output bytes.
"""

import json
import platform
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa

from topt_deploy import __version__
from topt_deploy.errors import BadRows, ToptError
from topt_deploy.storage.os_errors import read_plain

from .predictor import Predictor

LIMIT_BYTES = 1 << 20
"""Of a receipt: a hundred times what one has."""
_WORD, _SHA256 = re.compile(r"[a-z_]{1,64}\Z"), re.compile(r"[0-9a-f]{64}\Z")


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


def read_receipt(output: Path) -> dict[str, Any] | None:
    """The receipt of an output; None where there is none, or what stands there is none, whatever it is.

    Whoever may write beside the output can write one: all that is used of it is looked at here.
    """
    try:
        record = json.loads(read_plain(receipt_path(output), LIMIT_BYTES))
        return record if _sound(record, output) else None
    except (OSError, ToptError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def _sound(record: Any, output: Path) -> bool:
    def counts(values: Any) -> bool:
        return all(_WORD.match(word) and type(n) is int and 0 <= n < 1 << 63 for word, n in values.items())

    made, aside = record["output"], record["set_aside"]
    return (
        isinstance(record["key"], str)
        and made["file"] == output.name
        and _SHA256.match(made["sha256"]) is not None
        and counts(record["status"])
        and all(type(s) in (int, float) and 0 <= s < 1e12 for s in record["seconds"].values())
        and all(_WORD.match(step) for step in record["seconds"])
        and set(aside) <= {BadRows.REGIONS, BadRows.MOBILITY}
        and all(facts["file"] == aside_path(output, table).name for table, facts in aside.items())
        and all(_SHA256.match(facts["sha256"]) and counts(facts["rows"]) for facts in aside.values())
    )


def aside_path(out: Path, table: str) -> Path:
    """Where the rows of a table that were set aside go: ``predictions.quarantine.parquet`` beside the predictions."""
    return out.with_name(f"{out.stem}.quarantine{'' if table == 'regions' else f'_{table}'}.parquet")


def make_receipt(
    output: Path,
    sha256: str,
    *,
    key: str,
    inputs: Mapping[str, tuple[Path | str, str]],
    predictor: Predictor,
    predictions: pa.Table,
    encoded: Mapping[str, Any] | None,
    aside: Mapping[str, tuple[Path, str, Mapping[str, int]]],
    options: Mapping[str, Any],
    watch: Stopwatch,
) -> dict[str, Any]:
    """The receipt of an output.

    Args:
        output, sha256: The predictions file and its hash.
        key: The hash of everything that the output's bytes depend on.
        inputs: The input files and their hashes, by role.
        encoded: What prompts were made with here, if any were.
        aside: The file that rows of a table went to that were set aside, its hash, and how many by reason code.
        options: The options that shaped the output.
    """
    return {
        "output": {"file": output.name, "sha256": sha256, "rows": len(predictions)},
        "key": key,
        "inputs": {role: {"file": str(path), "sha256": sha256} for role, (path, sha256) in inputs.items()},
        "bundle": {
            "file": str(predictor.bundle.path),
            "sha256": predictor.bundle.sha256,
            "signed_by": predictor.signed_by,
        },
        "options": {**options, "coverage": {t: predictor.coverage(t, options["coverage"]) for t in options["tasks"]}},
        "set_aside": {
            table: {"file": path.name, "sha256": hashed, "rows": dict(codes)}
            for table, (path, hashed, codes) in aside.items()
        },
        "status": dict(sorted(Counter(predictions.column("status").to_pylist()).items())),
        "encoder": None if encoded is None else dict(encoded),
        "provider": predictor.provider,
        "device": predictor.chosen.as_dict(),
        "precision": predictor.precision,
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
