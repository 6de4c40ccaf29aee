"""Export a finished run: graph, golden cities and manifest, then the gate and the self-test of that very bundle."""

import errno
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topt_deploy import __version__
from topt_deploy.bundle.encoder_manifest import EncoderBundle
from topt_deploy.bundle.manifest import CARD, ENCODER, SCHEMA_VERSION, Manifest, open_bundle
from topt_deploy.bundle.sealed import MANIFEST, seal_bundle
from topt_deploy.bundle.tolerances import PREDICTIONS as TOLERANCES
from topt_deploy.data.city import read_city
from topt_deploy.data.columns import PROMPT_PREFIX
from topt_deploy.data.features import POSITION, features
from topt_deploy.data.parquet import write_parquet
from topt_deploy.errors import ToptError, UsageError
from topt_deploy.intervals import SCALE, SCALE_BY_SIZE
from topt_deploy.model.checkpoint import load_model, load_tensors
from topt_deploy.model.row_tiles import largest
from topt_deploy.model.topt import TopT
from topt_deploy.prompts.precision import comparable
from topt_deploy.run_folder import INPUTS_FILE, MODEL_FILE, Run
from topt_deploy.runtime.predictor import open_predictor
from topt_deploy.runtime.processor import deciding_sets
from topt_deploy.storage.atomic import atomic_file, atomic_folder
from topt_deploy.storage.os_errors import write_error
from topt_deploy.tensorrt.profile import Profile, ProfileRange, parse_profile

from .golden_cities import SyntheticCity, expected_table, synthetic_city, telling_rows
from .model_card import model_card
from .onnx_graph import REGIONS_AXIS, WEIGHTS, Graph, export_for_engine, export_graph
from .parity import GateCity, Parity, on_processor, parity_gate, serving
from .tensorrt_engines import EngineTarget, make_engines
from .translate import OPSET

GRAPH = "models/topt.onnx"
WEIGHTS_FILE = f"models/{WEIGHTS}"
GOLDEN_SIZES = (7, 31)
"""Regions of the golden cities that travel with the bundle."""
LARGER_OF = f"golden-{GOLDEN_SIZES[-1]}"
"""The golden city whose values the enlarged ones have."""
GATE_SIZES = (203,)
"""Regions of further cities that the parity gate sees, beside the golden ones and the training city."""
PROFILE: Profile = {REGIONS_AXIS: ProfileRange(min=1, opt=256, max=4096)}
"""Of an engine, where none is asked for: attention holds numbers for every pair of regions, a byte or four each."""


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
    target: EngineTarget | None = None,
) -> Exported:
    """Export ``run`` to ``out``; nothing stands under that name until all of it is right.

    Args:
        run: A finished run.
        out: The bundle's folder, or file with ``as_zip``. An older bundle there is replaced.
        say: Told what is being done.
        encoder: The prompt encoder that goes with it.
        inside: True if its folder is moved into the bundle, from the same file system; referred to otherwise.
        target: The target of TensorRT's engines; they are one more variant, beside the portable one.

    Raises:
        BadBundle: If the parity gate or the self-test fails, or TensorRT cannot build the model.
        UsageError: If the run is not finished, ``out`` is something other than a bundle, the encoder is not the one
            that the run's prompts are from, or what is asked of engines does not go together.
        NoDevice: If engines are asked of a library that is not here.
    """
    profile = PROFILE
    if target is not None:
        target.check()
        profile = parse_profile(target.profile, PROFILE, unnamed=REGIONS_AXIS)
    if not run.finished:
        raise UsageError("this run is not finished", file=run.path, fix="topt-deploy train --resume")
    check_place(out, as_zip)
    model = load_model(run.path / MODEL_FILE)
    inputs, made_with = load_tensors(run.path / INPUTS_FILE)
    prompts = _prompts(model, made_with)
    if encoder is not None:
        _check_encoder(run, encoder, prompts, say)
    say("exporting the graph")
    graph = export_graph(model, inputs)
    golden, cities = _cities(run, model, inputs)
    last = cities[-1]
    enlarged = {last.name: {"of": LARGER_OF, "regions": last.regions, "rows": telling_rows(last.regions)}}
    with _staged(out, as_zip, lambda bundle: _selftest(bundle, say)) as folder:
        _write_graph(graph, folder / GRAPH)
        _write_golden(folder / "golden", golden, cities, enlarged)
        moved = _move_in(encoder, folder / ENCODER) if encoder is not None and inside else {}
        manifest = _manifest(run, model, prompts, graph, tuple(golden), enlarged, _named(encoder, inside))
        seal_bundle(folder, manifest, known=moved)
        say("parity gate: PyTorch against the bundle as topt-run opens it")
        parity = parity_gate(cities, serving(folder))
        for measured in parity:
            say(f"  {measured.city}: {measured.regions} regions, largest relative difference {measured.worst:.1e}")
        manifest = _with(manifest, {"fp32": {**manifest.variants["fp32"], "parity": _record(parity)}})
        if target is not None:
            manifest = _with(manifest, _variant(target, profile, model, inputs, cities, folder, say))
        card = model_card(manifest, parity, synthetic=bool(run.facts["synthetic"]))
        (folder / CARD).write_text(card, encoding="utf-8")
        seal_bundle(folder, manifest, known=moved)
    size = out.stat().st_size if as_zip else sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return Exported(path=out, parity=parity, bytes=size)


