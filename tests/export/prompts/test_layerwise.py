"""Several readers of one model: each gets what it would get alone, and weights are loaded once for all."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from topt_deploy.export.prompts.layerwise import Layerwise
from topt_deploy.export.prompts.pieces import Network, Piece, Spec, Use

FORM = Spec(dtype=torch.float32, dims=("n", 3))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return (torch.tanh(self.inner(x)),)


def network(name):
    piece = Piece(name="layer", build=Layer, inputs={"x": FORM}, outputs=("y",))
    uses = tuple(Use(piece=piece, weights=f"{name}.{k}.", names={"x": f"v{k}", "y": f"v{k + 1}"}) for k in range(2))
    return Network(name=name, inputs={"v0": FORM}, outputs=("v2",), uses=uses)


WEIGHTS = {
    f"{name}.{k}.{part}": torch.randn(shape, generator=torch.Generator().manual_seed(k + 2 * number))
    for number, name in enumerate(("vision", "decoder"))
    for k in range(2)
    for part, shape in (("weight", (3, 3)), ("bias", (3,)))
}


def by_hand(name, x):
    for k in range(2):
        x = np.tanh(x @ WEIGHTS[f"{name}.{k}.weight"].numpy().T + WEIGHTS[f"{name}.{k}.bias"].numpy())
    return x


class Reading:
    """A model of two networks, and how often its weights were loaded."""

    def __init__(self):
        self.loaded = Counter()
        self.layerwise = Layerwise(networks=[network("vision"), network("decoder")], load=self.load)
        self.runners = self.layerwise.runners()

    def load(self, name):
        self.loaded[name] += 1
        return WEIGHTS[name]

    def read(self, item):
        """A reader with so many images, and then two passes through the decoder."""
        images, x = item
        for _ in range(images):
            x = self.runners["vision"].run({"v0": x}, ["v2"])["v2"]
        for _ in range(2):
            x = self.runners["decoder"].run({"v0": x}, ["v2"])["v2"]
        return x


def test_every_reader_gets_what_it_would_get_alone():
    items = [(images, np.full((images + 1, 3), 0.1 * images, np.float32)) for images in (0, 3, 1)]
    reading = Reading()
    found = reading.layerwise.side_by_side(reading.read, items)
    for (images, x), own in zip(items, found, strict=True):
        for _ in range(images):
            x = by_hand("vision", x)
        np.testing.assert_allclose(own, by_hand("decoder", by_hand("decoder", x)), rtol=1e-5)
    assert set(reading.loaded.values()) == {2, 3}, "as often as the reader with the most passes asks"
    assert reading.loaded["vision.0.weight"] == 3
    assert reading.loaded["decoder.1.bias"] == 2


def test_a_single_runner_needs_no_other_reader():
    x = np.ones((2, 3), np.float32)
    expected = by_hand("decoder", by_hand("decoder", by_hand("vision", x)))
    np.testing.assert_allclose(Reading().read((1, x)), expected, rtol=1e-5)


def test_an_error_of_one_ends_all():
    reading = Reading()
    reading.layerwise.load = lambda name: 1 / 0
    with pytest.raises(ZeroDivisionError):
        reading.layerwise.side_by_side(reading.read, [(0, np.ones((1, 3), np.float32))] * 3)


def test_a_reader_that_fails_by_itself_keeps_nobody_waiting():
    reading = Reading()

    def read(item):
        return reading.read(item) if item else 1 / 0

    with pytest.raises(ZeroDivisionError):
        reading.layerwise.side_by_side(read, [(0, np.ones((1, 3), np.float32)), None, (2, np.ones((1, 3), np.float32))])
