"""Evaluate methods on a city's tasks under one protocol, going on from what the folder already holds."""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from topt_deploy import __version__
from topt_deploy.config.settings import Config
from topt_deploy.data.columns import PROMPT_PREFIX
from topt_deploy.data.parquet_parts import open_table
from topt_deploy.errors import ToptError
from topt_deploy.storage.hashed_file import Held, sha256_bytes
from topt_deploy.storage.text_files import write_json, write_text

from ..cities import CityFiles, read_cities
from ..datasets.city_files import MOBILITY, REGIONS
from ..loop import TrainingDevice
from ..progress import Reporter
from .coverage import measure
from .problem import Method, Problem
from .protocols import PROTOCOLS, Protocol, transfer_with
from .registry import METHODS, Entry
from .results import Store
from .tables import as_json, by_city, markdown

Array = np.ndarray[Any, Any]

LIBRARIES = ("numpy", "scikit-learn", "torch")


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """The task of an evaluation, and the place of its results.

    Attributes:
        problem: The city as methods see it.
        labels: Per task, float64 (N,), NaN where unknown.
        protocol: How held-out predictions come about.
        seeds: One per repetition.
        store: Keeps every result as soon as it is known; what it holds already is not computed again.
        nominal: Also measure how often intervals of this coverage hold.
    """

    problem: Problem
    labels: Mapping[str, Array]
    protocol: Protocol
    seeds: Sequence[int]
    store: Store
    nominal: float | None = None

    def run(self, methods: Mapping[str, Entry]) -> None:
        """Fill the store with every method's results for every task.

        A method that cannot run on this city is recorded with its reason, and tried again the next time. One instance
        serves all tasks, so that it may share what needs no labels.

        Raises:
            BadConfig: If the store holds results of other settings of a method.
        """
        began, worked = time.monotonic(), 0
        for m, (name, entry) in enumerate(methods.items()):
            method = entry.make()
            for t, task in enumerate(self.labels):
                if (said := self._cell(name, entry.settings, method, task)) is None:
                    continue
                worked += 1
                done, total = m * len(self.labels) + t + 1, len(methods) * len(self.labels)
                left = (time.monotonic() - began) / worked * (total - done)
                self.problem.reporter.say(f"{done} of {total}: {task}, {name}: {said}; about {left / 60:.0f} min left")

    def _cell(self, name: str, settings: str, method: Method, task: str) -> str | None:
        """Work out one method for one task; what to say of it, or None where nothing was left to do."""
        held_out, said = self.store.held_out(name, task, settings), list[str]()
        if held_out is None:
            start = time.monotonic()
            try:
                labels, kept = self.labels[task], self.store.folder
                held_out = self.protocol.predict(method, self.problem, task, labels, self.seeds, kept)
            except ToptError as error:
                self.store.save_reason(name, task, settings, error)
                return f"not run: {error.message}"
            self.store.save(name, task, settings, held_out, time.monotonic() - start)
            said.append(f"MAE {np.mean([m.mae for m in held_out.metrics()]):.1f}")
        if self.nominal is not None and not self.store.has_coverage(name, task, self.nominal):
            coverage = measure(method, self.problem, task, held_out, seed=self.seeds[0], nominal=self.nominal)
            self.store.save_coverage(name, task, coverage)
            said.append(f"{100 * coverage.all.coverage:.0f} % inside their intervals")
        return ", ".join(said) or None


def evaluate_cities(
    cities: Sequence[Path],
    config: Config,
    names: Sequence[str],
    *,
    protocol: str,
    seeds: Sequence[int],
    nominal: float | None,
    engine: TrainingDevice,
    reporter: Reporter,
    out: Path,
    few: int = 0,
) -> str:
    """Evaluate methods on a city's folder, or on several cities' under ``transfer``.

    Args:
        config: The tasks and views to read, and if flows are read. Prompts are read where the city has them.
        names: Of :data:`.registry.METHODS`.
        out: Folder of the results. Those of other methods and tasks that it holds are reported with these.
        few: Labelled regions of a held-out city that join the training.

    Returns:
        The page that ``results.md`` in that folder holds; ``results.json`` holds the same for machines.
    """
    problem, labels, hashes = read_problem(cities, config, engine, reporter)
    return evaluate_problem(
        problem,
        labels,
        hashes,
        {name: METHODS[name] for name in names},
        protocol=protocol,
        seeds=seeds,
        nominal=nominal,
        out=out,
        few=few,
    )


def read_problem(
    folders: Sequence[Path], config: Config, engine: TrainingDevice, reporter: Reporter
) -> tuple[Problem, Mapping[str, Array], dict[str, Any]]:
    """The cities' folders as a problem without labels, the labels apart, and the hashes of what was read."""
    files = [
        CityFiles(folder=city, regions=city / REGIONS, mobility=city / MOBILITY if config.mobility else None)
        for city in folders
    ]
    columns = [open_table(own.regions).names for own in files]
    prompts = [name for name in columns[0] if name.startswith(PROMPT_PREFIX) and all(name in own for own in columns)]
    city, schema = read_cities(files, views=config.views, prompts=prompts, labels=config.tasks, say=reporter.say)
    problem = Problem.of(city, schema, engine, reporter)
    hashes: dict[str, Any] = {
        "regions_sha256": _sha256_files([city / REGIONS for city in folders]),
        "mobility_sha256": _sha256_files([city / MOBILITY for city in folders if config.mobility]),
        "inputs_sha256": _sha256(problem.inputs),
    }
    if city.parts:
        hashes["cities"] = {str(part.city_id): len(part) for part in city.parts}
    return problem, city.labels, hashes


def evaluate_problem(
    problem: Problem,
    labels: Mapping[str, Array],
    hashes: Mapping[str, Any],
    methods: Mapping[str, Entry],
    *,
    protocol: str,
    seeds: Sequence[int],
    nominal: float | None,
    out: Path,
    few: int = 0,
) -> str:
    """Evaluate methods on what :func:`read_problem` gave; see :func:`evaluate_cities`."""
    recorded = facts_of(problem, hashes, protocol=protocol, seeds=seeds) | ({"few_labels": few} if few else {})
    store = Store.open(out, problem.city.region_id, recorded)
    Evaluation(
        problem=problem,
        labels=labels,
        protocol=transfer_with(few) if few else PROTOCOLS[protocol],
        seeds=seeds,
        store=store,
        nominal=nominal,
    ).run(methods)
    results = list(store.load(METHODS))
    if "cities" in recorded:
        results = by_city(results, recorded["cities"])
    page = markdown(recorded, results)
    write_text(out / "results.md", page)
    write_json(out / "results.json", as_json(recorded, results))
    return page


def facts_of(problem: Problem, hashes: Mapping[str, Any], *, protocol: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Everything that results depend on beside method and task (:meth:`.results.Store.open`)."""
    return {
        "protocol": protocol,
        "seeds": list(seeds),
        **hashes,
        "device": problem.engine.device.type,
        "precision": problem.engine.precision,
        "versions": {"topt-deploy": __version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
    }


def _sha256_files(files: Sequence[Path]) -> str | None:
    """A file's hash; of several, the hash of theirs; None for none."""
    if len(files) < 2:
        return Held(files[0]).sha256 if files else None
    return sha256_bytes("".join(Held(file).sha256 for file in files).encode())


def _sha256(inputs: Mapping[str, Tensor]) -> str:
    """Hash of what methods read of the city: it changes with how features are made, as the files' do not."""
    return sha256_bytes(b"".join(name.encode() + x.cpu().numpy().tobytes() for name, x in inputs.items()))
