"""What tests of trainings share."""

import pytest

from topt_deploy.train import boosted_trees


@pytest.fixture
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline of every training at a hundredth of its cost."""
    whole = boosted_trees.GradientBoostingRegressor
    monkeypatch.setattr(
        boosted_trees, "GradientBoostingRegressor", lambda **settings: whole(**settings | {"n_estimators": 3})
    )
