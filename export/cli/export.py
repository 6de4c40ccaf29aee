"""``topt-deploy export``."""

from pathlib import Path

import click

from topt_deploy.errors import UsageError
from topt_deploy.run_folder import newest_run, open_run
from topt_deploy.tensorrt.library import FLAVOURS, TENSORRT

from ..export_run import (
    DEFAULT_OUT,
    ENCODER_PRECISION,
    FORMATS,
    ONNX,
    PRECISION,
    PRECISIONS,
    encoder_options,
    export_encoder,
    export_run,
    targets,
)


@click.command("export")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
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
    default=ENCODER_PRECISION,
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
    if encoder_only:
        _encoder_only(
            prompt_encoder, encoder_bundle, mlflow,
            asked=(form, flavour, precision, encoder_precision, profile, capability),
            templates=templates, max_pixels=max_pixels,
        )  # fmt: skip
        return
    done = export_run(
        open_run(run) if run else newest_run(Path(), finished=True), out,
        format=form, flavour=flavour, precision=precision, profile=profile, capability=capability, zip=as_zip,
        prompt_encoder=prompt_encoder, encoder_precision=encoder_precision, encoder_bundle=encoder_bundle,
        templates=templates, max_pixels=max_pixels, mlflow=mlflow,
    )  # fmt: skip
    click.echo(f"bundle {done.path}: {done.bytes / 1e6:.1f} MB, parity passed on {len(done.parity)} cities")
    if mlflow is not None:
        click.echo(f"mlflow {mlflow}: mlflow.pyfunc.load_model({str(mlflow)!r})")
    regions = done.path.with_name("regions.parquet")
    found = regions.exists() and done.path.name == DEFAULT_OUT
    click.echo(f"next: topt-run predict {regions}" if found else f"next: topt-run predict REGIONS --bundle {done.path}")


def _encoder_only(
    model: str | None,
    place: Path | None,
    mlflow: Path | None,
    *,
    asked: tuple[str, str | None, str | None, str, tuple[str, ...], tuple[str, ...]],
    templates: Path | None,
    max_pixels: int | None,
) -> None:
    """Make the encoder's own bundle, and export no run."""
    target = targets(*asked, encoded=model is not None, only=True)[1]
    if place is None:
        raise UsageError("--encoder-only makes a bundle of the encoder's own", fix="name it with --encoder-bundle")
    if mlflow is not None:
        raise UsageError("--encoder-only exports no run, and --mlflow needs one", fix="leave out one of them")
    made = export_encoder(model, place, **encoder_options(asked[3], templates, max_pixels, target))
    click.echo(f"encoder {made.path}: {made.spec.identity}, {made.manifest.precision}")
