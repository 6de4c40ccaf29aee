"""From counts to the scale that a head works on, and back; and the loss on that scale."""

import math

import torch
from torch import Tensor, nn

from topt_deploy.config.settings import TargetConfig

POWERS = {"sqrt": 2, "cbrt": 3}
"""Roots that steady the variance of counts, and the power that undoes them."""
MAX_LOG = 20.0
"""Log rates are capped here: e²⁰ is half a billion."""
BEYOND = 0.5
"""How far beyond the training labels a prediction may lie, in their standard deviations on the target scale."""


class Target(nn.Module):
    """A task's target scale for M members: transformed, then standardised with each member's training labels.

    With a log link the network gives the log rate instead, and standardisation sets where it starts.
    """

    mean: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    power: Tensor | None

    def __init__(self, *, members: int, config: TargetConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(members, 1))
        self.register_buffer("scale", torch.ones(members, 1))
        # On the standardised scale; without an end where predictions may lie anywhere.
        self.register_buffer("low", torch.full((members, 1), -math.inf))
        self.register_buffer("high", torch.full((members, 1), math.inf))
        # Of ``auto``, which undoes every member's own transform; otherwise there is none, and no weight of that name.
        self.register_buffer("power", torch.full((members, 1), 3.0) if config.transform == "auto" else None)
        negative_binomial = config.likelihood == "negative_binomial"
        self.log_dispersion = nn.Parameter(torch.zeros(members, 1)) if negative_binomial else None

    @property
    def log_link(self) -> bool:
        """True if the network's output is a log rate."""
        return self.config.likelihood != "gaussian"

    def transform_of(self, member: int) -> str:
        """The transform of a fitted member; where it is ``auto``, the one that was chosen."""
        if self.power is None:
            return self.config.transform
        return "none" if self.power[member] == 1 else "cbrt"

    def _power(self) -> Tensor | int | None:
        """The power that undoes the transform: a number, or each member's own (M, 1). None where it is no root."""
        return POWERS.get(self.config.transform) if self.power is None else self.power.double()

    def _transform(self, counts: Tensor) -> Tensor:
        """*Shape:* (N,) → (1, N), or (M, N) where members differ"""
        if self.log_link or self.config.transform == "log1p":
            return torch.log1p(counts)[None]
        power = self._power()
        return counts[None] if power is None else counts[None].pow(1 / power)

    def fit(self, counts: Tensor, weights: Tensor, power: Tensor | None = None) -> Tensor:
        """Take each member's mean and deviation over its training labels; return the scaled labels (M, N).

        Args:
            counts: (N,), anything where no member trains.
            weights: (M, N) ∈ {0, 1}, the regions that a member trains on.
            power: (M, 1), of ``auto``: the power that undoes each member's transform, 3 or 1.
        """
        if self.power is not None and power is not None:
            self.power.copy_(power)
        value = self._transform(counts.double())
        total = weights.double().sum(dim=1, keepdim=True)
        mean = (weights * value).sum(dim=1, keepdim=True) / total
        variance = (weights * (value - mean).square()).sum(dim=1, keepdim=True) / total
        self.mean.copy_(mean)
        self.scale.copy_(variance.sqrt().clamp(min=1e-6))
        scaled = self.scaled(counts)
        if not self.config.extrapolate:
            own = weights > 0
            self.low.copy_(torch.where(own, scaled, math.inf).amin(dim=1, keepdim=True) - BEYOND)
            self.high.copy_(torch.where(own, scaled, -math.inf).amax(dim=1, keepdim=True) + BEYOND)
        return scaled

    def bounded(self, output: Tensor) -> Tensor:
        """No further beyond the training labels than their spread supports (:data:`BEYOND`), unless the settings say
        ``extrapolate``.

        *Shape:* (M, N) or (M, Q, N) → the same, on the standardised scale
        """
        low, high = (end.view(-1, *(1,) * (output.dim() - 1)) for end in (self.low, self.high))
        return torch.maximum(torch.minimum(output, high), low)

    def scaled(self, counts: Tensor) -> Tensor:
        """*Shape:* (N,) → (M, N)"""
        return (self._transform(counts.double()) - self.mean) / self.scale

    def counts(self, output: Tensor) -> Tensor:
        """Predicted counts, never negative.

        *Shape:* (M, N) → (M, N)
        """
        value = self.bounded(output) * self.scale + self.mean
        if self.log_link:
            return torch.exp(value.clamp(max=MAX_LOG))
        if self.config.transform == "log1p":
            return torch.expm1(value.clamp(max=MAX_LOG)).clamp(min=0)
        value, power = value.clamp(min=0), self._power()
        return value if power is None else value.pow(power.to(value) if isinstance(power, Tensor) else power)

    def loss(self, output: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """Each member's mean loss over its training regions; 0 where there are none of them.

        *Shape:* output (M, N), counts (N,), weights (M, N) → (M,)
        """
        if not self.log_link:
            each = (output - self.scaled(counts).to(output)).square()
        else:
            log_rate = (output * self.scale + self.mean).clamp(max=MAX_LOG)
            counts = counts.to(output)
            if self.log_dispersion is None:
                each = log_rate.exp() - counts * log_rate
            else:  # variance = rate + rate²·e^dispersion
                inverse = torch.exp(-self.log_dispersion)
                rate = log_rate.exp()
                each = (
                    (counts + inverse) * torch.log(rate + inverse)
                    - counts * log_rate
                    - torch.lgamma(counts + inverse)
                    + torch.lgamma(inverse)
                    + inverse * self.log_dispersion
                )
            each = each / self._unit(counts, weights)
        return (each * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def _unit(self, counts: Tensor, weights: Tensor) -> Tensor:
        """Poisson losses grow with the counts; dividing by their mean keeps one learning rate fit for all tasks."""
        if self.config.likelihood == "negative_binomial":
            return torch.ones(len(weights), 1, device=counts.device)
        return ((counts * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)).clamp(min=1)
