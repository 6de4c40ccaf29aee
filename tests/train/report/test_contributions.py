"""Contributions against a loop over regions, views and features; what they add up to is what the head says."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from builders import LAND_USE, POI, task_config, tiny_city, tiny_config
from torch import Tensor

from topt_deploy.data.city import Schema
from topt_deploy.data.features import features
from topt_deploy.model.gaussian_process import KernelHead
from topt_deploy.model.topt import EnsembleHead, ModelSpec, TopT, predict
from topt_deploy.train.report.contributions import BOUNDS, contributions, read_contributions

N = 11
PROMPT = "prompt_crime"
SCHEMA = Schema(views={"poi": POI, "land_use": LAND_USE}, mobility=True, prompts={PROMPT: 10})
MEAN = 20.0  # well above zero, where predictions are cut off
LENGTHS = {"one process": (1.2,), "three": (0.5, 1.0, 2.0)}


def model_of(inputs: dict[str, Tensor], *, transform: str = "cbrt", prompts: bool = True, **ensemble: Any) -> TopT:
    """A model with an ensemble for crime and the paper's form for calls; weights are random, statistics real."""
    torch.manual_seed(5)
    ensemble = {"enabled": True, "features": 6, "members": 3, **ensemble}
    crime = task_config(prompt4re={"enabled": prompts}, ensemble=ensemble, target={"transform": transform})
    config = tiny_config({"crime": crime, "calls": task_config(prompt4re={"enabled": False})})
    model = TopT(ModelSpec(config=config, schema=SCHEMA, ranks={"crime": 4} if prompts else {})).eval()
    head = head_of(model)
    if head.basis is not None:
        head.basis.basis.copy_(torch.randn(10, 4))
    with torch.no_grad():
        views = head.views(inputs, inputs[PROMPT] if prompts else None)
        if head.kernel is not None:
            head.kernel.fit_features(views, seed=1)
            head.kernel.coefficients.copy_(torch.randn_like(head.kernel.coefficients))
        if head.network is not None:
            head.network.standardize.fit(head.side_by_side(views))
        head.target.mean.fill_(MEAN)
        head.target.scale.fill_(0.8)
    for _, srel in model.srel.items():
        srel.fit_statistics(inputs, inputs["position"])
    return model


def head_of(model: TopT) -> EnsembleHead:
    head = model.heads["crime"]
    assert isinstance(head, EnsembleHead)
    return head


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in features(tiny_city(N, prompts=(PROMPT,))).items()}


def looped(kernel: KernelHead, views: dict[str, Tensor]) -> dict[str, list[float]]:
    """Every view's share of the linear map, one product at a time."""
    start, found = 0, {}
    for view in kernel.views:
        phi = kernel.views[view](views[view])
        own = kernel.coefficients[0].mean(dim=0)  # of the regressions, which weigh the same
        found[view] = [math.fsum(float(phi[i, f] * own[start + f]) for f in range(phi.shape[1]))
                       for i in range(N)]  # fmt: skip
        start += phi.shape[1]
    assert start == kernel.coefficients.shape[2]
    return found


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("network", "prompts"), [*itertools.product([True, False], [True, False])])
def test_equal_a_loop(inputs: dict[str, Tensor], lengths: tuple[float, ...], network: bool, prompts: bool) -> None:
    """The networks together weigh as much as one of the Gaussian processes."""
    head = head_of(model_of(inputs, lengths=lengths, network=network, prompts=prompts))
    with torch.no_grad():
        views = head.views(inputs, inputs[PROMPT] if prompts else None)
        found = contributions(head, views)
        expected = looped(head.kernel, views)
        weight = 0.8 * len(lengths) / (len(lengths) + network)
    assert list(found.views) == list(expected)
    assert ("prompt" in found.views) == prompts
    average = MEAN
    for view, values in expected.items():
        mean = math.fsum(values) / N
        average += weight * mean
        np.testing.assert_allclose(found.views[view], [weight * (v - mean) for v in values], atol=1e-5)
    assert list(found.others) == ["networks"] * network
    if network:
        with torch.no_grad():
            members = head.network(head.side_by_side(views)).tolist()
        outputs = [0.8 * math.fsum(m[i] for m in members) / len(members) / (len(lengths) + 1) for i in range(N)]
        average += math.fsum(outputs) / N
        np.testing.assert_allclose(found.others["networks"], np.array(outputs) - math.fsum(outputs) / N, atol=1e-5)
    assert found.average == pytest.approx(average, abs=1e-5)


@pytest.mark.parametrize(("transform", "power"), [("none", 1), ("sqrt", 2), ("cbrt", 3)])
def test_add_up_to_the_prediction_before_it_is_transformed_back(
    inputs: dict[str, Tensor], transform: str, power: int
) -> None:
    model = model_of(inputs, transform=transform)
    found = read_contributions(model, inputs)
    assert list(found) == ["crime"], "the task with an embedding has none"
    whole = found["crime"].average + sum(found["crime"].views.values()) + sum(found["crime"].others.values())
    assert (whole > 0).all(), "a prediction that is cut off at zero would not be told from others"
    np.testing.assert_allclose(whole**power, predict(model, inputs)["crime"], rtol=1e-5)
    assert np.std(whole) > 0.1


def test_networks_alone_have_no_views(inputs: dict[str, Tensor]) -> None:
    model = model_of(inputs, kernel=False)
    found = read_contributions(model, inputs)["crime"]
    assert found.views == {}
    np.testing.assert_allclose(
        (found.average + found.others["networks"]) ** 3, predict(model, inputs)["crime"], rtol=1e-5
    )


def test_with_every_part_and_bounds_they_still_add_up(inputs: dict[str, Tensor]) -> None:
    model = model_of(inputs, topt=True, clip=3.0)
    head = head_of(model)
    free = read_contributions(model, inputs)["crime"]
    assert list(free.others) == ["networks", "SREL with Prompt4RE"]
    head.target.low.fill_(-0.5)
    head.target.high.fill_(0.5)
    found = read_contributions(model, inputs)["crime"]
    assert list(found.others) == ["networks", "SREL with Prompt4RE", BOUNDS]
    whole = found.average + sum(found.views.values()) + sum(found.others.values())
    np.testing.assert_allclose(whole**3, predict(model, inputs)["crime"], rtol=1e-4)
    assert np.abs(whole - MEAN).max() <= 0.5 * 0.8 + 1e-4
