"""The road of an export: what is asked for, the encoder, the bundle and an MLflow model around it.

``topt-deploy export`` and ``TrainedRun.export`` are both :func:`export_run`.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from topt_deploy.arguments import Location, check_choice, check_least, several
from topt_deploy.bundle.manifest import SUFFIX
from topt_deploy.errors import UsageError
from topt_deploy.run_folder import RUNS_DIR, Run
from topt_deploy.tensorrt.library import FLAVOURS, TENSORRT

if TYPE_CHECKING:
    from topt_deploy.bundle.encoder_manifest import EncoderBundle

    from .city_bundle import Exported
    from .tensorrt_engines import EngineTarget


DEFAULT_OUT = f"model{SUFFIX}"
ONNX, TRT = FORMATS = ("onnx", "trt")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
PRECISION = "fp16"
ENCODER_PRECISION = "int8"


def export_run(
    run: Run,
    out: Location | None = None,
    *,
    format: str = ONNX,
    flavour: str | None = None,
    precision: str | None = None,
    profile: str | Sequence[str] = (),
    capability: str | Sequence[str] = (),
    zip: bool = False,
    prompt_encoder: str | None = None,
    encoder_precision: str = ENCODER_PRECISION,
    encoder_bundle: Location | None = None,
    templates: Location | None = None,
    max_pixels: int | None = None,
    mlflow: Location | None = None,
) -> "Exported":
    """Export a finished run; the arguments are the options of ``topt-deploy export``.

    Args:
        run: The run.
        out: The bundle; :data:`DEFAULT_OUT` beside the folder of runs by default.

    Raises:
        UsageError: If options do not go together.
        ToptError: As :func:`.city_bundle.export_bundle`.
    """
    if zip and prompt_encoder and encoder_bundle is None:
        raise UsageError("an encoder's weights are mapped from a folder", fix="add --encoder-bundle, or leave --zip")
    target, encoder_target = targets(
        format, flavour, precision, encoder_precision, several(profile), several(capability),
        encoded=prompt_encoder is not None, only=False,
    )  # fmt: skip
    made_with = encoder_options(encoder_precision, templates, max_pixels, encoder_target)
    place = default_place(run) if out is None else Path(out)

    from .city_bundle import check_place, export_bundle
    from .mlflow_model import check_mlflow_place, write_mlflow

    check_place(place, zip)
    if mlflow is not None:
        check_mlflow_place(Path(mlflow))
    with ExitStack() as stack:
        encoder, inside = None, encoder_bundle is None
        if encoder_bundle is not None:
            encoder = export_encoder(prompt_encoder, Path(encoder_bundle), **made_with)
        elif prompt_encoder is not None:
            beside = Path(stack.enter_context(TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.")))
            encoder = export_encoder(prompt_encoder, beside / f"encoder{SUFFIX}", **made_with)
        done = export_bundle(run, place, say=say, as_zip=zip, encoder=encoder, inside=inside, target=target)
    if mlflow is not None:
        write_mlflow(Path(mlflow), done.path)
    return done


def export_encoder(model: str | None, place: Path, **made_with: Any) -> "EncoderBundle":
    """The encoder's bundle at ``place``, made of ``model`` where one is named.

    Args:
        model: The model's folder, or its id; None opens what is there.
        place: The bundle.
        made_with: Of :func:`encoder_options`.
    """
    from topt_deploy.bundle.encoder_manifest import open_encoder_bundle

    if model is None:
        return open_encoder_bundle(place)

    from .prompts.encoder_bundle import make_encoder

    return make_encoder(model, place, **made_with, say=say)


def encoder_options(
    precision: str, templates: Location | None, max_pixels: int | None, target: "EngineTarget | None"
) -> dict[str, Any]:
    """The parts that an encoder is made with (:func:`.prompts.encoder_bundle.make_encoder`), checked.

    Raises:
        UsageError: If the precision does not exist, or there are too few pixels.
    """
    check_choice("encoder_precision", precision, PRECISIONS)
    check_least("max_pixels", max_pixels)
    file = None if templates is None else Path(templates)
    return {"precision": precision, "templates": file, "max_pixels": max_pixels, "target": target}


def default_place(run: Run) -> Path:
    """Where a run's bundle goes by itself: beside the folder of runs."""
    folder = run.path.parent
    return (folder.parent if folder.name == RUNS_DIR else folder) / DEFAULT_OUT


def targets(
    form: str,
    flavour: str | None,
    precision: str | None,
    encoder_precision: str,
    profile: tuple[str, ...],
    capabilities: tuple[str, ...],
    *,
    encoded: bool,
    only: bool,
) -> tuple["EngineTarget | None", "EngineTarget | None"]:
    """The targets of TensorRT engines of the model and of the encoder; None if none are made.

    Args:
        form: One of :data:`FORMATS`.
        profile: Sizes; the model and the encoder each have their own of the dimensions.
        encoded: Whether an encoder is exported along.
        only: Whether nothing but an encoder is exported.

    Raises:
        UsageError: If an option is not one of its choices, or is of engines where none are made.
    """
    check_choice("format", form, FORMATS)
    check_choice("flavour", flavour, (None, *FLAVOURS))
    check_choice("precision", precision, (None, *PRECISIONS))
    if form != TRT:
        if flavour or precision or profile or capabilities:
            raise UsageError(
                "--flavour, --precision, --profile and --capability apply to engines only",
                expected="the portable graph, which is float32, by --format onnx alone",
                fix="add --format trt, or leave them out; an encoder's precision is --encoder-precision",
            )
        return None, None

    from .onnx_graph import REGIONS_AXIS
    from .tensorrt_engines import EngineTarget

    def of_the_model(text: str) -> bool:
        return not only and (not encoded or text.partition("=")[0].strip() == REGIONS_AXIS or "=" not in text)

    model, encoder = (
        EngineTarget(
            flavour=flavour or TENSORRT,
            precision=own_precision,
            profile=tuple(text for text in profile if of_the_model(text) == own),
            capabilities=capabilities,
        )
        for own_precision, own in ((precision or PRECISION, True), (encoder_precision, False))
    )
    model.check()
    return model, encoder


def say(text: str) -> None:
    """Tell the user what is being done, on standard error."""
    print(text, file=sys.stderr, flush=True)
