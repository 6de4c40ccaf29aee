"""Two operators that stay whole through the tracing: a linear map without its weight, and attention.

What each becomes in ONNX depends on precision and target, and is decided when a graph is assembled. In PyTorch
:func:`attention` computes, so that a piece of a network can be checked before any ONNX exists.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DOMAIN = "topt"
LINEAR, ATTENTION = "Linear", "Attention"


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scaled dot-product attention with shared key heads, softmax(scale · q kᵀ) v.

    Args:
        query: (B, G·K, S, D).
        key: (B, K, L, D).
        value: (B, K, L, E).
        mask: bool (B, 1, S, L): where a query may look. A query that may look nowhere gets anything
            finite. None allows everything.
        scale: Of the products.

    Returns:
        (B, G·K, S, E).
    """
    if torch.compiler.is_exporting():
        inputs = (query, key, value) if mask is None else (query, key, value, mask)
        shape = (*query.shape[:3], value.shape[3])
        attributes: dict[str, Any] = {
            "scale": scale, "queries": query.shape[1], "keys": key.shape[1], "width": query.shape[3],
        }  # fmt: skip
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{ATTENTION}", inputs, attributes, dtype=query.dtype, shape=shape, version=1
        )
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)


class Slot(nn.Module):
    """Stands for an :class:`~torch.nn.Linear` while a piece is traced: the map of that name, without its weight."""

    def __init__(self, layer: nn.Linear, name: str) -> None:
        super().__init__()
        self.out_features = layer.out_features
        self.attributes: dict[str, Any] = {"slot": name, "bias": int(layer.bias is not None)}

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        shape = (*x.shape[:-1], self.out_features)
        attributes = self.attributes | {"rank": x.dim()}
        return torch.onnx.ops.symbolic(f"{DOMAIN}::{LINEAR}", (x,), attributes, dtype=x.dtype, shape=shape, version=1)


def transformers_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: object
) -> tuple[Tensor, None]:
    """:func:`attention` in the form of transformers' attention interface."""
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    out = attention(query, key, value, mask, float(scale))  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None
