"""ToPT and its variants as methods: seeds, what they share, and that they are what `topt-deploy train` trains."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import quiet, tiny_city, tiny_city_tables

from topt_deploy.data.city import infer_schema
from topt_deploy.errors import BadData
from topt_deploy.train import stacking
from topt_deploy.train.ensemble import train_ensemble
from topt_deploy.train.evaluation import topt_variants
from topt_deploy.train.evaluation.problem import Problem
from topt_deploy.train.evaluation.topt_variants import VARIANTS, Topt
from topt_deploy.train.loop import TrainingDevice, Workplace

N = 13
PROMPTS = ("prompt_crime", "prompt_none")
CITY = tiny_city(N, prompts=PROMPTS)
SCHEMA = infer_schema(
    tiny_city_tables(N, prompts=PROMPTS)[0], views=("poi", "land_use"), mobility=True, prompts=PROMPTS
)
CPU = TrainingDevice(device=torch.device("cpu"))
ENSEMBLE = ("ensemble.epochs=5", "ensemble.features=8", "ensemble.width=4", "ensemble.members=2")
SREL = ("srel.epochs=3", "srel.width=8", "srel.heads=2", "prompt4re.epochs=3", "prompt4re.heads=2")


@pytest.fixture
def problem():
    return Problem.of(CITY, SCHEMA, CPU, quiet())


def rows(*held_out):
    labels = np.stack([CITY.labels["crime"]] * len(held_out))
    for row, region in zip(labels, held_out, strict=True):
        row[region] = np.nan
    return labels


def test_rows_of_a_seed_are_the_heads_that_training_gives(problem):
    labels = rows(1, 5, 7)
    method = Topt("default", *ENSEMBLE, *SREL)
    found = method.predict(problem, "crime", labels, [4, 9, 4])
    for seed, mine in ((4, [0, 2]), (9, [1])):
        prompts = problem.inputs["prompt_crime"]
        expected = train_ensemble(
            problem.inputs, SCHEMA, prompts, labels[mine], method.config("crime", seed), "crime",
            Workplace(engine=CPU, reporter=quiet()),
            embedding=topt_variants._embeddings[problem][(method.config("crime", seed).tasks["crime"].srel, seed)][1],
        )  # fmt: skip
        np.testing.assert_array_equal(found[mine], expected.predicted)
    assert (found >= 0).all()


def test_variants_with_the_same_stage_1_share_its_embeddings(problem, monkeypatch):
    trained = []
    whole = topt_variants.train_embedding
    monkeypatch.setattr(topt_variants, "train_embedding", lambda *a, **k: trained.append(a[4]) or whole(*a, **k))
    for overrides in ((), ("prompt4re.enabled=false",), ("prompt4re.alignment=false",)):
        Topt("paper", *SREL, *overrides).predict(problem, "crime", rows(0, 3), [1, 2])
    assert len(trained) == 2  # one per seed
    Topt("paper", *SREL, "srel.distance_bias=false").predict(problem, "crime", rows(0), [1])
    assert len(trained) == 3
    other = Problem.of(replace(CITY), SCHEMA, CPU, quiet())
    Topt("paper", *SREL).predict(other, "crime", rows(0), [1])
    assert len(trained) == 4


def test_a_variant_about_prompts_is_refused_in_a_city_without_them():
    problem = Problem.of(tiny_city(N), replace(SCHEMA, prompts={}), CPU, quiet())
    with pytest.raises(BadData, match="no such prompts"):
        VARIANTS["topt-no-task-prompt"].predict(problem, "crime", rows(0), [0])


def test_every_other_variant_goes_without_them():
    problem = Problem.of(tiny_city(N), replace(SCHEMA, prompts={}), CPU, quiet())
    found = Topt("kernels", "ensemble.features=8").predict(problem, "crime", rows(0), [0])
    without = Topt("kernels", "ensemble.features=8", "prompt4re.enabled=false")
    np.testing.assert_array_equal(found, without.predict(problem, "crime", rows(0), [0]))


def test_trees_take_part_from_so_many_labels_in_a_training_set(problem, monkeypatch):
    monkeypatch.setattr(stacking, "ENOUGH", 1)  # they have the weight that they earn on inner folds
    settings = ("ensemble.features=8", "ensemble.inner_folds=2")
    few, enough, always, never = (
        Topt("kernels", *settings, f"ensemble.trees={trees}", f"ensemble.trees_labels={labels}")
        for trees, labels in ((3, N), (3, N - 1), (3, 0), (0, 0))
    )
    found = [method.predict(problem, "crime", rows(0, 5), [0, 0]) for method in (few, never, enough, always)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[2], found[3])
    assert (found[1] != found[2]).any()


def test_a_city_without_the_tasks_prompts_but_with_others_is_refused():
    problem = Problem.of(CITY, SCHEMA, CPU, quiet())
    with pytest.raises(BadData, match="no such prompts"):
        Topt("kernels").predict(problem, "calls", rows(0), [0])


def test_every_variant_differs_from_its_preset_in_what_its_name_says():
    settings = {name: method.config("crime", 0).tasks["crime"] for name, method in VARIANTS.items()}
    base = settings["paper"]
    assert settings["paper-no-prompt4re"] == replace(base, prompt4re=replace(base.prompt4re, enabled=False))
    assert settings["paper-no-task-prompt"] == replace(base, prompt4re=replace(base.prompt4re, prompt="none"))
    assert settings["paper-no-alignment"] == replace(base, prompt4re=replace(base.prompt4re, alignment=False))
    assert settings["paper-no-distance-bias"] == replace(base, srel=replace(base.srel, distance_bias=False))
    assert settings["paper-no-centrality"] == replace(base, srel=replace(base.srel, centrality=False))
    base = settings["topt"]
    for name, changed in {
        "topt-no-srel": {"embedding": False},
        "topt-no-stages": {"topt": False},
        "topt-no-kernels": {"kernel": False},
        "topt-no-networks": {"network": False},
        "topt-equal": {"inner_folds": 0},
        "topt-trees": {"trees_labels": 0},
        "topt-no-trees": {"trees": 0},
    }.items():
        assert settings[name] == replace(base, ensemble=replace(base.ensemble, **changed))
    assert len({method.settings for method in VARIANTS.values()}) == len(VARIANTS)
