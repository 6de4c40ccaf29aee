"""The settings of a prediction: which bundle, how it runs, and the options that shape the output."""

from dataclasses import dataclass, field
from pathlib import Path

from topt_deploy.data.columns import REGION_ID

from .bad_rows import FAIL
from .predictor import Predictor, open_predictor


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that shape the output.

    Attributes:
        tasks: Tasks to predict; all of the bundle's if none is named.
        id_col: The column of region ids.
        wide: One row per region.
        coverage: Of the intervals; None for the default.
        on_bad_row: One of :data:`topt_deploy.runtime.bad_rows.POLICIES`.
    """

    tasks: tuple[str, ...] = ()
    id_col: str = REGION_ID
    wide: bool = False
    coverage: float | None = None
    on_bad_row: str = FAIL


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings that all cities of a command have in common, by the names of its options; paths as text.

    Attributes:
        bundle: The bundle's path, which every worker must see.
        device, threads: Where the model runs, and threads within an operator.
        encoder_bundle, encoder_engine: The prompt encoder's own bundle, and its backend.
        require_signature: The public key that must have signed the bundle.
        options: The options that shape the output.
        resume: True if cities that are done are left as they are.
        cache: True if prompts are kept beside the regions.
    """

    bundle: str
    device: str = "cpu"
    threads: int = 1
    encoder_bundle: str | None = None
    encoder_engine: str = "onnxruntime"
    require_signature: str | None = None
    options: Options = field(default_factory=Options)
    resume: bool = False
    cache: bool = True

    def open(self) -> Predictor:
        """The bundle, opened and checked."""
        place, key = (None if path is None else Path(path) for path in (self.encoder_bundle, self.require_signature))
        return open_predictor(
            Path(self.bundle), device=self.device, threads=self.threads,
            encoder=place, engine=self.encoder_engine, key=key,
        )  # fmt: skip
