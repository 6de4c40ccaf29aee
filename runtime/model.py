"""A bundle in Python: ``topt_deploy.load`` opens it, and the :class:`Model` predicts cities.

The same rules hold as for ``topt-run predict``, and the options have the names that they have there.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, overload

import pyarrow as pa

from topt_deploy.arguments import Location, check_choice, check_least, check_location, check_number, several
from topt_deploy.data.columns import FLOW_COLUMNS, REGION_ID
from topt_deploy.data.dataframes import ArrowDataset, ArrowStream, as_given, as_kind_of
from topt_deploy.errors import BadBundle, BadRows
from topt_deploy.storage.table_parts import find_table, home_of

from .bad_rows import POLICIES
from .golden_checks import GoldenCheck
from .predictor import Predictor, open_predictor

Device: TypeAlias = Literal["cpu", "cuda", "tensorrt", "auto"]
EncoderEngine: TypeAlias = Literal["onnxruntime", "openvino"]
OnBadRow: TypeAlias = Literal["fail", "mask", "quarantine"]
Frame = TypeVar("Frame", bound=ArrowStream)

REGIONS_FILE, MOBILITY_FILE = "regions.parquet", "mobility.parquet"


class RowsSetAside(UserWarning):
    """Rows were left out or masked, because ``on_bad_row`` allows it."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The columns that a model reads, each with what it holds (docs/reference/files.md).

    Attributes:
        regions: Of the regions table.
        mobility: Of the table of flows; empty where the model reads none.
    """

    regions: Mapping[str, str]
    mobility: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Opening:
    """How a model was opened: all that another process needs to open it again."""

    bundle: Path
    device: Device
    threads: int
    encoder_bundle: Path | None
    encoder_engine: EncoderEngine
    require_signature: Path | None

    def open(self, sha256: str | None = None) -> Predictor:
        predictor = open_predictor(
            self.bundle, device=self.device, threads=self.threads, encoder=self.encoder_bundle,
            engine=self.encoder_engine, key=self.require_signature,
        )  # fmt: skip
        if sha256 is not None and predictor.bundle.sha256 != sha256:
            raise BadBundle(
                "is another bundle than the one that was opened before", file=self.bundle, expected=sha256,
                found=predictor.bundle.sha256, fix="load() it again",
            )  # fmt: skip
        _ = predictor.session
        return predictor


class Model:
    """An opened bundle, made by :func:`load`.

    Any number of threads may call :meth:`predict` at once. A model can be pickled: the bundle's path and hash travel,
    and the other process opens the bundle there, which must be the same one. After a fork, the child opens the bundle
    again when it first predicts, because the threads of ONNX Runtime stay with the parent. CUDA does not survive a
    fork; start such workers with ``multiprocessing.get_context("spawn")``.

    Attributes:
        path: The bundle.
        sha256: The hash of its manifest, which names the hash of every other file.
    """

    def __init__(self, opening: _Opening, sha256: str | None = None) -> None:
        predictor = opening.open(sha256)
        self._opening = opening
        self._opened = os.getpid(), predictor
        self.path: Path = opening.bundle
        self.sha256: str = predictor.bundle.sha256

    def __reduce__(self) -> tuple[Any, ...]:
        return Model, (self._opening, self.sha256)

    @property
    def _predictor(self) -> Predictor:
        process, predictor = self._opened
        if process != os.getpid():
            predictor = self._opening.open(self.sha256)
            self._opened = os.getpid(), predictor
        return predictor

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the model predicts, such as ``crime``."""
        return self._predictor.tasks

    @property
    def device(self) -> str:
        """Where the model runs; never ``auto``."""
        return self._predictor.device

    @property
    def inputs(self) -> Inputs:
        """The columns that the model reads."""
        m = self._predictor.bundle.manifest
        regions = {
            REGION_ID: "text, unique",
            "lon": "degrees; a column geometry may stand in for lon and lat",
            "lat": "degrees",
        }
        regions |= {f"{view}_{name}": "number, 0 or more" for view, names in m.views.items() for name in names}
        made = "; made from text and images where it is absent" if m.encoder else ""
        regions |= {column: f"list of {facts['width']} numbers{made}" for column, facts in m.prompts.items()}
        origin, dest, flow = FLOW_COLUMNS
        flows = {origin: "text, a region_id", dest: "text, a region_id", flow: "number, 0 or more"}
        return Inputs(regions=regions, mobility=flows if m.mobility else {})

    def __repr__(self) -> str:
        m = self._predictor.bundle.manifest
        trained = f"{m.source['city_id'] or 'a city without a name'}, {m.source['regions']} regions"
        reads = [f"{len(names)} columns {view}_*" for view, names in m.views.items()]
        reads += ["flows"] if m.mobility else []
        reads += list(m.prompts)
        return "\n".join(
            [
                f"<topt_deploy.Model {str(self.path)!r}>",
                f"  predicts    {', '.join(self.tasks)}",
                f"  reads       {', '.join(reads)} (all: model.inputs)",
                f"  trained on  {trained}{' (synthetic)' if m.source['synthetic'] else ''}",
                f"  runs on     {self.device}",
            ]
        )

    @overload
    def predict(
        self,
        regions: Location | ArrowDataset,
        mobility: Location | ArrowDataset | ArrowStream | None = None,
        *,
        tasks: str | Iterable[str] = (),
        wide: bool = False,
        coverage: float | None = None,
        id_col: str = REGION_ID,
        on_bad_row: OnBadRow = "fail",
        no_cache: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> pa.Table: ...
    @overload
    def predict(
        self,
        regions: Frame,
        mobility: Location | ArrowDataset | ArrowStream | None = None,
        *,
        tasks: str | Iterable[str] = (),
        wide: bool = False,
        coverage: float | None = None,
        id_col: str = REGION_ID,
        on_bad_row: OnBadRow = "fail",
        no_cache: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Frame: ...
    def predict(
        self,
        regions: object,
        mobility: object = None,
        *,
        tasks: str | Iterable[str] = (),
        wide: bool = False,
        coverage: float | None = None,
        id_col: str = REGION_ID,
        on_bad_row: OnBadRow = "fail",
        no_cache: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Predict one city.

        Args:
            regions: One row per region (docs/reference/files.md): the path of a ``regions.parquet`` or of its folder,
                of a table in parts, or a table of pyarrow, pandas, geopandas or polars.
            mobility: The flows between the regions, of any of these kinds. Where ``regions`` is a path, the
                ``mobility.parquet`` beside it is the default.
            tasks: One task or several; all of the model's by default.
            wide: One row per region, instead of one per region and task.
            coverage: How often ``lower`` to ``upper`` should hold; by default 0.9, or no interval where the training
                city has too few labels.
            id_col: The column of region ids.
            on_bad_row: ``fail`` refuses a city with bad rows, ``mask`` gives these rows no prediction, ``quarantine``
                leaves them out. The last two warn (:class:`RowsSetAside`).
            no_cache: Keep no prompts beside the regions' file, and take none from there.
            progress: Called with how many regions have prompts, and of how many, while prompts are made.

        Returns:
            The predictions (docs/reference/files.md), in the order of the rows: a DataFrame of the same library as
            ``regions``, or a ``pyarrow.Table`` for paths and datasets. Regions with a geometry keep it.

        Raises:
            BadData, NoInput: If the tables are not what the model reads.
            UsageError: If the model lacks a task, or an argument is not one of its choices.
        """
        check_choice("on_bad_row", on_bad_row, POLICIES)
        check_number("coverage", coverage)
        predictor = self._predictor
        given = as_given(regions, BadRows.REGIONS)
        flows = None if mobility is None else as_given(mobility, BadRows.MOBILITY)
        if isinstance(given, Path):
            given = find_table(given) or given / REGIONS_FILE
            beside = home_of(given) / MOBILITY_FILE
            flows = beside if flows is None and beside.exists() else flows
        predicted = predictor.predictions(
            given, flows, tasks=several(tasks), id_col=id_col, coverage=coverage, on_bad_row=on_bad_row,
            cache=not no_cache, progress=progress or (lambda done, total: None),
        )  # fmt: skip
        for table, codes in predicted.sieve.counts().items():
            told = ", ".join(f"{rows} {code}" for code, rows in codes.items())
            done = "left out" if on_bad_row != "mask" or table == BadRows.MOBILITY else "masked"
            warnings.warn(f"rows of the {table} table were {done}: {told}", RowsSetAside, stacklevel=2)
        return as_kind_of(regions, predicted.wide() if wide else predicted.long())

    def selftest(self) -> list[GoldenCheck]:
        """Predict the bundle's golden cities, and compare with what the exporter predicted.

        Raises:
            BadBundle: If a value differs by more than the bundle's tolerance.
        """
        return self._predictor.selftest()


def load(
    bundle: Location,
    *,
    device: Device = "cpu",
    threads: int = 1,
    encoder_bundle: Location | None = None,
    encoder_engine: EncoderEngine = "onnxruntime",
    require_signature: Location | None = None,
) -> Model:
    """Open a bundle, check every byte of it, and prepare its model.

    Args:
        bundle: The bundle, a folder or a zip file.
        device: ``cpu``, ``cuda``, ``tensorrt`` or ``auto`` (docs/background/devices.md). One that is not there is an
            error; ``auto`` takes the best that works, and the log of ``topt_deploy`` says which and why.
        threads: Threads for the model.
        encoder_bundle: The prompt encoder's bundle, where it is neither inside nor beside this one.
        encoder_engine: ``onnxruntime`` or ``openvino``, which runs the prompt encoder.
        require_signature: The public key (PEM) whose holder must have signed the bundle (docs/background/security.md).

    Raises:
        NoInput, BadBundle, NoDevice, UsageError: Saying what is wrong, and what to do.
    """
    check_least("threads", threads)
    check_location("bundle", bundle, needed=True)
    check_location("encoder_bundle", encoder_bundle)
    check_location("require_signature", require_signature)
    encoder, key = (None if place is None else Path(place).absolute() for place in (encoder_bundle, require_signature))
    opening = _Opening(
        bundle=Path(bundle).absolute(), device=device, threads=threads, encoder_bundle=encoder,
        encoder_engine=encoder_engine, require_signature=key,
    )  # fmt: skip
    return Model(opening)
