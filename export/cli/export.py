"""``topt-deploy export``."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from topt_deploy.bundle.manifest import SUFFIX
from topt_deploy.run_folder import RUNS_DIR, newest_run, open_run
from topt_deploy.tensorrt.library import FLAVOURS, TENSORRT

if TYPE_CHECKING:
    from topt_deploy.bundle.encoder_manifest import EncoderBundle

    from ..tensorrt_engines import Target

DEFAULT_OUT = f"model{SUFFIX}"
ONNX, TRT = "onnx", "trt"
PRECISIONS = ("fp32", "fp16", "int8", "int4")
PRECISION = "fp16"


@click.command("export")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice([ONNX, TRT]),
    default=ONNX,
    show_default=True,
    help="trt adds the form that TensorRT builds engines from.",
)
@click.option(
    "--flavour", type=click.Choice(FLAVOURS), help=f"TensorRT, or TensorRT-RTX [default with --format trt: {TENSORRT}]."
)
@click.option(
    "--precision", type=click.Choice(PRECISIONS), help=f"Precision of the model for TensorRT [default: {PRECISION}]."
)
@click.option(
    "--profile",
    multiple=True,
    metavar="[DIM=]MIN,OPT,MAX",
    help="Sizes that engines are made for; without a name, DIM is regions, or tokens with --encoder-only.",
)
@click.option(
    "--capability",
    multiple=True,
    metavar="8.9",
    help="With --flavour rtx: build engines for this compute capability now.",
)
@click.option("--out", type=click.Path(path_type=Path), help=f"Bundle [default: {DEFAULT_OUT} beside runs/].")
@click.option("--zip", "as_zip", is_flag=True, help="Write the bundle as one zip file.")
@click.option("--prompt-encoder", metavar="MODEL", help="Also export this model, a folder or id, to encode prompts.")
@click.option(
    "--encoder-precision",
    type=click.Choice(PRECISIONS),
    default="int8",
    show_default=True,
    help="Precision of the encoder's weights.",
)
@click.option(
    "--encoder-bundle",
    type=click.Path(path_type=Path),
    help="Bundle of the encoder alone, which several cities can share; it is made if it is missing [default: inside].",
)
@click.option("--encoder-only", is_flag=True, help="Make the --encoder-bundle, and export no run.")
@click.option("--templates", type=click.Path(path_type=Path), help="TOML file that prompts were encoded with.")
@click.option("--max-pixels", type=click.IntRange(min=1), help="The same as for topt-deploy encode.")
@click.option(
    "--mlflow", type=click.Path(path_type=Path), help="Also write an MLflow model with the bundle in it: a new folder."
)
def export(
    run: Path | None,
    form: str,
    flavour: str | None,
    precision: str | None,
    profile: tuple[str, ...],
    capability: tuple[str, ...],
    out: Path | None,
    as_zip: bool,
    prompt_encoder: str | None,
    encoder_precision: str,
    encoder_bundle: Path | None,
    encoder_only: bool,
    templates: Path | None,
    max_pixels: int | None,
    mlflow: Path | None,
) -> None:
    """Export RUN as a bundle that topt-run predicts with. RUN is the newest finished one under ./runs."""
    from topt_deploy.errors import UsageError

    if as_zip and prompt_encoder and encoder_bundle is None:
        raise UsageError("an encoder's weights are mapped from a folder", fix="add --encoder-bundle, or leave --zip")
    target = encoder_target = None
    if form == TRT:
        target, encoder_target = _targets(
            flavour or TENSORRT,
            (precision or PRECISION, encoder_precision),
            profile,
            capability,
            encoded=prompt_encoder is not None,
            only=encoder_only,
        )
    elif flavour or precision or profile or capability:
        raise UsageError(
            "--flavour, --precision, --profile and --capability apply to engines only",
            expected="the portable graph, which is float32, by --format onnx alone",
            fix="add --format trt, or leave them out; an encoder's precision is --encoder-precision",
        )
    made_with = {
        "precision": encoder_precision,
        "templates": templates,
        "max_pixels": max_pixels,
        "target": encoder_target,
    }
    if encoder_only:
        if encoder_bundle is None:
            raise UsageError("--encoder-only makes a bundle of the encoder's own", fix="name it with --encoder-bundle")
        if mlflow is not None:
            raise UsageError("--encoder-only exports no run, and --mlflow needs one", fix="leave out one of them")
        made = _encoder(prompt_encoder, encoder_bundle, **made_with)
        click.echo(f"encoder {made.path}: {made.spec.identity}, {made.manifest.precision}")
        return
    opened = open_run(run) if run else newest_run(Path(), finished=True)
    if out is None:
        folder = opened.path.parent
        out = (folder.parent if folder.name == RUNS_DIR else folder) / DEFAULT_OUT

    from ..city_bundle import check_place, export_bundle
    from ..mlflow_model import check_mlflow_place, write_mlflow

    check_place(out, as_zip)
    if mlflow is not None:
        check_mlflow_place(mlflow)
    with ExitStack() as stack:
        encoder, inside = None, encoder_bundle is None
        if encoder_bundle is not None:
            encoder = _encoder(prompt_encoder, encoder_bundle, **made_with)
        elif prompt_encoder is not None:
            beside = Path(stack.enter_context(TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")))
            encoder = _encoder(prompt_encoder, beside / f"encoder{SUFFIX}", **made_with)
        done = export_bundle(opened, out, say=_say, as_zip=as_zip, encoder=encoder, inside=inside, target=target)
    click.echo(f"bundle {done.path}: {done.bytes / 1e6:.1f} MB, parity passed on {len(done.parity)} cities")
    if mlflow is not None:
        write_mlflow(mlflow, done.path)
        click.echo(f"mlflow {mlflow}: mlflow.pyfunc.load_model({str(mlflow)!r})")
    regions = out.with_name("regions.parquet")
    found = regions.exists() and out.name == DEFAULT_OUT
    click.echo(f"next: topt-run predict {regions}" if found else f"next: topt-run predict REGIONS --bundle {out}")


def _targets(
    flavour: str,
    precisions: tuple[str, str],
    profile: tuple[str, ...],
    capabilities: tuple[str, ...],
    *,
    encoded: bool,
    only: bool,
) -> tuple["Target", "Target"]:
    """The targets for engines of the model and of the encoder; each has its own dimensions of the profile."""
    from ..onnx_graph import REGIONS_AXIS
    from ..tensorrt_engines import Target

    def of_the_model(text: str) -> bool:
        return not only and (not encoded or text.partition("=")[0].strip() == REGIONS_AXIS or "=" not in text)

    model, encoder = (
        Target(
            flavour=flavour,
            precision=precision,
            profile=tuple(text for text in profile if of_the_model(text) == own),
            capabilities=capabilities,
        )
        for precision, own in zip(precisions, (True, False), strict=True)
    )
    model.check()
    return model, encoder


def _encoder(model: str | None, place: Path, **made_with: Any) -> "EncoderBundle":
    """The encoder's bundle at ``place``, made of ``model`` where one is named."""
    from topt_deploy.bundle.encoder_manifest import open_encoder_bundle

    if model is None:
        return open_encoder_bundle(place)

    from ..prompts.encoder_bundle import make_encoder

    return make_encoder(model, place, **made_with, say=_say)


def _say(text: str) -> None:
    click.echo(text, err=True)
