"""DeepSeek-VL2 in PyTorch."""

import torch

from topt_deploy.prompts.pytorch.checkpoint import Checkpoint

from .model import DeepseekBackend, DeepseekVL2Model


def make_backend(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> DeepseekBackend:
    """Load a model (:class:`topt_deploy.prompts.families.registry.PyTorchModule`)."""
    return DeepseekBackend(DeepseekVL2Model.load(checkpoint.path, dtype, device))
