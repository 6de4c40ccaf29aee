"""How each model family is taken apart for export: a module of its name, which has what :class:`FamilyExport` says."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from topt_deploy.prompts.encoder_spec import EncoderSpec
    from topt_deploy.prompts.pytorch.checkpoint import Checkpoint
    from topt_deploy.tensorrt.profile import ProfileRange

    from ..pieces import Network


class FamilyExport(Protocol):
    """A module of this package.

    Attributes:
        EMBEDDING: Name of the token embeddings.
    """

    EMBEDDING: str

    def read_config(self, checkpoint: "Checkpoint") -> Any:
        """Read the published configuration."""

    def networks(self, config: Any) -> "tuple[Network, ...]":
        """Describe the networks, the decoder last."""

    def canonical(self, name: str) -> str:
        """Translate a weight's name in the files to the export's."""

    def image_profile(self, spec: "EncoderSpec") -> "dict[str, ProfileRange]":
        """Choose the sizes of images' dimensions that engines are made for."""


def family_export(family: str) -> FamilyExport:
    """The module of a family (:data:`topt_deploy.prompts.families.registry.FAMILIES`)."""
    return cast(FamilyExport, import_module(f".{family}", __package__))
