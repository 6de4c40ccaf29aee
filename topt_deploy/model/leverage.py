"""How far a region lies from those that the model was fitted on: its leverage."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from topt_deploy.data.features import POSITION

from .layers import Standardize

FENCE = 1.5
"""Quartile distances of Tukey's fence."""
CUT = 10.0
"""A standardised feature counts no further from the mean than this: beyond, far is far."""


class Leverage(nn.Module):
    """Ridge leverage of a region with respect to the fitted ones, h = zᵀ (ZᵀZ + λI)⁻¹ z, in standardised features.

    It says how much a ridge regression's own uncertainty grows there: the variance of its prediction is σ²(1 + h). λ is
    the mean eigenvalue of ZᵀZ, so that directions which the fitted regions hardly vary in count little. The positions
    take no part: another city is elsewhere.

    The threshold is Tukey's fence, one and a half quartile distances above the third quartile of log h, of the fitted
    regions, each left out of the others. Beyond it a region is unlike them.

    What is stored is a factor of the inverse, of the city's second moments: no region's row can be told from it.

    *Shape:* {view: (N, F_v)} → (N,)

    Args:
        widths: F_v of every view (:func:`topt_deploy.data.features.all_widths`).
        rank: Of the factor, at most ΣF_v.
    """

    factor: Tensor
    ridge: Tensor
    threshold: Tensor

    def __init__(self, widths: Mapping[str, int], rank: int) -> None:
        super().__init__()
        self.names = tuple(name for name in widths if name != POSITION)
        width = sum(widths[name] for name in self.names)
        self.standardize = Standardize(width, CUT)
        self.register_buffer("factor", torch.zeros(width, rank))
        self.register_buffer("ridge", torch.tensor(1.0))
        self.register_buffer("threshold", torch.tensor(1.0))

    @classmethod
    def fit(cls, widths: Mapping[str, int], inputs: Mapping[str, Tensor], fitted: Tensor) -> "Leverage":
        """Of a training city.

        Args:
            inputs: Its views.
            fitted: bool (N,), the regions that have a label.
        """
        names = [name for name in widths if name != POSITION]
        x = torch.cat([inputs[name].cpu() for name in names], dim=1)
        standardize = Standardize(x.shape[1], CUT)
        standardize.fit(x)
        z = standardize(x)[fitted.cpu()].double()
        _, singular, right = torch.linalg.svd(z, full_matrices=False)
        ridge = singular.square().sum() / len(singular)
        # zᵀ(ZᵀZ + λI)⁻¹z = (|z|² − |Vᵀz|²)/λ + Σ (v_r·z)²/(s_r² + λ): the factor holds what the second part lacks.
        lacking = (singular.square() / (ridge * (singular.square() + ridge))).sqrt()
        module = cls(widths, len(singular))
        module.standardize = standardize
        module.factor.copy_(right.T * lacking)
        module.ridge.copy_(ridge)
        own = module.left_out(inputs, fitted)[fitted.cpu().numpy()]
        first, third = np.quantile(np.log(np.maximum(own, 1e-12)), [0.25, 0.75])
        module.threshold.copy_(torch.tensor(float(np.exp(third + FENCE * (third - first)))))
        return module

    def left_out(self, inputs: Mapping[str, Tensor], fitted: Tensor) -> np.ndarray:
        """Leverage with respect to the *other* fitted regions: h / (1 − h) of a fitted one (N,)."""
        h = self({name: inputs[name].cpu() for name in self.names}).double()
        fitted = fitted.cpu()
        left: np.ndarray = torch.where(fitted, h / (1 - h).clamp(min=1e-6), h).numpy()
        return left

    def trust(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """How much of what is made of more than nearness counts: 1 up to the threshold, and beyond it less, as 1/h.

        *Shape:* {view: (N, F_v)} → (N,)
        """
        return (self.threshold / self(inputs).clamp(min=1e-12)).clamp(max=1)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        z = self.standardize(torch.cat([inputs[name] for name in self.names], dim=1))
        return (z.pow(2).sum(dim=1) / self.ridge - torch.mm(z, self.factor).pow(2).sum(dim=1)).clamp(min=0)
