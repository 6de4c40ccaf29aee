"""ToPT and its variants as methods: presets with a setting or two changed."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from topt_deploy.config.load import load_config
from topt_deploy.config.settings import Config, SrelConfig
from topt_deploy.errors import BadData
from topt_deploy.model.topt import all_features

from ..ensemble import train_ensembles
from ..loop import Workplace
from ..prompt4re import HeadResult, train_head
from ..srel import embed, train_embedding
from .problem import Problem

Array = np.ndarray[Any, Any]

_embeddings: WeakKeyDictionary[Problem, dict[tuple[SrelConfig, int], Tensor]] = WeakKeyDictionary()
"""Stage 1 needs no label: one embedding per settings and seed serves every variant, task and protocol."""


class Topt:
    """ToPT as a preset has it.

    Args:
        preset: The preset.
        overrides: ``KEY=VALUE`` settings that differ from it.
    """

    def __init__(self, preset: str, *overrides: str) -> None:
        self.preset, self.overrides = preset, overrides

    @property
    def adapts(self) -> bool:
        """True if it goes without prompts where the city has none: every variant that is not about prompts."""
        return not any(override.startswith("prompt4re.") for override in self.overrides)

    def config(self, task: str, seed: int, *more: str) -> Config:
        """The settings of a run on one task."""
        return load_config(preset=self.preset, tasks=[task], overrides=[*self.overrides, *more, f"seed={seed}"])

    @property
    def settings(self) -> str:
        """The settings that results depend on, as text for the record."""
        return load_config(preset=self.preset, tasks=["any"], overrides=self.overrides).as_json()

    def predict(self, problem: Problem, task: str, labels: Array, seeds: Sequence[int]) -> Array:
        """:meth:`.problem.Method.predict`, one training per seed, whose rows are computed as one batch.

        On CUDA, ensembles of all seeds are one batch too: a GPU has room for them. A processor has not, and is as fast
        with one seed after the other, in less memory (dev/LOG.md).

        Raises:
            BadData: If the city lacks the prompts that the variant reads.
        """
        rows = {seed: np.flatnonzero(np.array(seeds) == seed) for seed in dict.fromkeys(seeds)}
        cuda = problem.engine.device.type == "cuda"
        together = [list(rows)] if cuda and self.config(task, 0).tasks[task].ensemble.enabled else [[s] for s in rows]
        predicted = np.empty(labels.shape)
        for batch in together:
            results = self._train(problem, task, [labels[rows[seed]] for seed in batch], batch)
            for seed, result in zip(batch, results, strict=True):
                predicted[rows[seed]] = result.predicted
        return predicted

    def _train(self, problem: Problem, task: str, labels: Sequence[Array], seeds: Sequence[int]) -> list[HeadResult]:
        """Heads of every seed's rows of labels; of one seed where there is an embedding, which is the seed's own."""
        configs = [self.config(task, seed) for seed in seeds]
        config = configs[0]
        if not problem.schema.prompts and self.adapts:
            configs = [self.config(task, seed, "prompt4re.enabled=false") for seed in seeds]
            config = configs[0]
        settings = config.tasks[task]
        column = settings.prompt_column(task)
        if column is not None and column not in problem.inputs:
            raise BadData("the city has no such prompts", column=column, fix="encode them, or leave this variant out")
        prompts = None if column is None else problem.inputs[column]
        place = Workplace(engine=problem.engine, reporter=problem.reporter.quiet())
        embeddings = [_embedding(problem, one, task, place) for one in configs] if settings.embeds else None
        if settings.ensemble.enabled:
            return train_ensembles(
                problem.inputs, problem.schema, prompts, labels, configs, task, place, embeddings=embeddings
            )
        (rows,), features = labels, all_features(problem.inputs, problem.schema)
        assert embeddings is not None
        return [train_head(embeddings[0], features, prompts, rows, config, task, place)]


def _embedding(problem: Problem, config: Config, task: str, place: Workplace) -> Tensor:
    """A seed's embedding, trained where there is none yet with these settings."""
    embeddings = _embeddings.setdefault(problem, {})
    key = (config.tasks[task].srel, config.seed)
    if key not in embeddings:
        name = config.embedding_of(task)
        srel = train_embedding(problem.city, problem.inputs, problem.schema, config, name, place)
        embeddings[key] = embed(srel, problem.inputs)
    return embeddings[key]


VARIANTS: Mapping[str, Topt] = {
    "topt": Topt("default"),
    "topt-no-prompts": Topt("default", "prompt4re.enabled=false"),
    "topt-no-task-prompt": Topt("default", "prompt4re.prompt=none"),
    "topt-no-srel": Topt("default", "ensemble.embedding=false"),
    "topt-no-stages": Topt("default", "ensemble.topt=false"),
    "topt-no-kernels": Topt("default", "ensemble.kernel=false"),
    "topt-no-networks": Topt("default", "ensemble.network=false"),
    "topt-equal": Topt("default", "ensemble.inner_folds=0"),
    "topt-kernels": Topt("kernels"),
    "srel": Topt("srel"),
    "paper": Topt("paper"),
    "paper-no-prompt4re": Topt("paper", "prompt4re.enabled=false"),
    "paper-no-task-prompt": Topt("paper", "prompt4re.prompt=none"),
    "paper-no-alignment": Topt("paper", "prompt4re.alignment=false"),
    "paper-no-distance-bias": Topt("paper", "srel.distance_bias=false"),
    "paper-no-centrality": Topt("paper", "srel.centrality=false"),
}
"""By name. ``paper`` here is the paper's model at its last epoch: its protocol is another matter
(:mod:`.published_protocol`)."""