def _prompts(model: TopT, made_with: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """By prompt column, its width and what the training table said that it was made with."""
    named = ("encoder", "template", "precision")
    return {
        column: {"width": width} | {what: made_with[f"{what}s"].get(column) for what in named}
        for column, width in model.spec.schema.prompts.items()
    }


def _cities(run: Run, model: TopT, inputs: Mapping[str, Tensor]) -> tuple[dict[str, SyntheticCity], list[GateCity]]:
    """The golden cities, and all cities that the parity gate sees, the training city first."""
    ranges, position_m = _ranges(run), inputs[POSITION].numpy()
    golden = {f"golden-{n}": synthetic_city(model, ranges, position_m, regions=n, seed=n) for n in GOLDEN_SIZES}
    others = {f"synthetic-{n}": synthetic_city(model, ranges, position_m, regions=n, seed=n) for n in GATE_SIZES}
    edges = [largest(tiles) + more for tiles in (1, 2) for more in (0, 1)]
    tiled = {f"enlarged-{n}": golden[LARGER_OF].enlarged(n) for n in edges}
    trained_on = {name: inputs[name].numpy() for name in model.input_names()}  # a run keeps what some part may read
    cities = [GateCity(model=model, name="training city", inputs=trained_on)]
    for name, city in (golden | others | tiled).items():
        arrays = features(read_city(city.regions, city.mobility, model.spec.schema), model.input_names())
        cities.append(GateCity(model=model, name=name, inputs=arrays, tables=city, for_tiles=name in tiled))
    return golden, cities


def _ranges(run: Run) -> dict[str, tuple[float, float]]:
    return {column: (low, high) for column, (low, high) in run.facts["ranges"].items()}


def _named(encoder: EncoderBundle | None, inside: bool) -> dict[str, Any] | None:
    """The manifest's entry of the encoder."""
    if encoder is None:
        return None
    return {
        "identity": encoder.spec.identity,
        "sha256": encoder.sha256,
        "bundle": None if inside else encoder.path.name,
    }


def _move_in(encoder: EncoderBundle, place: Path) -> dict[str, Mapping[str, Any]]:
    """Move an encoder's folder into the bundle; its files with sizes and hashes, which were checked when it was made.

    Gigabytes are neither copied nor read once more.
    """
    encoder.path.rename(place)
    return {f"{ENCODER}{name}": facts for name, facts in encoder.record["files"].items()}


def _manifest(
    run: Run,
    model: TopT,
    prompts: Mapping[str, Mapping[str, Any]],
    graph: Graph,
    golden: tuple[str, ...],
    enlarged: Mapping[str, Mapping[str, Any]],
    encoder: Mapping[str, Any] | None,
) -> Manifest:
    """The manifest of the portable variant alone, before the gate; its files are listed when it is sealed."""
    config, schema = run.config, model.spec.schema
    return Manifest(
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
            | (
                run.of_folds(task) | {"parts": run.facts["parts"][task], "scale": SCALE_BY_SIZE}
                if model.spec.rows.get(task, 1) > 1
                else {}
            )
            for task, settings in config.tasks.items()
        },
        views={view: tuple(names) for view, names in schema.views.items()},
        mobility=schema.mobility,
        prompts=prompts,
        ranges=_ranges(run),
        inputs=tuple(model.input_names()),
        leverage=run.facts.get("leverage"),
        opset=OPSET,
        variants={
            "fp32": {
                "graph": GRAPH,
                "weights": WEIGHTS_FILE,
                "initializers": graph.initializers,
                "providers": ["CPUExecutionProvider", "CUDAExecutionProvider"],
                "tolerance": TOLERANCES["fp32"],
                "parity": [],
            }
        },
        golden=golden,
        enlarged=enlarged,
        encoder=encoder,
    )


