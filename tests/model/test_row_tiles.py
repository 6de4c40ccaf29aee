"""Tiles of rows give what the whole gives, keep nothing that is N×N, and are one tile in a small city."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import SREL, tiny_city
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from topt_deploy.config.settings import Prompt4ReConfig
from topt_deploy.data.features import POSITION, features
from topt_deploy.model import row_tiles
from topt_deploy.model.prompt4re import Alignment
from topt_deploy.model.srel import Adjacency, Srel, SrelLoss

WIDTHS = {"poi": 4, "land_use": 3, "mobility": 16}
N = 23


@pytest.fixture
def tile(monkeypatch):
    """Set the height of tiles, in rows."""

    def height(rows):
        monkeypatch.setattr(row_tiles, "ENTRIES", 1)
        monkeypatch.setattr(row_tiles, "LEAST", rows)

    return height


class Training:
    """SREL and its loss on a city, in float64, with flows and similarities drawn at random."""

    def __init__(self, n=N, **settings):
        torch.manual_seed(2)
        config = replace(SREL, layers=2, bias=0.6, **settings)
        self.srel = Srel(WIDTHS, config).double()
        self.inputs = {k: torch.from_numpy(v).double() for k, v in features(tiny_city(n)).items()}
        self.srel.fit_statistics(self.inputs, self.inputs[POSITION])
        rng = np.random.default_rng(0)
        self.dense = {view: rng.uniform(size=(n, n)) for view in ("poi", "land_use")}
        self.flow = rng.uniform(size=(n, n)) * (rng.uniform(size=(n, n)) < 0.2)
        self.n, self.config = n, config

    def matrix(self, dense):
        columns = dense.T.copy()
        return row_tiles.matrix(
            self.n, lambda rows: torch.tensor(dense[rows]), lambda rows: torch.tensor(columns[rows])
        )

    def step(self):
        """The loss's terms, and the gradient of every parameter."""
        torch.manual_seed(3)
        loss = SrelLoss({k: self.matrix(v) for k, v in self.dense.items()}, self.matrix(self.flow), self.config)
        loss.double()
        parameters = dict(self.srel.named_parameters()) | {f"loss.{k}": v for k, v in loss.named_parameters()}
        terms = loss(self.srel(self.inputs, self.srel.adjacency(self.inputs[POSITION])))
        gradients = torch.autograd.grad(sum(terms.values()), parameters.values())
        return terms, dict(zip(parameters, gradients, strict=True))


def assert_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        size = float(value.detach().abs().max())
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-9 * size + 1e-15, msg=lambda m, n=name: f"{n}: {m}"
        )


class TestTraining:
    @pytest.mark.parametrize("height", [1, 4, N - 1], ids="{} rows".format)
    def test_loss_and_gradients_are_those_of_the_whole(self, height, tile):
        training = Training(dropout=0.0)
        expected = training.step()
        assert all(gradient.abs().max() > 0 for gradient in expected[1].values())
        tile(height)
        terms, gradients = training.step()
        assert_close(terms, expected[0])
        assert_close(gradients, expected[1])

    def test_what_is_computed_again_drops_the_same(self, tile, monkeypatch):
        training = Training(dropout=0.5)
        tile(4)
        terms, gradients = training.step()
        monkeypatch.setattr(row_tiles, "checkpoint", lambda function, rows, use_reentrant: function(rows))
        kept = training.step()
        assert_close(terms, kept[0])
        assert_close(gradients, kept[1])
        assert not torch.allclose(terms["poi"], Training(dropout=0.0).step()[0]["poi"]), "no dropout would pass too"

    def test_nothing_is_n_by_n(self, tile):
        n = 150
        training = Training(n)
        assert largest(training.step) >= n * n
        tile(4)
        assert largest(training.step) <= max(4 * n * SREL.channels, n * 3 * SREL.width)


def largest(call) -> int:
    """Entries of the largest tensor that PyTorch makes in the call, forward and backward."""

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.most = max([self.most, *(x.untyped_storage().nbytes() // x.itemsize for x in made)])
            return out

    with Watch() as watch:
        call()
    return watch.most


@pytest.mark.parametrize("n", [2, 9, N])
@pytest.mark.parametrize("height", [1, 4])
def test_an_embedding_is_that_of_the_whole(n, height, tile):
    training = Training()
    inputs = {k: torch.from_numpy(v).double() for k, v in features(tiny_city(n)).items()}

    def embed():
        with torch.no_grad():
            return training.srel.eval()(inputs, training.srel.adjacency(inputs[POSITION]))

    expected = embed()
    tile(height)
    torch.testing.assert_close(embed(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 3, N])
def test_the_decay_length_is_that_of_the_whole(n, tile):
    position = torch.from_numpy(features(tiny_city(n))[POSITION])
    whole, tiled = Adjacency(SREL), Adjacency(SREL)
    whole.fit(position)
    tile(4)
    tiled.fit(position)
    assert tiled.length_m == whole.length_m


def test_alignment_is_that_of_the_whole(tile):
    torch.manual_seed(0)
    layer = Alignment(members=3, inputs=5, inner=8, rank=4, config=Prompt4ReConfig(heads=2, dropout=0.0)).double()
    embedding, prompts = torch.randn(1, N, 5).double(), torch.randn(1, N, 4).double()

    def step():
        out = layer(embedding, prompts)
        return {"out": out} | dict(
            zip(
                dict(layer.named_parameters()), torch.autograd.grad(out.square().sum(), layer.parameters()), strict=True
            )
        )

    expected = step()
    tile(4)
    assert_close(step(), expected)


def test_a_small_city_is_one_tile_and_a_large_one_is_not():
    calls = []

    def rows(which):
        calls.append(which)
        return torch.zeros(1)

    edge = int(row_tiles.ENTRIES**0.5)
    row_tiles.in_tiles(edge, lambda which: (rows(which),))
    assert calls == [row_tiles.ALL]
    calls.clear()
    row_tiles.in_tiles(edge + 1, lambda which: (rows(which),))
    np.testing.assert_array_equal(np.concatenate([np.arange(edge + 1)[c] for c in calls]), np.arange(edge + 1))
    assert len(calls) == 2


def test_there_are_not_more_tiles_than_regions_however_many():
    """Each of them leaves something behind for the gradient."""
    n = 100_000
    seen = []

    def tile(rows):
        seen.append(rows)
        return (torch.zeros(rows.stop - rows.start),)

    (found,) = row_tiles.in_tiles(n, tile)
    assert len(found) == n
    assert len(seen) <= n / 32
    assert seen[0] == slice(0, 32)


STEPS = """
import resource, torch
from topt_deploy.freed_memory import keep_freed_memory
from topt_deploy.model.row_tiles import in_tiles
torch.set_num_threads(1)
in_tiles(1000, lambda rows: (torch.ones(1000)[rows],))  # in several tiles: blocks are given back
{before}
def step():
    for _ in range(20):
        torch.ones(1 << 20)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
def test_training_keeps_the_memory_of_a_step_for_the_next() -> None:
    """20 blocks of 4 MB are 20,480 pages, which the system hands out again at every step unless they are kept."""
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", STEPS.format(before=b)], check=True, capture_output=True).stdout)
        for b in ("", "keep_freed_memory()")
    )
    assert kept < 100 < given_back
