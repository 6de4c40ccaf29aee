"""The network part of a head: a small residual network over all views, an ensemble of M as one batch.

Flows have been averaged into the views already (topt_deploy.features.flow_features), so a region needs no other region
to be predicted: a graph network's reach at a perceptron's price (SIGN, Frasca et al. 2020).
"""

import torch
from torch import Tensor, nn

from ..config import EnsembleConfig
from .layers import Dropout, Standardize
from .prompt4re import MemberLinear

SKIP_SCALE = 0.1
"""The direct linear path starts this much smaller than a layer would, for it sees every feature at once."""


class Network(nn.Module):
    """h = relu(W₀x), then residual layers h + relu(W h), then a linear map of h and of x itself.

    *Shape:* (N, F) → (M, N), on the standardised target scale
    """

    def __init__(self, *, members: int, inputs: int, config: EnsembleConfig) -> None:
        super().__init__()
        self.standardize = Standardize(inputs)
        self.members = members
        self.first = MemberLinear(members, inputs, config.width)
        self.layers = nn.ModuleList(MemberLinear(members, config.width, config.width) for _ in range(config.layers))
        self.out = MemberLinear(members, config.width, 1)
        self.skip = MemberLinear(members, inputs, 1)
        with torch.no_grad():
            self.skip.weight.mul_(SKIP_SCALE)
        self.input_dropout = Dropout(config.input_dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.standardize(x)[None]
        if self.training:
            x = self.input_dropout(x.expand(self.members, -1, -1))  # every member drops features of its own
        h = torch.relu(self.first(x))
        for layer in self.layers:
            h = h + torch.relu(layer(self.dropout(h)))
        out: Tensor = (self.out(h) + self.skip(x)).squeeze(-1)
        return out
