"""Causal language models that read text alone, for export: one decoder."""

from transformers import PreTrainedConfig

from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.pytorch.checkpoint import Checkpoint
from topt_deploy.tensorrt.profile import ProfileRange

from ..causal_decoder import EMBEDDING, auto_config, canonical, networks

__all__ = ["EMBEDDING", "canonical", "image_profile", "networks", "read_config"]


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The published configuration."""
    return auto_config(checkpoint)


def image_profile(spec: EncoderSpec) -> dict[str, ProfileRange]:
    """Sizes of images' dimensions: there are none."""
    return {}
