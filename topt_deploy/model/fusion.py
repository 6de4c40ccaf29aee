"""Multi-view learning and inter-view fusion: the first half of stage 1 (HAFusion, ICDE 2024, sections IV-A, IV-B)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from topt_deploy.config.settings import SrelConfig

from .layers import DeepFc, Dropout, FeedForward, SelfAttention, Standardize


class _PooledScores(torch.autograd.Function):
    """p_ic = Σ_j w_cij s_ij with w = softmax_j(a_c s_ij), with a backward of three small products instead of four
    passes over c×N×N numbers: ∂p_ic/∂s_ij = w_cij (1 + a_c (s_ij − p_ic)), ∂p_ic/∂a_c = Σ_j w_cij s_ij² − p_ic².

    *Shape:* a (c), s (t, N) → p (t, c)
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, s: Tensor) -> Tensor:
        w = (a[None, :, None] * s[:, None, :]).softmax(dim=-1)  # (t, c, N)
        p = torch.bmm(w, s[:, :, None])[..., 0]
        ctx.save_for_backward(a, s, w, p)
        return p

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (g,) = gradients  # (t, c)
        a, s, w, p = ctx.saved_tensors
        both = torch.bmm(torch.stack([g * (1 - a * p), g * a], dim=1), w)  # (t, 2, N)
        second = torch.bmm(w, s.square()[:, :, None])[..., 0]  # Σ_j w s²
        return (g * (second - p.square())).sum(dim=0), both[:, 0] + both[:, 1] * s


class ScoreFeature(nn.Module):
    """A feature computed from a region's row of the attention map.

    Every score s_ij is expanded to c channels a_c·s_ij + b_c, pooled over j with its own softmax weights and
    projected to D. Softmax ignores b_c, so the pooled value is a_c·Σ_j softmax_j(a_c s_ij) s_ij + b_c.

    *Shape:* rows of scores (t, N) → (t, D)
    """

    def __init__(self, *, width: int, channels: int) -> None:
        super().__init__()
        # As a 1×1 convolution from one channel starts: uniform in ±1/√1.
        self.scale = nn.Parameter(torch.empty(channels).uniform_(-1, 1))
        self.shift = nn.Parameter(torch.empty(channels).uniform_(-1, 1))
        self.proj = nn.Linear(channels, width)

    def forward(self, scores: Tensor) -> Tensor:
        if torch.is_autocast_enabled(scores.device.type):  # _PooledScores' gradient is of one kind of numbers
            with torch.autocast(scores.device.type, enabled=False):
                pooled = _PooledScores.apply(self.scale, scores.float())
        else:
            pooled = _PooledScores.apply(self.scale, scores)
        out: Tensor = self.proj(self.scale * pooled + self.shift)
        return out


class IntraViewBlock(nn.Module):
    """A self-attention block whose output also sees its own attention map (:class:`ScoreFeature`).

    *Shape:* (N, D) → (N, D)
    """

    def __init__(self, config: SrelConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(width=config.width, heads=config.heads, dropout=config.dropout)
        self.score_feature = ScoreFeature(width=config.width, channels=config.channels)
        self.feed_forward = FeedForward(width=config.width, inner=config.ffn_width, dropout=config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        mixed, feature = self.attention(x, read=self.score_feature)
        out: Tensor = self.feed_forward(x, mixed + feature)
        return out


class ViewEncoder(nn.Module):
    """One view: standardised, projected to the width, through the intra-view blocks and, with ``deep_fc``, a
    :class:`.layers.DeepFc`.

    *Shape:* (N, F) → (N, D)
    """

    def __init__(self, *, features: int, config: SrelConfig) -> None:
        super().__init__()
        self.standardize = Standardize(features)
        self.proj = nn.Linear(features, config.width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(IntraViewBlock(config) for _ in range(config.intra_blocks))
        if config.deep_fc:
            self.blocks.append(DeepFc(config.width, config.width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.relu(self.proj(self.standardize(x))))
        for block in self.blocks:
            x = block(x)
        return x


class ExternalAttention(nn.Module):
    """Attention of a region's views to a memory of d_m slots that all regions share, doubly normalised.

    Softmax over the views, then each view's weights sum to one over the slots.

    *Shape:* (N, V, D) → (N, V, D)
    """

    def __init__(self, *, width: int, memory: int) -> None:
        super().__init__()
        self.keys = nn.Linear(width, memory, bias=False)
        self.values = nn.Linear(memory, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.keys(x).softmax(dim=1)  # over V
        weights = weights / weights.sum(dim=2, keepdim=True)  # over the slots
        out: Tensor = self.values(weights)
        return out


class ViewFusion(nn.Module):
    """Mix every view with what it takes from the others, weigh the views, and add them up to H̃.

    The view weights come from an attentive score between pairs of views, averaged over the second view and over
    the regions, and softmaxed: one weight per view and city.

    With ``deep_fc``, what the views take from each other goes through a :class:`.layers.DeepFc`, and the external
    attention starts from N(0, 0.001²), as in HAFusion's code.

    *Shape:* (N, V, D) → (N, D), and the view weights (V,)
    """

    def __init__(self, config: SrelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ExternalAttention(width=config.width, memory=config.memory) for _ in range(config.inter_blocks)
        )
        self.mix_own = nn.Parameter(torch.tensor(0.1))
        self.mix_others = nn.Parameter(torch.tensor(0.9))
        self.score = nn.Linear(config.width, config.view_width, bias=False)
        self.score_from = nn.Linear(config.view_width, 1)
        self.score_to = nn.Linear(config.view_width, 1)
        if config.deep_fc:
            for weight in self.blocks.parameters():
                nn.init.normal_(weight, std=1e-3)
            self.blocks.append(DeepFc(config.width, config.width))

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        others = views
        for block in self.blocks:
            others = block(others)
        mixed = (self.mix_own * views + self.mix_others * others) / (self.mix_own + self.mix_others)
        score = self.score(mixed)  # (N, V, d')
        pairs = self.score_from(score) + self.score_to(score).transpose(1, 2)  # (N, V, V)
        weights = F.leaky_relu(pairs, 0.3).mean(dim=(0, 2), keepdim=True).softmax(dim=1)  # (1, V, 1): TensorRT has no
        return (weights * mixed).sum(dim=1), weights.flatten()  # softmax of a vector
