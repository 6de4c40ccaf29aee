"""The Python face of the runtime: a loaded bundle that turns a city's tables into predictions, Arrow to Arrow."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from topt_deploy.arguments import several
from topt_deploy.bundle.manifest import ENCODER, Bundle, open_bundle
from topt_deploy.data.city import City, hive_city
from topt_deploy.data.columns import REGION_ID, Given, file_of
from topt_deploy.data.features import features
from topt_deploy.data.parquet_parts import open_table
from topt_deploy.errors import BadBundle, BadData, BadRows, UsageError
from topt_deploy.intervals import COVERAGE, FOLDS, LEVERAGE, SCALE, SCALE_BY_SIZE, SizeTrend, carries, cv_plus, interval
from topt_deploy.storage.hashed_file import Held, sha256_file
from topt_deploy.storage.table_parts import home_of

from .backends.onnxruntime import PROVIDERS, Session, check_device
from .bad_rows import FAIL, BadRowFilter
from .device_choice import CPU, CUDA, TENSORRT, choose
from .extrapolation import extrapolated
from .predictions import Predictions, TaskPrediction
from .prompt_origins import check_prompts

if TYPE_CHECKING:
    from .backends.tensorrt import HostSession
    from .golden_checks import GoldenCheck
    from .missing_prompts import PromptEncoder

Array = np.ndarray[Any, Any]
PRECISION = "fp32"
WORTH_RELEASING_BYTES = 2 << 20
"""Size of the model's inputs from which on Arrow gives back, before the model runs, what reading them took. Of small
cities a batch needs it again at once."""


class Predictor:
    """A loaded bundle. Any number of threads may call :meth:`predict` at once.

    Args:
        bundle: An opened bundle.
        device: One of :data:`.device_choice.DEVICES`.
        threads: Threads within an operator; 0 leaves the choice to ONNX Runtime.
        encoder: The prompt encoder's bundle, where it is neither inside nor beside this one.
        engine: The library that runs the prompt encoder.

    Attributes:
        chosen: Where the model runs, and why there.
        signed_by: SHA-256 of the public key whose signature was asked for and found; None if none was asked for.
    """

    def __init__(
        self, bundle: Bundle, *, device: str, threads: int, encoder: Path | None = None, engine: str = "onnxruntime"
    ) -> None:
        self.bundle = bundle
        if PRECISION not in bundle.manifest.variants:
            found = ", ".join(bundle.manifest.variants) or "none"
            raise BadBundle("has no variant that this version runs", file=bundle.path, expected=PRECISION, found=found)
        self.variant = bundle.manifest.variants[PRECISION]
        for task, facts in bundle.manifest.tasks.items():
            if facts.get("scale") != (scale := SCALE_BY_SIZE if "fold_scores" in facts else SCALE):
                raise BadBundle(
                    "intervals are on another scale than this version's", file=bundle.path, column=task,
                    expected=scale, found=facts.get("scale"), fix="train and export again",
                )  # fmt: skip
        self._threads = threads
        self._lock = threading.Lock()
        self._session: Session | HostSession | None = None
        self._place, self._engine, self._asked = encoder, engine, device
        if device != CPU:
            from .prompt_encoder import check_engine

            check_engine(engine, device)
        # Elsewhere the model is prepared at once: only then is it known to work there.
        ways = {CPU: lambda: check_device(CPU), CUDA: lambda: self._open(CUDA), TENSORRT: self._open_engine}
        self._session, self.chosen = choose(device, ways, what="the city's model")
        self._encoder: PromptEncoder | None = None
        self.signed_by: str | None = None

    @cached_property
    def parts(self) -> tuple[bytes, memoryview]:
        """Graph and weights, their hashes checked. Processes forked after this share them."""
        return self.bundle.read(self.variant["graph"]), self.bundle.weights(self.variant["weights"])

    @property
    def session(self) -> "Session | HostSession":
        """The model, on the CPU prepared on first use: who predicts once has read its input by then, and let it go."""
        with self._lock:
            if self._session is None:
                self._session = self._open(CPU)
            return self._session

    def _open_engine(self) -> "HostSession":
        from .backends.tensorrt import open_model

        session = open_model(self.bundle, threads=self._threads)
        self._check_names(session)
        self.variant = self.bundle.manifest.variants[session.variant]
        return session

    def _open(self, device: str) -> Session:
        session = Session(
            *self.parts,
            self.variant["initializers"],
            source=self.bundle.path,
            device=device,
            threads=self._threads,
        )
        self._check_names(session)
        return session

    def _check_names(self, session: "Session | HostSession") -> None:
        for side, names in (("inputs", self.bundle.manifest.inputs), ("outputs", self.bundle.manifest.outputs)):
            found = getattr(session, side)
            if sorted(found) != sorted(names):  # an engine has them in an order of its own
                raise BadBundle(
                    f"the graph's {side} are not the manifest's", file=self.bundle.path, expected=names, found=found
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the bundle predicts."""
        return tuple(self.bundle.manifest.tasks)

    @property
    def provider(self) -> str:
        """The name of what runs the model: ONNX Runtime's execution provider, or TensorRT itself."""
        return PROVIDERS[CPU] if self._session is None else self._session.provider

    @property
    def precision(self) -> str:
        """The precision in which the model computes."""
        return str(self.variant.get("precision", PRECISION))

    @property
    def device(self) -> str:
        """The device on which the model runs: never ``auto``."""
        return self.chosen.used

    def predict(
        self,
        regions: Any,
        mobility: Any = None,
        *,
        tasks: Sequence[str] | str = (),
        id_col: str = REGION_ID,
        wide: bool = False,
        coverage: float | None = None,
    ) -> pa.Table:
        """Predict one city.

        Args:
            regions: The regions table (docs/reference/files.md): of pyarrow, a DataFrame or whatever else has Arrow's
                interface, a dataset, or the path of its Parquet file. Images are read below that file's folder alone.
            mobility: Flows between the regions, likewise, where the model reads them.
            tasks: Tasks to predict, or one; all of the bundle's by default.
            id_col: The column that holds the region ids.
            wide: One row per region, instead of one per region and task.
            coverage: How often ``lower`` to ``upper`` should hold (:mod:`topt_deploy.intervals`). By default
                :data:`~topt_deploy.intervals.COVERAGE`, or no interval where the labels are too few for it.

        Returns:
            The predictions table of the contract, in the order of the input's rows.

        Raises:
            BadData, NoInput: If the input is not what the bundle reads.
            UsageError: If the bundle lacks a task, or has too few scores for the coverage.
        """
        from topt_deploy.data.dataframes import as_given

        flows = None if mobility is None else as_given(mobility, BadRows.MOBILITY)
        given = as_given(regions, BadRows.REGIONS)
        predictions = self.predictions(given, flows, tasks=several(tasks), id_col=id_col, coverage=coverage)
        return predictions.wide() if wide else predictions.long()

    def predictions(
        self,
        regions: Given,
        mobility: Given | None,
        *,
        tasks: Sequence[str] = (),
        id_col: str = REGION_ID,
        coverage: float | None = None,
        on_bad_row: str = FAIL,
        cache: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> "Predictions":
        """The predictions of :meth:`predict`, before they are laid out as a long or wide table.

        Args:
            on_bad_row: The treatment of single bad rows (:mod:`topt_deploy.runtime.bad_rows`).
            cache: True if prompts that are made here are kept beside the regions' file, and taken from there.
            progress: Told, while they are made, how many regions are done, and of how many.
        """
        manifest = self.bundle.manifest
        chosen = tuple(tasks) or self.tasks
        for task in chosen:
            if task not in manifest.tasks:
                raise UsageError(
                    f"the bundle does not predict {task!r}",
                    file=self.bundle.path,
                    expected=f"one of {', '.join(self.tasks)}",
                    fix="choose one of these, or train the task",
                )
        file = file_of(regions)
        sieve = BadRowFilter(regions, mobility, on_bad_row, city_id=None if file is None else hive_city(file))
        city, encoded = self._read(sieve, None if file is None else home_of(file), id_col, cache, progress)
        check_prompts(manifest, city, _name(regions))
        arrays = features(city, manifest.inputs)
        if not sieve.counts():  # else the rows that were set aside are taken from the files' bytes
            for table in (regions, mobility):
                if isinstance(table, Held):
                    table.release()
        if sum(array.nbytes for array in arrays.values()) > WORTH_RELEASING_BYTES:
            pa.default_memory_pool().release_unused()  # what reading took, before the model needs its own
        beside = [name for name in manifest.outputs if name == LEVERAGE or name in {task + FOLDS for task in chosen}]
        predicted = self.computed(arrays, [*chosen, *beside])
        for name, values in predicted.items():
            if not (finite := np.isfinite(values)).all():
                raise BadData(
                    "the model gives no finite number for this input", file=_name(regions), column=name,
                    ids=city.region_id[~finite if finite.ndim == 1 else ~finite.all(axis=1)],
                    fix="look for extreme counts in these regions",
                )  # fmt: skip
        results = {task: self._result(task, predicted, coverage) for task in chosen}
        return Predictions(city, results, extrapolated(manifest, city, predicted.get(LEVERAGE)), sieve, encoded)

    def _result(self, task: str, predicted: Mapping[str, Array], coverage: float | None) -> "TaskPrediction":
        values, facts = predicted[task], self.bundle.manifest.tasks[task]
        if coverage is None and (coverage := self.coverage(task)) is None:
            return TaskPrediction(values, None, None)
        if "fold_scores" in facts:
            folds, leverage = predicted[task + FOLDS], predicted[LEVERAGE]
            trend = SizeTrend(**facts["size_trend"])
            return TaskPrediction(values, *cv_plus(values, folds, facts["fold_scores"], leverage, trend, coverage))
        return TaskPrediction(values, *interval(values, facts["scores"], coverage))

    def coverage(self, task: str, coverage: float = COVERAGE) -> float | None:
        """The coverage of a task's intervals; None where its labels are too few for them."""
        return coverage if carries(self.bundle.manifest.tasks[task]["scores"], coverage) else None

    def outputs(self, regions: Given, mobility: Given | None) -> dict[str, Array]:
        """All that the graph puts out for a city that brings its prompts, (N,) or (N, K) each, in the rows' order.

        The parity gate and the self-test compare this. It is computed as :meth:`predict` does.
        """
        city = BadRowFilter(regions, mobility, FAIL).read(self.bundle.manifest.schema, id_col=REGION_ID)
        return self.computed(features(city, self.bundle.manifest.inputs))

    def computed(self, arrays: Mapping[str, Array], names: Sequence[str] = ()) -> dict[str, Array]:
        """The graph's outputs for the model's inputs (:func:`topt_deploy.data.features.features`).

        Args:
            arrays: The inputs.
            names: Outputs; all by default.

        Raises:
            BadBundle: If it does not give one number per region, or per region and fold.
        """
        manifest, n = self.bundle.manifest, len(next(iter(arrays.values())))
        found = self.session.run(arrays, list(names) or manifest.outputs)
        by_fold = self._by_fold
        for name, values in found.items():
            folds = manifest.tasks[name.removesuffix(FOLDS)]["fold_scores"] if name in by_fold else []
            shape = (n, len(folds)) if folds else (n,)
            if values.shape != shape:
                raise BadBundle(
                    "the graph does not give one number per region", file=self.bundle.path, column=name,
                    expected=shape, found=values.shape,
                )  # fmt: skip
        return found

    @property
    def _by_fold(self) -> set[str]:
        """The outputs that have a number per fold."""
        tasks = self.bundle.manifest.tasks
        return {task + FOLDS for task, facts in tasks.items() if "fold_scores" in facts}

    def selftest(self) -> "list[GoldenCheck]":
        """Predict the bundle's golden cities on this machine.

        Raises:
            BadBundle: If a value differs by more than the bundle's tolerance from the exporter's.
        """
        from .golden_checks import check_golden_cities

        return check_golden_cities(self)

    def _read(
        self, sieve: BadRowFilter, home: Path | None, id_col: str, cache: bool, progress: Callable[[int, int], None]
    ) -> tuple[City, Mapping[str, Any] | None]:
        """The city of sound rows, and what its prompts were made with, where it lacks them and there is an encoder."""
        schema = self.bundle.manifest.schema
        missing = self._missing_prompts(sieve.regions)
        if not missing:
            return sieve.read(schema, id_col=id_col), None
        sound: City | None = None
        if sieve.policy != FAIL:  # what cannot be used need not be encoded, and could stop the encoder
            sound = sieve.read(replace(schema, prompts={}), id_col=id_col)
        with self._lock:
            made = self._prompt_encoder().add(
                sieve.regions, missing, home=home, id_col=id_col,
                on_bad_image="fail" if sieve.policy == FAIL else "skip", cache=cache, progress=progress,
            )  # fmt: skip
        sieve.regions = made.table
        if made.skipped:
            rows = np.array([region in made.skipped for region in made.table.column(id_col).to_pylist()])
            error = BadRows(
                "images cannot be read", table=BadRows.REGIONS, rows=rows, code="bad_image", fill=missing,
                column="images", ids=list(made.skipped), found=next(iter(made.skipped.values())),
            )  # fmt: skip
            sieve.take(error)
        if sound is None or made.skipped:
            return sieve.read(schema, id_col=id_col), made.facts
        return sieve.read_prompts(sound, schema, id_col=id_col), made.facts

    def _missing_prompts(self, regions: Given) -> list[str]:
        """The prompt columns that a table lacks and that this bundle's encoder makes; none where it has no encoder."""
        manifest = self.bundle.manifest
        if manifest.encoder is None:
            return []  # the reader says what is absent
        names = regions.column_names if isinstance(regions, pa.Table) else open_table(regions).names
        return [column for column in manifest.prompts if column not in names]

    def _prompt_encoder(self) -> "PromptEncoder":
        """The encoder, opened on first use; the lock must be held."""
        if self._encoder is None:
            from .missing_prompts import PromptEncoder

            self._encoder = PromptEncoder(
                self.bundle, self._place, engine=self._engine, device=self._asked, threads=self._threads
            )
        return self._encoder


def open_predictor(
    bundle: Path,
    *,
    device: str = "cpu",
    threads: int = 0,
    encoder: Path | None = None,
    engine: str = "onnxruntime",
    key: Path | None = None,
) -> Predictor:
    """Open a bundle and check every byte of it; its model is prepared, and its encoder checked, when first used."""
    opened = open_bundle(bundle)
    if key is not None:
        from topt_deploy.bundle.signature import check_signature

        check_signature(opened, key)
    predictor = Predictor(opened, device=device, threads=threads, encoder=encoder, engine=engine)
    predictor.signed_by = None if key is None else sha256_file(key)
    later = {str(predictor.variant[part]) for part in ("graph", "weights")}  # checked as they are read
    later |= {name for name in opened.manifest.files if name.startswith(ENCODER)}
    opened.verify(skip=frozenset(later))
    return predictor


def load(
    bundle: str | Path,
    *,
    device: str = "cpu",
    threads: int = 0,
    encoder: str | Path | None = None,
    engine: str = "onnxruntime",
    key: str | Path | None = None,
) -> Predictor:
    """Open a bundle, check every byte of it, and prepare its model.

    Args:
        bundle: The bundle folder or zip.
        device: ``cpu``, ``cuda``, ``tensorrt`` or ``auto`` (docs/background/devices.md); an absent one is an error, and
            ``auto`` takes the best that works: ``chosen`` and the log of ``topt_deploy`` say which and why.
        threads: Threads within an operator; 0 leaves the choice to ONNX Runtime.
        encoder: The prompt encoder's bundle, where it is neither inside nor beside this one.
        engine: The library that runs the prompt encoder, ``onnxruntime`` or ``openvino``.
        key: The public key that must have signed it (docs/background/security.md); None asks for no signature.

    Raises:
        NoInput, BadBundle, NoDevice: Naming what is wrong.
    """
    place, public = (None if path is None else Path(path) for path in (encoder, key))
    predictor = open_predictor(Path(bundle), device=device, threads=threads, encoder=place, engine=engine, key=public)
    _ = predictor.session
    return predictor


def _name(regions: Given) -> str:
    return str(file_of(regions) or "regions table")


# Columns are built from lists: given numpy arrays, pyarrow imports numpy.ma, which takes as long as the model.
