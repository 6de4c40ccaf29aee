"""The transform of a task's target, where the settings leave it open (``target.transform = "auto"``)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from topt_deploy.config.settings import TargetConfig
from topt_deploy.model.gaussian_process import draw_regions
from topt_deploy.model.prompt4re import ridge
from topt_deploy.model.target import POWERS, Target

MARGIN = 0.05
"""The share of the error that leaving counts as they are must save."""
MOST_REGIONS = 1000
"""At most so many regions of a training set, drawn at random, choose its transform."""


@torch.no_grad()
def chosen_powers(x: Tensor, counts: Tensor, known: Tensor, config: TargetConfig) -> Tensor | None:
    """The power that undoes each training set's transform, (S, 1); None where the settings name the transform.

    A cube root steadies the variance of counts. Where a count of zero tells nothing about a region, as where some areas
    report nothing, the root draws zeros far away from all other counts, and its mean, transformed back, lies far below
    theirs. So counts are left as they are where a ridge on the features, which predicts each label from the others, is
    better without the root by more than :data:`MARGIN`: in absolute error and in squared error.

    Args:
        x: Standardised features (N, F).
        counts: (N,), anything where not known.
        known: bool (S, N), the training sets. No other label has a part in a set's choice.
    """
    if config.transform != "auto":
        return None
    powers = torch.full((len(known), 1), float(POWERS["cbrt"]), device=x.device)
    for row, power in zip(known, powers, strict=True):
        own = draw_regions(row, MOST_REGIONS)
        scales = replace(config, transform="cbrt"), replace(config, transform="none")
        root, plain = (_errors(x[own], counts[own], scale) for scale in scales)
        if all(without < (1 - MARGIN) * with_root for without, with_root in zip(plain, root, strict=True)):
            power.fill_(1.0)
    return powers


def _errors(x: Tensor, counts: Tensor, scale: TargetConfig) -> Sequence[float]:
    """Mean absolute and mean squared error of the counts that a ridge on a scale predicts, each label left out in
    turn."""
    weights = torch.ones(1, len(counts), device=x.device)
    target = Target(members=1, config=scale).to(x.device)
    fitted = ridge(x, target.fit(counts, weights), weights, alpha=0.0)
    assert fitted.left_out is not None
    error = target.counts(fitted.left_out)[0] - counts
    return float(error.abs().mean()), float(error.square().mean())
