"""A traced model in ONNX: traced once where that suffices, and right where it does not."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from topt_deploy.export.translate import translate


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def added_in_place(x):
    doubled = x * 2
    left = doubled[:, :1]  # sees what is added below
    doubled.add_(x)
    return left + doubled


WHOLE = {
    "products": lambda x: torch.softmax(x @ x.t(), dim=1) @ x,
    "shapes": lambda x: x.unflatten(1, (2, 2)).transpose(0, 1).flatten(1, 2) / 3,
}
TAKEN_APART = {
    "an operator with a decomposition": lambda x: x.square() + 1,
    "an operator without a translation": lambda x: x.T,
    "an operator that writes": added_in_place,
}


@pytest.fixture
def taken_apart(monkeypatch):
    """How often a program was."""
    calls = []
    own = torch.export.ExportedProgram.run_decompositions

    def counted(self, *args, **options):
        calls.append(self)
        return own(self, *args, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    return calls


@pytest.mark.parametrize("name", [*WHOLE, *TAKEN_APART])
def test_a_program_is_taken_apart_where_it_has_to_be(name, taken_apart):
    module = Calls((WHOLE | TAKEN_APART)[name]).eval()
    regions = torch.export.Dim("regions", max=100)
    traced = torch.export.export(module, (torch.randn(5, 4),), dynamic_shapes=({0: regions},), strict=False)
    model = translate(traced, ["x"], ["y"])
    assert len(taken_apart) == (name in TAKEN_APART)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for n in (2, 9):
        x = torch.randn(n, 4)
        np.testing.assert_allclose(session.run(["y"], {"x": x.numpy()})[0], module(x.clone()), rtol=1e-5, atol=1e-6)
