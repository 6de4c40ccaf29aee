"""Layers that both stages are built from: standardisation, attention, feed-forward.

Shape letters, here and in the whole package: N regions, V views, D width, H prompt width, M members.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .row_tiles import Matrix, Rows, in_tiles, take


def repeated(x: Tensor, times: Sequence[int], dim: int) -> Tensor:
    """Each entry along ``dim`` as often as ``times`` says. No GPU is waited for: the size is known."""
    return x.repeat_interleave(torch.tensor(times, device=x.device), dim=dim, output_size=sum(times))


def drawn(own: Tensor, most: int, generator: torch.Generator | None = None) -> Tensor:
    """At most so many of these regions (n,), at random and in their order; all, and no random number, if there are no
    more. The numbers are drawn on the CPU."""
    if len(own) <= most:
        return own
    return own[torch.randperm(len(own), generator=generator)[:most].sort().values.to(own.device)]


class Standardize(nn.Module):
    """Subtract a mean and divide by a scale, both fixed from the training city and stored with the weights.

    *Shape:* (..., N, F) → (..., N, F)

    Args:
        features: F.
        limit: What lies further from the mean than this many scales counts as lying there: what a linear map makes of
            one region that is unlike all others stays bounded. 0 is no limit.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, limit: float = 0.0) -> None:
        super().__init__()
        self.limit = limit
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def fit(self, x: Tensor) -> None:
        """Take mean and standard deviation over N from ``x`` (N, F). A constant feature keeps scale 1."""
        x = x.double()
        std = x.std(dim=0, correction=0)
        self.mean.copy_(x.mean(dim=0))
        self.scale.copy_(torch.where(std > 1e-6 * (1 + x.abs().amax(dim=0)), std, torch.ones_like(std)))

    def forward(self, x: Tensor) -> Tensor:
        z = (x - self.mean) / self.scale
        return z.clamp(-self.limit, self.limit) if self.limit else z


def standardized(views: Mapping[str, tuple[Standardize, Tensor]]) -> dict[str, Tensor]:
    """Standardise every view (N, F_v) by its own module, side by side: the fewer nodes, the sooner a graph starts.

    The modules have one limit.
    """
    (limit,) = {own.limit for own, _ in views.values()}
    joint = Standardize(0, limit)
    joint.mean, joint.scale = (torch.cat([getattr(own, end) for own, _ in views.values()]) for end in ("mean", "scale"))
    parts = joint(torch.cat([x for _, x in views.values()], dim=1)).split(
        [x.shape[1] for _, x in views.values()], dim=1
    )
    return dict(zip(views, parts, strict=True))


class Dropout(nn.Module):
    """Dropout whose mask comes from 16 random bits an element: half of the time of PyTorch's on a CPU.

    The rate is rounded to 1/65536, and what is kept is scaled by the rounded rate, so that the mean is exact.

    *Shape:* any → the same

    Attributes:
        streams: Generators, each with how many entries of the leading axis draw from it, as if they were alone; empty
            draws everything from PyTorch's own.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropped = round(rate * 65536)  # of 65536
        self.streams: tuple[tuple[torch.Generator, int], ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return x
        if self.streams:
            parts = x.split([size for _, size in self.streams])
            kept = torch.cat([self._kept(part, stream) for part, (stream, _) in zip(parts, self.streams, strict=True)])
        else:
            kept = self._kept(x)
        return x * kept * (65536 / (65536 - self.dropped))

    def _kept(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        empty = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        if torch.compiler.is_compiling():  # TorchDynamo knows no random_; what it knows starts counting elsewhere
            bits = torch.randint(-(2**63), 2**63 - 1, empty.shape, dtype=torch.int64, device=x.device) ^ -(2**63)
        else:
            bits = empty.random_(-(2**63), None, generator=generator)
        return bits.view(torch.int16)[: x.numel()].view(x.shape) >= self.dropped - 32768


class ByName(nn.Module):
    """Modules by the names of views, tasks or embeddings, which users choose.

    ``nn.ModuleDict`` refuses names such as ``type`` or ``train``, for it makes them attributes.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = tuple(modules)
        self.of = nn.ModuleDict({f"for_{name}": module for name, module in modules.items()})

    def __getitem__(self, name: str) -> nn.Module:
        return self.of[f"for_{name}"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules, in order."""
        return ((name, self[name]) for name in self.names)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the regions, with an optional additive bias on the scores.

    softmax_j(q_i·k_j / √d + B_ij), d = D / heads (ToPT's Graphormer layer; B = 0 is the ordinary form).

    *Shape:* x (N, D), bias (N, N) → (N, D), and what ``read`` makes of the head-averaged attention weights' rows,
    (t, N) → (t, …), for all of them; None without
    """

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)

    def forward(
        self, x: Tensor, bias: Matrix | None = None, read: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        n, width = x.shape
        q, k, v = self.qkv(x).view(n, 3 * self.heads, -1).transpose(0, 1).chunk(3)  # (heads, N, d)
        q, to = q / math.sqrt(width // self.heads), k.transpose(-1, -2)  # once, and not for every tile

        def tile(rows: Rows) -> tuple[Tensor, ...]:
            scores = take(q, rows, 1) @ to  # (heads, t, N)
            if bias is not None:
                scores = scores + bias[rows]
            weights = scores.softmax(dim=-1)
            mixed = (self.dropout(weights) @ v).transpose(0, 1).flatten(1)  # (t, D)
            return (mixed,) if read is None else (mixed, read(weights.mean(dim=0)))

        mixed, *seen = in_tiles(n, tile)
        return self.out(mixed), seen[0] if seen else None


class DeepFc(nn.Sequential):
    """HAFusion's closing layers of a module, after the authors' code: two linear maps, LeakyReLU, a third, LeakyReLU.

    *Shape:* (..., I) → (..., O)
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(inputs, 2 * inputs),
            nn.Linear(2 * inputs, 2 * inputs),
            nn.LeakyReLU(0.3),
            nn.Linear(2 * inputs, outputs),
            nn.LeakyReLU(0.3),
        )


class FeedForward(nn.Module):
    """Residual, layer norm, feed-forward, residual, layer norm: the second half of a post-norm block.

    *Shape:* x (N, D), update (N, D) → (N, D)
    """

    def __init__(self, *, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, inner)
        self.linear2 = nn.Linear(inner, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(update))
        inner = self.dropout(torch.relu(self.linear1(x)))
        out: Tensor = self.norm2(x + self.dropout(self.linear2(inner)))
        return out
