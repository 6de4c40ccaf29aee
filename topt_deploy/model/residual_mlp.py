"""The network part of a head: a small residual network over all views, an ensemble of M as one batch.

Flows have been averaged into the views already (topt_deploy.data.features.flow_features), so a region needs no other
region to be predicted: a graph network's reach at a perceptron's price (SIGN, Frasca et al. 2020).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from topt_deploy.config.settings import EnsembleConfig

from .layers import Dropout, Standardize
from .prompt4re import MemberLinear

SKIP_SCALE = 0.1
"""The direct linear path starts this much smaller than a layer would, for it sees every feature at once."""


class ResidualMlp(nn.Module):
    """h = relu(W₀x), then residual layers h + relu(W h), then a linear map of h and of x itself.

    *Shape:* (N, F) → (M, N), on the standardised target scale
    """

    def __init__(self, *, members: int, inputs: int, config: EnsembleConfig) -> None:
        super().__init__()
        self.standardize = Standardize(inputs, config.clip)
        self.members = members
        self.first = MemberLinear(members, inputs, config.width)
        self.layers = nn.ModuleList(MemberLinear(members, config.width, config.width) for _ in range(config.layers))
        self.out = MemberLinear(members, config.width, 1)
        self.skip = MemberLinear(members, inputs, 1)
        with torch.no_grad():
            self.skip.weight.mul_(SKIP_SCALE)
        self.input_dropout = Dropout(config.input_dropout)
        self.dropout = Dropout(config.dropout)

    @classmethod
    def joined(cls, networks: Sequence["ResidualMlp"], config: EnsembleConfig) -> "ResidualMlp":
        """The members of several networks of the same inputs, in order, as one batch."""
        states = [network.state_dict() for network in networks]
        inputs = len(networks[0].standardize.mean)
        joint = cls(members=sum(network.members for network in networks), inputs=inputs, config=config)
        members = {name: torch.cat([state[name] for state in states]) for name in dict(joint.named_parameters())}
        joint.load_state_dict(states[0] | members)
        return joint

    def draw_from(self, generators: Sequence[torch.Generator], members: Sequence[int]) -> None:
        """Have so many members each draw what they drop from generators of their own."""
        for dropout in (self.input_dropout, self.dropout):
            dropout.streams = tuple(zip(generators, members, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.standardize(x)[None]
        if self.training:
            x = self.input_dropout(x.expand(self.members, -1, -1))  # every member drops features of its own
        h = torch.relu(self.first(x))
        for layer in self.layers:
            h = h + torch.relu(layer(self.dropout(h)))
        out: Tensor = (self.out(h) + self.skip(x)).squeeze(-1)
        return out
