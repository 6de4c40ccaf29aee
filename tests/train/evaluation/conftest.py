"""What tests of evaluations share."""

import pytest

from topt_deploy.config.load import load_config
from topt_deploy.train.evaluation import plain_baselines, topt_variants

FEW_STEPS = [
    *("srel.epochs=2", "srel.width=8", "srel.heads=2", "prompt4re.epochs=2", "prompt4re.heads=2"),
    *("ensemble.epochs=2", "ensemble.steps=2", "ensemble.features=8", "ensemble.width=4", "ensemble.members=2"),
]


@pytest.fixture
def few_steps(few_trees: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ensembles and trainings at a hundredth of their cost."""
    whole = plain_baselines.ExtraTreesRegressor
    monkeypatch.setattr(
        plain_baselines, "ExtraTreesRegressor", lambda *_, **settings: whole(**settings | {"n_estimators": 3})
    )
    monkeypatch.setattr(
        topt_variants, "load_config", lambda overrides, **more: load_config(overrides=[*overrides, *FEW_STEPS], **more)
    )
