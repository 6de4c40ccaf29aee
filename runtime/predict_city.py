"""One city from its tables to its receipt: what ``topt-run predict`` does for one, and a batch's workers for many.

Everything that depends on the machine or the hour goes into the receipt, and the receipt is written last: where it
stands and fits, the output is whole.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from topt_deploy import __version__
from topt_deploy.data.city import hive_city
from topt_deploy.data.columns import GEOMETRY, REGION_ID
from topt_deploy.data.parquet import save_parquet
from topt_deploy.errors import BadData, BadRows, UsageError
from topt_deploy.intervals import COVERAGE
from topt_deploy.storage.atomic import atomic_files, sweep
from topt_deploy.storage.hashed_file import Held, sha256_file, stamps
from topt_deploy.storage.locks import locked
from topt_deploy.storage.os_errors import check_place, writing
from topt_deploy.storage.outputs import TABLES, check_outputs, check_outside, check_suffix
from topt_deploy.storage.text_files import json_text

from .predictions import Predictions
from .predictor import Predictor
from .receipt import Stopwatch, aside_path, make_receipt, read_receipt, receipt_path
from .settings import Options

DONE, PARTIAL, SKIPPED = "done", "partial", "skipped"


@dataclass(frozen=True, kw_only=True)
class CityJob:
    """One city's files.

    Attributes:
        name: The city's name in messages and in the output's folder.
        regions, mobility: Its tables, local paths or URIs; no mobility where there is none.
        out: The predictions to write, likewise.
        size: Bytes to read: how much work it is, compared with others.
        given: The user's name of a table that is here under another path.
    """

    name: str
    regions: str
    mobility: str | None
    out: str
    size: int = 0
    given: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class CityOutcome:
    """The outcome of a city.

    Attributes:
        status: :data:`DONE`, :data:`PARTIAL` where rows were set aside, :data:`SKIPPED` where it was done already.
        receipt: The receipt.
        table: The predictions; None where they were done already.
    """

    status: str
    receipt: Mapping[str, Any]
    table: pa.Table | None


def predict_city(
    predictor: Predictor,
    job: CityJob,
    options: Options,
    *,
    resume: bool = False,
    cache: bool = True,
    geo: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    watch: Stopwatch | None = None,
) -> CityOutcome:
    """Predict one city into its files: the predictions, what was set aside, and the receipt.

    Args:
        job: The city, with local paths.
        resume: True to leave it as it is where its receipt says that these inputs, this bundle and these options
            made it, and its bytes are still those.
        cache: True if prompts that are made here are kept beside the regions, and taken from there.
        geo: A map to write as well.
        progress: Told how many regions' prompts are made, and of how many.

    Raises:
        ToptError: Of every kind; then what stood there before stands there still.
    """
    watch = watch or Stopwatch()
    regions, out = Path(job.regions), Path(job.out)
    # Flows that the model does not read are no part of the receipt either.
    mobility = Path(job.mobility) if job.mobility is not None and predictor.bundle.manifest.mobility else None
    inputs = {"regions": regions} | ({} if mobility is None else {"mobility": mobility})
    if not out.name:
        check_place(out)
    check_suffix(out, TABLES, "--out")
    check_outside(out, [predictor.bundle.path])
    written = [out, receipt_path(out), *_asides(out), *([] if geo is None else [geo])]
    named = [Path(file) for file in (job.regions, job.mobility) if file is not None]
    check_outputs(written, read=named, bundles=[predictor.bundle.path])
    with locked(out), nullcontext() if geo is None else locked(geo):
        sweep(*written)
        with watch.step("hash"):
            before = {role: stamps(file) for role, file in inputs.items()}
            held = {role: Held(file) for role, file in inputs.items()}
            hashes = {role: file.sha256 for role, file in held.items()}
        key = _key(predictor, hashes, options, hive_city(regions))
        if resume and geo is None and (receipt := _standing(out, key)) is not None:  # no receipt tells of a map
            return CityOutcome(status=SKIPPED, receipt=receipt, table=None)
        with watch.step("predict"):
            predictions = predictor.predictions(
                held["regions"], held.get("mobility"), tasks=options.tasks, id_col=options.id_col,
                coverage=options.coverage, on_bad_row=options.on_bad_row, cache=cache, progress=progress,
            )  # fmt: skip
            table = predictions.wide() if options.wide else predictions.long()
        if {role: stamps(file) for role, file in inputs.items()} != before:
            raise BadData("changed while it was read", file=regions, fix="run again when nothing writes to it")
        facts = {
            "key": key,
            "inputs": {role: (job.given.get(str(file), str(file)), hashes[role]) for role, file in inputs.items()},
            "predictor": predictor,
            "options": _told(predictor, options),
        }
        receipt = _write(out, table, predictions, geo, facts, watch)
    return CityOutcome(status=PARTIAL if receipt["set_aside"] else DONE, receipt=receipt, table=table)


def _write(
    out: Path, table: pa.Table, predictions: Predictions, geo: Path | None, facts: Mapping[str, Any], watch: Stopwatch
) -> dict[str, Any]:
    """Write the predictions, what was set aside, the map and, last, the receipt, which is returned."""
    aside = {aside_path(out, name): rows for name, rows in predictions.sieve.tables().items()}
    files = [*aside, *([] if geo is None else [geo]), out, receipt_path(out)]
    with atomic_files(files) as temporaries:
        place = dict(zip(files, temporaries, strict=True))
        with watch.step("write"):
            for file, rows in {**aside, out: table}.items():
                with writing(file):
                    save_parquet(place[file], rows)
            if geo is not None:
                _write_map(geo, place[geo], predictions)
        receipt = make_receipt(
            out,
            sha256_file(place[out]),
            **facts,
            predictions=table,
            encoded=predictions.encoded,
            aside={
                name: (aside_path(out, name), sha256_file(place[aside_path(out, name)]), codes)
                for name, codes in predictions.sieve.counts().items()
            },
            watch=watch,
        )
        with writing(receipt_path(out)):
            place[receipt_path(out)].write_text(json_text(receipt), encoding="utf-8")
    for file in _asides(out):
        if file not in aside:
            with writing(file):
                file.unlink(missing_ok=True)
    return receipt


def _asides(out: Path) -> list[Path]:
    return [aside_path(out, table) for table in (BadRows.REGIONS, BadRows.MOBILITY)]


def _told(predictor: Predictor, options: Options) -> dict[str, Any]:
    """The options as the receipt tells them, with what they mean for this bundle."""
    told = asdict(options)
    told["tasks"] = list(options.tasks or predictor.tasks)
    told["coverage"] = COVERAGE if options.coverage is None else options.coverage
    return told | {"device": predictor.device}


def _key(predictor: Predictor, inputs: Mapping[str, str], options: Options, city: str | None) -> str:
    """The hash of everything that the output's bytes depend on, the city's name among it, which a folder may give."""
    record = [__version__, predictor.bundle.sha256, dict(inputs), _told(predictor, options), city]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _standing(out: Path, key: str) -> Mapping[str, Any] | None:
    """The receipt of an output that stands, whole and made of ``key``.

    Predictions whose prompts were made along with them are not found: the images are no part of the key.
    """
    receipt = read_receipt(out)
    if receipt is None or receipt.get("key") != key or receipt.get("encoder") is not None:
        return None
    made = {out: receipt["output"]["sha256"]}
    made |= {out.with_name(facts["file"]): facts["sha256"] for facts in receipt["set_aside"].values()}
    found = {file: sha256_file(file) for file in (out, *_asides(out)) if file.is_file()}
    return receipt if found == made else None


def check_map(path: Path) -> None:
    """Refuse early a map that could not be written: a run that fails must not leave half of its output."""
    from topt_deploy.data.geometry import geo_library
    from topt_deploy.data.gis_files import DRIVERS

    if path.suffix.lower() not in DRIVERS:
        raise UsageError("unknown map format", file=path, expected=" or ".join(DRIVERS), found=repr(path.suffix))
    for library in ("shapely", "pyogrio"):
        geo_library(library)


def _write_map(path: Path, temporary: Path, predictions: Predictions) -> None:
    """A map of the predictions, one feature per region: its polygon, or else its point.

    Raises:
        BadData: If the polygons are not longitude and latitude, or no polygons.
    """
    from topt_deploy.data.geometry import map_shapes
    from topt_deploy.data.gis_files import write_geo

    wide = predictions.wide()
    if GEOMETRY in wide.column_names:
        ids = np.array(wide.column(REGION_ID).to_pylist(), np.str_)
        shapes = map_shapes(wide, "regions table", ids)
        wide = wide.set_column(wide.column_names.index(GEOMETRY), GEOMETRY, shapes)
    else:
        for axis, degrees in zip(("lon", "lat"), predictions.lonlat.T, strict=True):
            wide = wide.append_column(axis, pa.array(degrees.tolist(), pa.float64()))
    write_geo(temporary, wide, layer=path.stem)
