"""ToPT and its variants as methods: presets with a setting or two changed."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from topt_deploy.config.load import load_config
from topt_deploy.config.settings import Config, SrelConfig
from topt_deploy.errors import BadData
from topt_deploy.model.srel import Srel
from topt_deploy.model.topt import TopT, all_features, predict

from ..ensemble import train_ensembles
from ..fused import fit_leverage, fused
from ..loop import Workplace
from ..prompt4re import HeadResult, train_head
from ..srel import embed, train_embedding
from .problem import Problem

Array = np.ndarray[Any, Any]

_embeddings: WeakKeyDictionary[Problem, dict[tuple[SrelConfig, int], tuple[Srel, Tensor]]] = WeakKeyDictionary()
"""Stage 1 needs no label: a model per settings and seed, and what it embeds, serve every variant, task and protocol."""
_parts: WeakKeyDictionary[Problem, dict[tuple[int, ...], Problem]] = WeakKeyDictionary()
"""Some of a problem's cities, by their numbers: one object, so that their embeddings are found again."""


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

        Of several cities, see :meth:`_predict_cities`.

        Raises:
            BadData: If the city lacks the prompts that the variant reads.
        """
        if problem.city.parts:
            return self._predict_cities(problem, task, labels, seeds)
        rows = {seed: np.flatnonzero(np.array(seeds) == seed) for seed in dict.fromkeys(seeds)}
        cuda = problem.engine.device.type == "cuda"
        together = [list(rows)] if cuda and self.config(task, 0).tasks[task].ensemble.enabled else [[s] for s in rows]
        predicted = np.empty(labels.shape)
        for batch in together:
            results = self._train(problem, task, [labels[rows[seed]] for seed in batch], batch)
            for seed, result in zip(batch, results, strict=True):
                predicted[rows[seed]] = result.predicted
        return predicted

    def _predict_cities(self, problem: Problem, task: str, labels: Array, seeds: Sequence[int]) -> Array:
        """A training per row, on the cities that have a label in it. What it gives predicts every city as a bundle does
        that one is exported as: of the cities without a label it has seen nothing, not even features."""
        predicted, kept = np.empty(labels.shape), _parts.setdefault(problem, {})
        for row, (own, seed) in enumerate(zip(labels, seeds, strict=True)):
            seen = tuple(np.unique(problem.city.part[~np.isnan(own)]).tolist())
            if seen not in kept:
                kept[seen] = problem.only(seen)
            known = np.concatenate([own[problem.city.blocks[number]] for number in seen])
            model = self._fused(kept[seen], task, known, seed)
            for block in problem.city.blocks:
                inputs = {name: x[block].cpu() for name, x in problem.inputs.items()}
                predicted[row, block] = predict(model, inputs)[task].double().numpy()
        return predicted

    def _fused(self, problem: Problem, task: str, labels: Array, seed: int) -> TopT:
        """The model that a run on these labels (N,) would leave."""
        (result,), (config,) = self._train(problem, task, [labels[None]], [seed]), self._configs(problem, task, [seed])
        settings, srels = config.tasks[task], dict[str, Srel]()
        if settings.embeds:
            srels = {task: _embeddings[problem][settings.srel, seed][0]}
        leverage, _ = fit_leverage(problem.schema, problem.inputs, [~np.isnan(labels)] * settings.ensemble.enabled)
        return fused(config, problem.schema, srels, {task: result}, leverage)

    def _configs(self, problem: Problem, task: str, seeds: Sequence[int]) -> list[Config]:
        """Of every seed, without prompts where the city has none and the variant is not about them."""
        adapted = () if problem.schema.prompts or not self.adapts else ("prompt4re.enabled=false",)
        return [self.config(task, seed, *adapted) for seed in seeds]

    def _train(self, problem: Problem, task: str, labels: Sequence[Array], seeds: Sequence[int]) -> list[HeadResult]:
        """Heads of every seed's rows of labels; of one seed where there is an embedding, which is the seed's own."""
        configs = self._configs(problem, task, seeds)
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
                problem.inputs, problem.schema, prompts, labels, configs, task, place, embeddings=embeddings,
                part=problem.city.part,
            )  # fmt: skip
        (rows,), features = labels, all_features(problem.inputs, problem.schema)
        assert embeddings is not None
        return [train_head(embeddings[0], features, prompts, rows, config, task, place, part=problem.city.part)]


def _embedding(problem: Problem, config: Config, task: str, place: Workplace) -> Tensor:
    """A seed's embedding, trained where there is none yet with these settings."""
    embeddings = _embeddings.setdefault(problem, {})
    key = (config.tasks[task].srel, config.seed)
    if key not in embeddings:
        name = config.embedding_of(task)
        srel = train_embedding(problem.city, problem.inputs, problem.schema, config, name, place)
        embeddings[key] = srel, embed(srel, problem.inputs, problem.city)
    return embeddings[key][1]


ROWS = (
    "srel.inputs=rows", "srel.width=77", "srel.ffn_width=256", "prompt4re.width=144", "prompt4re.soft_prompt=144",
)  # fmt: skip
"""Raw counts and rows of the OD matrix, at HAFusion's width for Chicago: that of its rows."""

VARIANTS: Mapping[str, Topt] = {
    "topt": Topt("default"),
    "topt-no-prompts": Topt("default", "prompt4re.enabled=false"),
    "topt-no-task-prompt": Topt("default", "prompt4re.prompt=none"),
    "topt-no-srel": Topt("default", "ensemble.embedding=false"),
    "topt-no-stages": Topt("default", "ensemble.topt=false"),
    "topt-no-kernels": Topt("default", "ensemble.kernel=false"),
    "topt-no-networks": Topt("default", "ensemble.network=false"),
    "topt-trees": Topt("default", "ensemble.trees_labels=0"),
    "topt-no-trees": Topt("default", "ensemble.trees=0"),
    "topt-equal": Topt("default", "ensemble.inner_folds=0"),
    "topt-kernels": Topt("kernels"),
    "srel": Topt("srel"),
    "paper": Topt("paper"),
    "paper-rows": Topt("paper", *ROWS),
    "paper-no-prompt4re": Topt("paper", "prompt4re.enabled=false"),
    "paper-no-task-prompt": Topt("paper", "prompt4re.prompt=none"),
    "paper-no-alignment": Topt("paper", "prompt4re.alignment=false"),
    "paper-no-distance-bias": Topt("paper", "srel.distance_bias=false"),
    "paper-no-centrality": Topt("paper", "srel.centrality=false"),
}
"""By name. ``paper`` here is the paper's model at its last epoch: its protocol is another matter
(:mod:`.published_protocol`)."""