def _with(manifest: Manifest, variants: Mapping[str, Mapping[str, Any]]) -> Manifest:
    """The manifest with variants that have passed the gate on this processor."""
    return replace(manifest, variants={**manifest.variants, **variants}, gated_on=deciding_sets())


def _record(parity: Sequence[Parity]) -> list[dict[str, Any]]:
    return [asdict(measured) for measured in parity]


def _variant(
    target: EngineTarget,
    profile: Profile,
    model: TopT,
    inputs: Mapping[str, Any],
    cities: Sequence[GateCity],
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The graph for TensorRT and its engines, written into a bundle's folder, with what the manifest says of them.

    Its gate is the same, its precision's tolerance and the cities for tiles apart.
    """
    name, precision = target.variant, target.precision
    say(f"exporting the graph for {name}")
    graph = export_for_engine(model, inputs, precision=precision, most=profile[REGIONS_AXIS].max)
    place = folder / "models" / name / Path(GRAPH).name
    _write_graph(graph, place)
    parity = parity_gate([city for city in cities if not city.for_tiles], on_processor(place), precision)
    worst = max(measured.worst for measured in parity)
    say(f"parity gate: {name} on ONNX Runtime, largest relative difference {worst:.1e}")
    made = make_engines(target, place, profile)
    say(f"{name}: {made.told}")
    facts = {
        "graph": place.relative_to(folder).as_posix(),
        "weights": place.with_name(WEIGHTS).relative_to(folder).as_posix(),
        "initializers": {},
        "providers": [],
        "flavour": target.flavour,
        "precision": precision,
        "tolerance": TOLERANCES[precision],
        "parity": _record(parity),
    }
    return {name: facts | made.as_record(profile, folder)}


def _check_encoder(
    run: Run, encoder: EncoderBundle, prompts: Mapping[str, Mapping[str, Any]], say: Callable[[str], None]
) -> None:
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
                "prompts in int4 cannot replace prompts in another precision", file=run.path, column=column,
                expected=facts["precision"], found=encoder.manifest.precision,
                fix="encode the training city with this encoder (--encoder-only, then topt-run encode) and train again",
            )  # fmt: skip
        if facts["width"] != encoder.spec.width:
            raise UsageError(
                "the run's prompts are of another width", file=run.path, column=column,
                expected=facts["width"], found=encoder.spec.width,
            )  # fmt: skip
    served = encoder.manifest.precision
    for trained in sorted({str(facts["precision"]) for facts in prompts.values()} - {served, "None"}):
        say(f"trained with prompts in {trained}, served in {served}: what that costs is in docs/how-to/encode.md")


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
        raise UsageError("already exists, and is not a bundle of this form", file=out, fix="name another --out")


def _write_graph(graph: Graph, place: Path) -> None:
    """A graph and its weights, into a folder of their own."""
    place.parent.mkdir(parents=True)
    place.write_bytes(graph.model)
    place.with_name(WEIGHTS).write_bytes(graph.weights)


def _write_golden(
    folder: Path,
    golden: Mapping[str, SyntheticCity],
    cities: Sequence[GateCity],
    enlarged: Mapping[str, Mapping[str, Any]],
) -> None:
    """Golden cities as Parquet: their two tables, and what PyTorch predicts of them in the order of the rows. Of
    enlarged ones the expected values alone."""
    folder.mkdir()
    for city in cities:
        if city.name not in golden and city.name not in enlarged:
            continue
        rows = enlarged.get(city.name, {}).get("rows")
        tables = {"expected": expected_table(city.expected, rows)}
        if city.name in golden:
            tables |= {"regions": golden[city.name].regions, "mobility": golden[city.name].mobility}
        for part, table in tables.items():
            if table is not None:
                write_parquet(folder / f"{city.name}.{part}.parquet", table)


def _selftest(bundle: Path, say: Callable[[str], None]) -> None:
    """The self-test of a bundle before it gets its name. Every byte is checked but an encoder's, proven before."""
    checks = open_predictor(bundle).selftest()
    say(f"self-test of the finished bundle: passed on {', '.join(check.city for check in checks)}")


@contextmanager
def _staged(out: Path, as_zip: bool, prove: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a folder whose files become the bundle ``out``, once ``prove`` has let pass the bundle under another name.

    A zip of the same content is of the same bytes.
    """
    if not as_zip:
        with atomic_folder(out) as folder:
            yield folder
            prove(folder)
        return
    with atomic_file(out) as temporary, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield folder
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(f for f in folder.rglob("*") if f.is_file()):
                info = zipfile.ZipInfo(file.relative_to(folder).as_posix())  # dated 1980: no clock in the bytes
                info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(info, file.read_bytes())
        prove(temporary)
