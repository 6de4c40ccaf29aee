"""The model families, and where the parts of each are. This is the one place that lists them.

A family NAME is a folder ``topt_deploy/prompts/families/NAME`` with ``host.py`` (how it reads a prompt, without
PyTorch) and ``pytorch`` (its networks), a module ``export/prompts/families/NAME.py`` (how it is taken apart for
export), and an entry in :data:`FAMILIES`. The protocols below say what these modules have. A family whose models come
as a graph has ``host.py`` alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from topt_deploy.errors import BadData

if TYPE_CHECKING:
    from topt_deploy.prompts.encoder_spec import EncoderSpec
    from topt_deploy.prompts.pooling import Backend
    from topt_deploy.prompts.prompt import Family
    from topt_deploy.prompts.tokens import Chat, Tokens


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A family of models.

    Attributes:
        model_type: Of the published config.json; None for every causal language model that transformers knows.
        images: True if its models read images.
        hidden_size: Keys of config.json that lead to the width, for models that transformers does not know.
        imageless_frame: True if the chat frame without images is another one; False if it must be the same; None if
            that is of no importance.
    """

    model_type: str | None
    images: bool
    hidden_size: tuple[str, ...] | None = None
    imageless_frame: bool | None = None


FAMILIES: Mapping[str, ModelFamily] = {
    "text": ModelFamily(model_type=None, images=False),
    "exported_text": ModelFamily(model_type=None, images=False),
    "qwen2_5_vl": ModelFamily(model_type="qwen2_5_vl", images=True, imageless_frame=False),
    "mllama": ModelFamily(model_type="mllama", images=True, imageless_frame=True),
    "deepseek_vl2": ModelFamily(
        model_type="deepseek_vl_v2", images=True, hidden_size=("language_config", "hidden_size")
    ),
}
"""By the name that a bundle's manifest gives."""
TEXT = "text"
"""The family of models that read text alone."""
EXPORTED_TEXT = "exported_text"
"""The family of text encoders that come as a graph of ONNX, which is run as it is: there are no networks to trace."""


class HostModule(Protocol):
    """``host.py`` of a family.

    Attributes:
        SETTINGS: The class of its image settings, with ``from_config(config, preprocessor)``; None without images.
        CHAT: The chat frame, where the published files have none; None where they have.
    """

    SETTINGS: Any
    CHAT: "Chat | None"

    def make_host(self, spec: "EncoderSpec", chat: "Chat", tokens: "Tokens") -> "Family":
        """Create the object that turns text and images into the networks' input."""


class PyTorchModule(Protocol):
    """``pytorch`` of a family."""

    def make_backend(self, checkpoint: Any, dtype: Any, device: str) -> "Backend":
        """Load a checkpoint (:class:`topt_deploy.prompts.pytorch.checkpoint.Checkpoint`) as a backend.

        Args:
            checkpoint: The model's files.
            dtype: PyTorch's type that it computes in.
            device: "cpu" or "cuda".
        """


def host_module(family: str) -> HostModule:
    """How a family reads a prompt.

    Raises:
        BadData: If there is no such family.
    """
    if family not in FAMILIES:
        raise BadData("an encoder of an unknown family", expected=f"one of {', '.join(FAMILIES)}", found=family)
    return cast(HostModule, import_module(f"topt_deploy.prompts.families.{family}.host"))


def pytorch_module(family: str) -> PyTorchModule:
    """How PyTorch runs a family; importing it needs PyTorch."""
    return cast(PyTorchModule, import_module(f"topt_deploy.prompts.families.{family}.pytorch"))
