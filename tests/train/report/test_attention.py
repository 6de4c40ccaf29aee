"""Attention as the hooks read it, against the layers' formula written out."""

import numpy as np
import pytest
import torch
from builders import LAND_USE, POI, task_config, tiny_city, tiny_config

from topt_deploy.data.city import Schema
from topt_deploy.data.features import features
from topt_deploy.model.layers import ByName
from topt_deploy.model.topt import ModelSpec, TopT, predict
from topt_deploy.train.report.attention import attended_most, read_attention, received, spread

SCHEMA = Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=True)
N = 9


def model_of(inputs: dict[str, torch.Tensor], **tasks: dict[str, object]) -> TopT:
    torch.manual_seed(3)
    config = tiny_config({name: task_config(srel=srel, prompt4re={"enabled": False}) for name, srel in tasks.items()})
    model = TopT(ModelSpec(config=config, schema=SCHEMA, ranks={})).eval()
    for _, srel in model.srel.items():
        srel.fit_statistics(inputs, inputs["position"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that attention is far from even
    return model


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in features(tiny_city(N)).items()}


def test_equals_the_formula(inputs: dict[str, torch.Tensor]) -> None:
    """softmax(q·k/√d + λA), mean over heads and layers, from the weights alone."""
    model = model_of(inputs, crime={"layers": 2, "bias": 0.7})
    srel = model.srel["crime"]
    adjacency = srel.adjacency(inputs["position"])
    with torch.no_grad():
        x, weights = srel.fusion(torch.stack([encoder(inputs[v]) for v, encoder in srel.encoders.items()], dim=1))
        strength = adjacency.sum(dim=1, keepdim=True)
        x = x + srel.centrality(strength / strength.max())
        expected = torch.zeros(N, N)
        for layer in srel.layers:
            qkv = layer.attention.qkv(x)
            for head in range(2):
                q, k = (qkv[:, part * 8 + head * 4 :][:, :4] for part in (0, 1))
                expected += (q @ k.T / 2 + srel.bias * adjacency).softmax(dim=1) / 4
            x = layer(x, srel.bias * adjacency)
    (found,) = read_attention(model, inputs)
    np.testing.assert_allclose(found.regions, expected, atol=1e-6)
    assert found.regions.max() > 1.5 / N, "too even to tell one layer or head from another"
    assert found.views == pytest.approx(dict(zip(["poi", "land_use", "mobility"], weights.tolist(), strict=True)))
    assert sum(found.views.values()) == pytest.approx(1)


def test_every_embedding_with_the_tasks_that_build_on_it(inputs: dict[str, torch.Tensor]) -> None:
    model = model_of(inputs, a={"layers": 1}, b={"layers": 0}, c={"layers": 1})
    found = read_attention(model, inputs)
    assert [part.tasks for part in found] == [("a", "c"), ("b",)]
    assert found[0].regions is not None
    assert found[1].regions is None


def test_the_model_is_left_as_it_was(inputs: dict[str, torch.Tensor]) -> None:
    model = model_of(inputs, crime={})
    before = predict(model, inputs)
    read_attention(model, inputs)
    assert all(not module._forward_hooks for module in model.modules())
    assert torch.equal(predict(model, inputs)["crime"], before["crime"])


def test_a_model_without_srel_has_none(inputs: dict[str, torch.Tensor]) -> None:
    model = model_of(inputs, crime={})
    model.srel = ByName({})
    assert read_attention(model, inputs) == []


def test_summaries() -> None:
    weights = np.array([[0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25] * 4, [0.1, 0.2, 0.3, 0.4]])
    np.testing.assert_allclose(received(weights), [0.85, 1.7, 0.8, 0.65])
    assert attended_most(weights, 2).tolist() == [[1, 2], [0, 2], [0, 1], [2, 1]]
    assert attended_most(weights, 9).shape == (4, 3)
    assert spread(np.full((5, 5), 0.2)) == pytest.approx(5)
    assert spread(np.eye(5)) == pytest.approx(1)
    assert spread(np.array([[0.5, 0.5, 0], [1, 0, 0], [0, 1, 0]])) == pytest.approx((2 + 1 + 1) / 3)
