"""Qwen2.5-VL as a backend: transformers' own vision tower and decoder."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from topt_deploy.prompts.prompt import Array
from topt_deploy.prompts.pytorch.causal_backend import TorchBackend
from topt_deploy.prompts.pytorch.checkpoint import Checkpoint, from_pretrained


class QwenBackend(TorchBackend):
    """Runs the two halves of the model.

    Args:
        model: transformers' base model, without a language-model head.
    """

    def __init__(self, model: Qwen2_5_VLModel) -> None:
        super().__init__(model.language_model.embed_tokens, model.language_model)
        self.visual = model.visual

    @torch.inference_mode()
    def vision(self, image: Mapping[str, Array]) -> Tensor:
        """One image's token embeddings (M, H); transformers finds its windows itself."""
        rows, columns = image["positions"].max(axis=(0, 1)) + 1
        grid = torch.tensor([[1, rows, columns]], device=self.device)
        features: Tensor = self.visual(self.tensor(image["pixel_values"]).flatten(0, 1), grid_thw=grid).pooler_output
        return features


def make_backend(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> QwenBackend:
    """Load a model (:class:`topt_deploy.prompts.families.registry.PyTorchModule`)."""
    # The base class alone does not know every name that its vision weights have had.
    return QwenBackend(from_pretrained(Qwen2_5_VLForConditionalGeneration, checkpoint, dtype).model.to(device))
