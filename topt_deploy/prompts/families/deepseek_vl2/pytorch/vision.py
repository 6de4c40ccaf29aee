"""DeepSeek-VL2's vision tower (SigLIP) and projector in PyTorch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .config import DeepseekVL2Config, VisionConfig


class PatchEmbedding(nn.Module):
    """Patches of tiles with their positions: the tower's first layer, a convolution written as a linear map."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch, self.side = config.patch, config.side
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(3 * config.patch**2, config.width)})
        self.pos_embed = nn.Parameter(torch.empty(1, config.side**2, config.width))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, height, width) to (N, side², C); pixels beyond the last whole patch are left out."""
        p, side = self.patch, self.side
        x = pixels[:, :, : side * p, : side * p].reshape(-1, 3, side, p, side, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, side**2, 3 * p**2)
        return self.patch_embed["proj"](x) + self.pos_embed


class VisionAttention(nn.Module):
    """Self-attention of SigLIP with query, key and value in one map, as timm has it."""

    is_causal = False

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, P, C) to the same."""
        n, p, _ = hidden.shape
        q, k, v = self.qkv(hidden).reshape(n, p, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS[self.config.attention]
        out, _ = attend(self, q, k, v, None, scaling=q.shape[-1] ** -0.5)
        return self.proj(out.reshape(n, p, -1))


class VisionMLP(nn.Module):
    """The two maps of a SigLIP block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.inner)
        self.fc2 = nn.Linear(config.inner, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, P, C) to the same."""
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


class VisionBlock(nn.Module):
    """One block of the tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1, self.attn = vision_norm(config), VisionAttention(config)
        self.norm2, self.mlp = vision_norm(config), VisionMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, P, C) to the same."""
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


def vision_norm(config: VisionConfig) -> nn.LayerNorm:
    """The tower's norm."""
    return nn.LayerNorm(config.width, eps=1e-6)


class VisionTower(PatchEmbedding):
    """SigLIP without its pooling head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.norm = vision_norm(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, height, width) to (N, side², C)."""
        hidden = super().forward(pixels)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)


class Projector(nn.Module):
    """Neighbouring patches put together, and mapped to the language model's width."""

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__()
        self.ratio, self.side = config.projector.ratio, config.vision.side
        inner = config.projector.inner
        layers: list[nn.Module] = [nn.Linear(config.vision.width * self.ratio**2, inner)]
        for _ in range(1, config.projector.depth - 1):
            layers += [nn.GELU(), nn.Linear(inner, inner)]
        self.layers = nn.Sequential(*layers, nn.GELU(), nn.Linear(inner, config.language.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, side², C) to (N, ⌈side / ratio⌉², H)."""
        r, rows = self.ratio, -(-self.side // self.ratio)
        x = hidden.reshape(-1, self.side, self.side, hidden.shape[-1])
        x = F.pad(x, (0, 0, 0, rows * r - self.side, 0, rows * r - self.side))
        x = x.reshape(-1, rows, r, rows, r, hidden.shape[-1]).permute(0, 1, 3, 5, 2, 4)
        return self.layers(x.reshape(-1, rows**2, hidden.shape[-1] * r**2))


def arrange(features: Tensor, layout: Tensor, newline: Tensor, separator: Tensor) -> Tensor:
    """Token embeddings in their order.

    Args:
        features: (N, t, H), of tiles.
        layout: int64 (m,): 0 for the end of a line, 1 for the border between views, 2 + i for token i of all tiles.
        newline, separator: (H,).

    Returns:
        (m, H).
    """
    table = torch.cat((newline[None], separator[None], features.flatten(0, 1)))
    return table.index_select(0, layout)
