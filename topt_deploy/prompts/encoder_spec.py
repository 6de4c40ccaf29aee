"""The description of a prompt encoder, as JSON: everything the host side needs besides the tokenizer's own file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from .families.registry import host_module
from .prompt import Family
from .tokens import Chat, Tokens

CHANNELS, FILTERS = 3, range(6)
"""Of colours, and Pillow's numbers of what resizes."""


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """A frozen model as prompt encoder.

    Attributes:
        family: One of :data:`topt_deploy.prompts.families.registry.FAMILIES`.
        name: The model's own name.
        weights_sha256: Of its weight files: what tells two models of one name apart.
        width: H, of a prompt vector.
        settings: The family's preprocessing (its settings class, as a dictionary).
        chat: The model's chat frame; ``imageless`` where it is another one without images.
        context: Tokens that the model was made for, at most; None in bundles from before this was recorded.
    """

    family: str
    name: str
    weights_sha256: str
    width: int
    settings: Mapping[str, Any]
    chat: Mapping[str, str]
    imageless: Mapping[str, str] | None = None
    context: int | None = None

    @property
    def identity(self) -> str:
        """The name that prompt columns give for their encoder: the same for every precision and runtime."""
        return f"{self.name} sha256:{self.weights_sha256[:16]}"

    def read_settings(self) -> Any:
        """The settings as the family's class has them; None of a family without images.

        Raises:
            TypeError: If one is missing, unknown, or of another type.
            BadConfig: If they exclude each other.
        """
        kind = host_module(self.family).SETTINGS
        if kind is None:
            if self.settings:
                raise TypeError("a model that reads text alone has none")
            return None
        _check_types(kind, self.settings)
        return kind(**self.settings)

    def host(self, tokenizer: bytes) -> Family:
        """Create the object that turns text and images into this model's input.

        Args:
            tokenizer: The bytes of tokenizer.json.
        """
        return host_module(self.family).make_host(self, Chat(**self.chat), Tokens(tokenizer))


def check_image_token(spec: EncoderSpec, tokenizer: bytes) -> None:
    """Refuse an image token that the chat frame does not have: images would be put in no place.

    Raises:
        ValueError: Naming the token.
    """
    token = spec.settings.get("image_token")
    if token is not None and token not in Tokens(tokenizer).ids(Chat(**spec.chat).image).tolist():
        raise ValueError(f"the image token {token} is not the chat frame's")


def _check_types(kind: Any, settings: Mapping[str, Any]) -> None:
    """Refuse settings that are not of the types that their class says, bytes' filters and channels among them."""

    def fits(value: Any, hint: Any) -> bool:
        if hint is int:
            return type(value) is int
        if hint is float:
            return type(value) in (int, float)
        (inner,) = get_args(hint)
        return isinstance(value, list | tuple) and len(value) > 0 and all(fits(item, inner) for item in value)

    for name, hint in get_type_hints(kind).items():
        if name not in settings:
            raise TypeError(f"{name!r} is absent")
        value = settings[name]
        if not fits(value, hint):
            raise TypeError(f"{name!r} is not of the right type")
        if name in ("mean", "std") and len(value) != CHANNELS:
            raise TypeError(f"{name!r} has not {CHANNELS} numbers")
        if name == "resample" and value not in FILTERS:
            raise TypeError(f"{name!r} is no filter")
        if name == "resolutions" and not all(len(size) == 2 for size in value):
            raise TypeError(f"{name!r} are no widths and heights")
