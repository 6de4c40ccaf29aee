"""Llama-3.2-Vision (mllama) as a backend: transformers' own vision network and decoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MllamaModel

from topt_deploy.prompts.prompt import Array
from topt_deploy.prompts.pytorch.causal_backend import TorchBackend
from topt_deploy.prompts.pytorch.checkpoint import Checkpoint, from_pretrained


class MllamaBackend(TorchBackend):
    """Runs the two halves of the model.

    Args:
        model: transformers' base model, without a language-model head.
    """

    def __init__(self, model: MllamaModel) -> None:
        super().__init__(model.language_model.embed_tokens, model.language_model)
        self.visual, self.projector, self.text = model.vision_model, model.multi_modal_projector, model.language_model

    @torch.inference_mode()
    def vision(self, image: Mapping[str, Array]) -> Tensor:
        """One image's cross-attention states (max_num_tiles · patches, H): its tiles', and fillers'."""
        pixels = self.tensor(image["pixel_values"])
        most, valid = self.visual.max_num_tiles, len(pixels)
        states = self.visual(
            pixel_values=F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, most - valid))[None, None],
            aspect_ratio_ids=torch.tensor(image["aspect_ratio_id"][None], device=self.device),
            aspect_ratio_mask=(torch.arange(most, device=self.device) < valid)[None, None],
        ).last_hidden_state
        projected: Tensor = self.projector(states)
        return projected.flatten(0, 3)

    @torch.inference_mode()
    def start(self, features: Sequence[Tensor], batch: int) -> Any:
        """A cache that holds the images' keys and values alone; without images transformers skips these layers."""
        cache = super().start(features, batch)
        if not features:
            return cache
        states = self.join(features).to(self.dtype)[None]
        for i in self.text.cross_attention_layers:
            layer: Any = self.text.layers[i].cross_attn
            keys, values = (self._heads(part(states), layer) for part in (layer.k_proj, layer.v_proj))
            cache.update(layer.k_norm(keys), values, i)
        return cache

    def besides(self, visible: Array | None) -> dict[str, Any]:
        """Additional inputs of the cross-attention layers, about the tokens."""
        mask, seeing = see(torch.tensor(visible, device=self.device), self.visual.num_patches)
        weights = torch.zeros(mask.shape, dtype=self.dtype, device=self.device)
        return {
            "cross_attention_mask": weights.masked_fill(~mask, torch.finfo(self.dtype).min),
            "full_text_row_masked_out_mask": seeing[:, None].to(self.dtype),
        }

    @staticmethod
    def _heads(states: Tensor, layer: nn.Module) -> Tensor:
        """(1, L, K · D) to (1, K, L, D)."""
        return states.unflatten(-1, (layer.num_key_value_heads, layer.head_dim)).transpose(1, 2)


def see(visible: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """Attention masks of S tokens over the L states of the images, ``states`` of them per tile.

    A token that sees nothing attends to everything, and is left out of the layer's feed-forward part: that is how
    transformers computes it.

    Args:
        visible: bool (B, S, tiles).
        states: Per tile.

    Returns:
        Where attention may look, bool (B, 1, S, L); and which tokens see anything, bool (B, S, 1).
    """
    seeing = visible.any(dim=-1, keepdim=True)
    mask = (visible | ~seeing)[..., None].expand(-1, -1, -1, states).flatten(2)
    return mask[:, None], seeing


def make_backend(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> MllamaBackend:
    """Load a model (:class:`topt_deploy.prompts.families.registry.PyTorchModule`)."""
    return MllamaBackend(from_pretrained(MllamaModel, checkpoint, dtype).to(device))
