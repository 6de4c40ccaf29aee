"""The tree part of a head: extremely randomised trees (Geurts et al., Machine Learning 2006) as operations on tensors.

Every tree is as deep as all others. Where one was not split any further its node goes on to the left, whatever the
feature, and so the way down is the same few steps for every tree and region, in any engine (perfect trees: Nakandala et
al., OSDI 2020).
"""

import torch
from torch import Tensor, nn

from .row_tiles import Rows, in_tiles, take


class Trees(nn.Module):
    """The mean of T trees of depth D, for each of R training sets.

    Node i of a tree leads to 2i + 1 where its feature is at most its threshold, and else to 2i + 2. Features are
    compared as they are, so that neither half precision nor few bits move a region to another leaf.

    *Shape:* (N, F) → (R, N), on the standardised target scale

    Args:
        rows: R.
        trees: T.
        depth: D.
    """

    feature: Tensor
    threshold: Tensor
    value: Tensor

    def __init__(self, *, rows: int, trees: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.register_buffer("feature", torch.zeros(rows, trees, 2**depth - 1, dtype=torch.int64))
        self.register_buffer("threshold", torch.full((rows, trees, 2**depth - 1), torch.inf))
        self.register_buffer("value", torch.zeros(rows, trees, 2**depth))

    def forward(self, x: Tensor) -> Tensor:
        rows, trees, nodes = self.feature.shape
        feature, threshold, value = self.feature.flatten(), self.threshold.flatten(), self.value.flatten()
        tree = torch.arange(rows * trees, device=x.device)

        def tile(regions: Rows) -> tuple[Tensor]:  # R·T numbers a region: 1.7 GB at 100,000 regions
            own = take(x, regions)
            node = torch.zeros(own.shape[0], rows * trees, dtype=torch.int64, device=x.device)
            for _ in range(self.depth):
                place = tree * nodes + node
                above = own.gather(1, _at(feature, place)) > _at(threshold, place)
                node = 2 * node + 1 + above.long()
            leaf = _at(value, tree * (nodes + 1) + node - nodes)  # (t, R·T)
            return (leaf.unflatten(1, (rows, trees)).mean(dim=2),)

        (means,) = in_tiles(x.shape[0], tile)
        return means.t()


def _at(table: Tensor, places: Tensor) -> Tensor:
    """Entries of a table (K,) at places of any shape: ONNX's Gather, where an index would be the slower GatherND."""
    return table.index_select(0, places.flatten()).view_as(places)
