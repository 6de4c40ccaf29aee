"""The literature under the published protocol: the epoch of the embedding is chosen, and nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import quiet, task_config, tiny_city, tiny_city_tables
from torch import nn

from topt_deploy.data.city import infer_schema
from topt_deploy.errors import UsageError
from topt_deploy.train.evaluation.literature.embedding import EmbeddingMethod, Learner, TrainingRecipe
from topt_deploy.train.evaluation.literature.mvure import Mvure
from topt_deploy.train.evaluation.literature.recp import Recp
from topt_deploy.train.evaluation.plain_baselines import Mean
from topt_deploy.train.evaluation.problem import Problem
from topt_deploy.train.evaluation.protocols import PROTOCOLS
from topt_deploy.train.evaluation.published_protocol import best_look, hold_out_literature, published_folds
from topt_deploy.train.loop import TrainingDevice

N = 14
CITY = tiny_city(N)
LABELS = CITY.labels["crime"]
PAPER = task_config(None, {"fold_seed": 2024}, None)


@pytest.fixture(scope="module")
def problem() -> Problem:
    schema = infer_schema(tiny_city_tables(N)[0], views=("poi", "land_use"), mobility=True)
    return Problem.of(CITY, schema, TrainingDevice(device=torch.device("cpu")), quiet())


class Drifting(EmbeddingMethod):
    """Its embedding after epoch t is the labels with noise in proportion to |t - 61|, which no other method may see."""

    name = "drifting"
    paper = TrainingRecipe(epochs=121, lr=1.0)

    def build(self, problem: Problem) -> Learner:
        module = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(module.weight)
        noise = torch.randn(N, 1, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor(LABELS / LABELS.std(), dtype=torch.float32)[:, None]
        epochs = [0]

        def loss(_: int) -> torch.Tensor:
            epochs[0] += 1
            return 0 * module.weight.sum()

        return Learner(module=module, loss=loss, embed=lambda: labels + noise * abs(epochs[0] - 61) / 20)


def test_the_epoch_is_the_one_that_predicts_held_out_labels_best(problem: Problem) -> None:
    offered = Drifting().looks(problem, 0, every=10)
    assert offered.shape == (13, N, 1)  # epochs 1, 11, … 121
    assert best_look(offered, LABELS, PAPER) == 6  # epoch 61, among 1, 31, 61, 91, 121


def test_the_folds_are_the_published_ones_and_the_regression_the_method_s_own(problem: Problem) -> None:
    method = Drifting()
    labels = LABELS.copy()
    labels[3] = np.nan
    held_out = hold_out_literature(problem, "crime", method, labels, PAPER, seeds=[0, 5])
    fold = published_folds(labels, PAPER)
    np.testing.assert_array_equal(held_out.fold, [fold, fold])
    chosen = method.looks(problem, 0, every=10)[6]
    for k in range(fold.max() + 1):
        training = np.where((fold >= 0) & (fold != k), labels, np.nan)
        expected = method.counts(problem, "crime", chosen, training[None], 0)[0]
        np.testing.assert_allclose(held_out.prediction[0, fold == k], expected[fold == k])
    assert np.isnan(held_out.prediction[:, 3]).all()


@pytest.mark.parametrize("make", [Mvure, Recp])
def test_looking_leaves_the_training_as_it_is(problem: Problem, make: type[EmbeddingMethod]) -> None:
    """The last look is the last epoch's, in training mode; what is trained next from the same seed is the same."""
    method = make(TrainingRecipe(epochs=5, lr=1e-3))
    one, two = method.looks(problem, 3, every=1), method.looks(problem, 3, every=4)
    torch.testing.assert_close(one[[0, 4]], two, rtol=0, atol=0)


def test_the_protocol_takes_the_literature_and_refuses_plain_baselines(problem: Problem, tmp_path: Path) -> None:
    method = Mvure(TrainingRecipe(epochs=3, lr=1e-3))
    held_out = PROTOCOLS["paper"].predict(method, problem, "crime", LABELS, [0], tmp_path)
    assert np.isfinite(held_out.prediction).all()
    with pytest.raises(UsageError, match="of the literature's embeddings"):
        PROTOCOLS["paper"].predict(Mean(), problem, "crime", LABELS, [0], tmp_path)
