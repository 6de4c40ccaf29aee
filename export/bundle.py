"""Export a finished run: graph, parity gate, golden vectors, model card, and last of all the manifest."""

import errno
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from topt_deploy import __version__
from topt_deploy.bundle import CARD, ENCODER, MANIFEST, SCHEMA_VERSION, Manifest, open_bundle, seal_bundle
from topt_deploy.columns import PROMPT_PREFIX
from topt_deploy.encoder.bundle import EncoderBundle
from topt_deploy.encoder.precision import comparable
from topt_deploy.errors import ToptError, UsageError
from topt_deploy.features import POSITION, features
from topt_deploy.fileio import atomic_file, atomic_folder, write_error
from topt_deploy.intervals import SCALE
from topt_deploy.model.checkpoint import load_model, load_tensors
from topt_deploy.parquet import write_parquet
from topt_deploy.runs import INPUTS_FILE, MODEL_FILE, Run
from topt_deploy.table import read_city

from .card import model_card
from .golden import SyntheticCity, synthetic_city
from .graph import OPSET, WEIGHTS, export_graph
from .parity import TOLERANCE, Parity, parity_gate, run_model

GRAPH = "models/topt.onnx"
WEIGHTS_FILE = f"models/{WEIGHTS}"
GOLDEN_SIZES = (7, 31)
"""Regions of the golden cities that travel with the bundle."""
GATE_SIZES = (203,)
"""Regions of further cities that the parity gate sees, beside the golden ones and the training city."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported bundle and what the parity gate measured."""

    path: Path
    parity: tuple[Parity, ...]
    bytes: int


def export_bundle(
    run: Run,
    out: Path,
    *,
    say: Callable[[str], None],
    as_zip: bool = False,
    encoder: EncoderBundle | None = None,
    inside: bool = False,
) -> Exported:
    """Export ``run`` to ``out``; nothing stands under that name until all of it is right.

    Args:
        run: A finished run.
        out: The bundle's folder, or file with ``as_zip``. An older bundle there is replaced.
        say: Told what is being done.
        encoder: The prompt encoder that goes with it.
        inside: Whether a copy of that goes into the bundle; its own is referred to otherwise.

    Raises:
        BadBundle: If the parity gate fails.
        UsageError: If the run is not finished, ``out`` is something other than a bundle, or the encoder is not the one
            that the run's prompts are from.
    """
    if not run.finished:
        raise UsageError("this run is not finished", file=run.path, fix="topt-deploy train --resume")
    check_place(out, as_zip)
    model = load_model(run.path / MODEL_FILE)
    inputs, facts = load_tensors(run.path / INPUTS_FILE)
    named = ("encoder", "template", "precision")
    prompts: dict[str, dict[str, Any]] = {
        column: {"width": width} | {what: facts[f"{what}s"].get(column) for what in named}
        for column, width in model.spec.schema.prompts.items()
    }
    if encoder is not None:
        _check_encoder(run, encoder, prompts)
        served = encoder.manifest.precision
        for trained in sorted({str(facts["precision"]) for facts in prompts.values()} - {served, "None"}):
            say(f"trained with prompts in {trained}, served in {served}: what that costs is in docs/encoder.md")
    say("exporting the graph")
    graph = export_graph(model, inputs)
    say("parity gate: PyTorch against ONNX Runtime")
    ranges = {column: (low, high) for column, (low, high) in run.facts["ranges"].items()}
    position_m = inputs[POSITION].numpy()
    cities = {f"golden-{n}": synthetic_city(model, ranges, position_m, regions=n, seed=n) for n in GOLDEN_SIZES}
    others = {f"synthetic-{n}": synthetic_city(model, ranges, position_m, regions=n, seed=n) for n in GATE_SIZES}
    schema = model.spec.schema
    arrays = {
        name: features(read_city(city.regions, city.mobility, schema), model.input_names())
        for name, city in (cities | others).items()
    }
    arrays = {"training city": {name: tensor.numpy() for name, tensor in inputs.items()}} | arrays
    parity = tuple(parity_gate(model, graph, arrays))
    for measured in parity:
        say(f"  {measured.city}: {measured.regions} regions, largest relative difference {measured.worst:.1e}")
    config = run.config
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        version=__version__,
        source={
            "run": run.path.name,
            "city_id": run.facts["city_id"],
            "regions": run.facts["regions"],
            "regions_sha256": run.regions_sha256,
            "mobility_sha256": run.mobility_sha256,
            "preset": config.preset,
            "seed": config.seed,
            "versions": run.facts["versions"] | {"torch (export)": torch.__version__},
            "protocol": run.facts["protocol"],
            "synthetic": run.facts["synthetic"],
        },
        tasks={
            task: {
                "prompt": settings.prompt_column(task),
                "report": run.facts["reports"][task],
                "scores": run.facts["scores"][task],
                "scale": SCALE,
            }
            for task, settings in config.tasks.items()
        },
        views={view: tuple(names) for view, names in schema.views.items()},
        mobility=schema.mobility,
        prompts=prompts,
        ranges=ranges,
        inputs=tuple(model.input_names()),
        opset=OPSET,
        variants={
            "fp32": {
                "graph": GRAPH,
                "weights": WEIGHTS_FILE,
                "initializers": graph.initializers,
                "providers": ["CPUExecutionProvider", "CUDAExecutionProvider"],
                "tolerance": TOLERANCE,
                "parity": [asdict(measured) for measured in parity],
            }
        },
        golden=tuple(cities),
        encoder=None
        if encoder is None
        else {
            "identity": encoder.spec.identity,
            "sha256": encoder.sha256,
            "bundle": None if inside else encoder.path.name,
        },
    )
    with atomic_folder(out) if not as_zip else _zipped(out) as folder:
        (folder / "models").mkdir()
        (folder / GRAPH).write_bytes(graph.model)
        (folder / WEIGHTS_FILE).write_bytes(graph.weights)
        (folder / "golden").mkdir()
        for name, city in cities.items():
            expected = {task: pa.array(values) for task, values in run_model(model, arrays[name]).items()}
            _write_golden(folder / "golden", name, city, pa.table(expected))
        if encoder is not None and inside:
            shutil.copytree(encoder.path, folder / ENCODER)
        card = model_card(manifest, parity, synthetic=bool(run.facts["synthetic"]))
        (folder / CARD).write_text(card, encoding="utf-8")
        seal_bundle(folder, manifest)
        open_bundle(folder).verify()  # what no reader would take must not leave this machine
    size = out.stat().st_size if as_zip else sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return Exported(path=out, parity=parity, bytes=size)


