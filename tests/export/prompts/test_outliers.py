"""A channel a hundred times as large as the others: found where it hurts, and the vectors are better for it."""

import numpy as np
import pytest
import torch
from rounding import in_8_bits, weight_in_8_bits
from torch import nn

from topt_deploy.export.prompts import outliers as outliers_module
from topt_deploy.export.prompts.assemble import assemble
from topt_deploy.export.prompts.outliers import LIMITS, TOKENS, Outliers
from topt_deploy.export.prompts.pieces import Network, Piece, Spec, Use, execute
from topt_deploy.runtime.backends.onnxruntime import MappedSession

WIDTH, LAYERS, BAD = 96, 3, 1


class Layer(nn.Module):
    """A scale per channel, and a map that reads it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.map = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden):
        return (torch.tanh(self.map(hidden * self.scale)),)


class Last(nn.Module):
    """Gives the output its own name."""

    def forward(self, hidden):
        return (hidden * 3,)


def network():
    x = {"hidden": Spec(dtype=torch.float32, dims=("B", "S", WIDTH))}
    piece = Piece(name="layer", build=Layer, inputs=x, outputs=("hidden",))
    uses = tuple(Use(piece=piece, weights=f"layers.{i}.") for i in range(LAYERS))
    last = Piece(name="last", build=Last, inputs=x, outputs=("last",))
    return Network(name="net", inputs=x, outputs=("last",), uses=(*uses, Use(piece=last)))


def weights(outlier):
    """One channel of layer :data:`BAD` is ``outlier`` times as large, and read with as much smaller weights."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(LAYERS):
        tensors[f"layers.{i}.scale"] = torch.ones(WIDTH)
        tensors[f"layers.{i}.map.weight"] = torch.randn(WIDTH, WIDTH, generator=generator) * WIDTH**-0.5
    tensors[f"layers.{BAD}.scale"][7] = outlier
    tensors[f"layers.{BAD}.map.weight"][:, 7] /= outlier
    return tensors


@pytest.fixture
def given():
    return np.random.default_rng(0).normal(size=(2, 20, WIDTH)).astype(np.float32)


def observed(tensors, *inputs):
    outliers = Outliers(precision="int8")
    for x in inputs:
        found = execute(network(), tensors.__getitem__, {"hidden": torch.tensor(x)}, outliers)
    return outliers, found["last"].numpy()


def test_only_the_map_that_reads_an_outlier_is_kept(given):
    assert observed(weights(1.0), given)[0].kept() == {}
    outliers, _ = observed(weights(100.0), given)
    assert set(outliers.errors) == {f"layers.{i}.map" for i in range(LAYERS)}
    assert outliers.kept() == {f"layers.{BAD}.map": "fp16"}


def test_the_error_is_that_of_a_product_in_8_bits(given):
    tensors = weights(100.0)
    outliers, _ = observed(tensors, given)
    rows, weight = (
        given.reshape(-1, WIDTH).astype(np.float64),
        tensors["layers.0.map.weight"].numpy().astype(np.float64),
    )

    exact, found = rows @ weight.T, in_8_bits(rows) @ weight_in_8_bits(weight).T
    expected = np.mean([np.linalg.norm(f - e) / np.linalg.norm(e) for e, f in zip(exact, found, strict=True)])
    assert outliers.errors["layers.0.map"] == pytest.approx(expected, rel=1e-3)
    assert outliers.errors["layers.0.map"] < LIMITS["int8"][0] < outliers.errors[f"layers.{BAD}.map"]


def test_the_worst_of_several_inputs_counts_and_none_of_no_tokens(given):
    calm, wild = given.copy(), given.copy()
    wild[..., 3] *= 100
    none = given[:, :0]
    alone = [observed(weights(1.0), x)[0].errors["layers.0.map"] for x in (calm, wild)]
    assert alone[1] > 2 * alone[0]
    together = observed(weights(1.0), calm, wild, calm, none)[0].errors["layers.0.map"]
    assert together == pytest.approx(max(alone))


def test_keeping_it_makes_better_vectors(given, tmp_path):
    tensors = weights(100.0)
    outliers, expected = observed(tensors, given)
    cosines = {}
    for name, kept in (("all in 8 bits", {}), ("kept", outliers.kept())):
        (tmp_path / name).mkdir()
        done = assemble(network(), tensors.__getitem__, kept, "int8", tmp_path / name)
        found = MappedSession(done.graphs["onnxruntime"]).run({"hidden": given}, ["last"])["last"]
        cosines[name] = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert 1 - cosines["kept"] < 0.3 * (1 - cosines["all in 8 bits"])


@torch.no_grad()
def test_of_many_tokens_some_are_compared_from_the_first_to_the_last(monkeypatch):
    compared = []
    rows_in_8_bits = outliers_module._rows_in_8_bits
    monkeypatch.setattr(outliers_module, "_rows_in_8_bits", lambda x: compared.append(x) or rows_in_8_bits(x))
    layer = nn.Linear(WIDTH, WIDTH)
    for tokens in (TOKENS, TOKENS + 1, 10 * TOKENS):
        x = torch.arange(tokens).float()[:, None].expand(-1, WIDTH) + 1
        Outliers(precision="int8")("map", layer, x, layer(x))
        assert len(compared[-1]) == TOKENS
        assert compared[-1][[0, -1], 0].tolist() == [1, tokens]
        assert (compared[-1][1:, 0] > compared[-1][:-1, 0]).all()