def _check_encoder(run: Run, encoder: EncoderBundle, prompts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an encoder that would give the model other prompts than it was trained with."""
    if not prompts:
        raise UsageError("this run reads no prompts", file=run.path, fix="export it without --prompt-encoder")
    for column, facts in prompts.items():
        task = column.removeprefix(PROMPT_PREFIX)
        for what, expected, found in (
            ("encoder", facts["encoder"], encoder.spec.identity),
            ("template", facts["template"], encoder.templates.sha256(task)),
        ):
            if expected is not None and expected != found:
                raise UsageError(
                    f"the run was trained with prompts of another {what}", file=run.path, column=column,
                    expected=expected, found=found,
                    fix="export that one, or encode with this one (topt-deploy encode) and train again",
                )  # fmt: skip
        if not comparable(facts["precision"], encoder.manifest.precision):
            raise UsageError(
                "prompts in int4 are no stand-in for others", file=run.path, column=column,
                expected=facts["precision"], found=encoder.manifest.precision,
                fix="encode the training city with this encoder (--encoder-only, then topt-run encode) and train again",
            )  # fmt: skip
        if facts["width"] != encoder.spec.width:
            raise UsageError(
                "the run's prompts are of another width", file=run.path, column=column,
                expected=facts["width"], found=encoder.spec.width,
            )  # fmt: skip


def check_place(out: Path, as_zip: bool) -> None:
    """Refuse before the work what could not be written after it, and to replace what is no bundle."""
    if not out.parent.is_dir():
        raise write_error(out, FileNotFoundError(errno.ENOENT, "no such folder"))
    if not out.exists():
        return
    try:
        open_bundle(out)
        replaceable = out.is_dir() != as_zip
    except ToptError:
        replaceable = not as_zip and (out / MANIFEST).exists()  # a damaged bundle may be replaced
    if not replaceable:
        raise UsageError("is there already, and is no bundle of this form", file=out, fix="name another --out")


def _write_golden(folder: Path, name: str, city: SyntheticCity, expected: pa.Table) -> None:
    """A golden city as Parquet: its two tables, and what PyTorch predicts of it in the order of its rows."""
    tables = {"regions": city.regions, "mobility": city.mobility, "expected": expected}
    for part, table in tables.items():
        if table is not None:
            write_parquet(folder / f"{name}.{part}.parquet", table)


@contextmanager
def _zipped(out: Path) -> Iterator[Path]:
    """Yield a folder whose files become the zip file ``out``; the same content gives the same bytes."""
    with atomic_file(out) as temporary, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield folder
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(f for f in folder.rglob("*") if f.is_file()):
                info = zipfile.ZipInfo(file.relative_to(folder).as_posix())  # dated 1980: no clock in the bytes
                info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(info, file.read_bytes())
