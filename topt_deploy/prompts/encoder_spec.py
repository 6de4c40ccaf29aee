"""The description of a prompt encoder, as JSON: everything the host side needs besides the tokenizer's own file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from topt_deploy.errors import BadData

from .prompt import Family
from .tokens import Chat, Tokens

TEXT, QWEN, MLLAMA, DEEPSEEK = "text", "qwen2_5_vl", "mllama", "deepseek_vl2"
FAMILIES = (TEXT, QWEN, MLLAMA, DEEPSEEK)
CHANNELS, FILTERS = 3, range(6)
"""Of colours, and Pillow's numbers of what resizes."""


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """A frozen model as prompt encoder.

    Attributes:
        family: One of :data:`FAMILIES`.
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
        if self.family == TEXT:
            if self.settings:
                raise TypeError("a model that reads text alone has none")
            return None
        kind = _settings_of(self.family)
        _check_types(kind, self.settings)
        return kind(**self.settings)

    def host(self, tokenizer: bytes) -> Family:
        """Create the object that turns text and images into this model's input.

        Args:
            tokenizer: The bytes of tokenizer.json.
        """
        chat, tokens = Chat(**self.chat), Tokens(tokenizer)
        if self.family == TEXT:
            from topt_deploy.prompts.families.text.host import TextOnly

            return TextOnly(chat, tokens)
        if self.family == QWEN:
            from topt_deploy.prompts.families.qwen2_5_vl.host import Qwen25VL

            return Qwen25VL(self.read_settings(), chat, tokens)
        if self.family == MLLAMA:
            from topt_deploy.prompts.families.mllama.host import Mllama

            return Mllama(self.read_settings(), chat, tokens, Chat(**(self.imageless or self.chat)))
        if self.family == DEEPSEEK:
            from topt_deploy.prompts.families.deepseek_vl2.host import DeepseekVL2

            return DeepseekVL2(self.read_settings(), chat, tokens)
        raise BadData("an encoder of an unknown family", expected=f"one of {', '.join(FAMILIES)}", found=self.family)


def check_image_token(spec: EncoderSpec, tokenizer: bytes) -> None:
    """Refuse an image token that the chat frame does not have: images would be put in no place.

    Raises:
        ValueError: Naming the token.
    """
    token = spec.settings.get("image_token")
    if token is not None and token not in Tokens(tokenizer).ids(Chat(**spec.chat).image).tolist():
        raise ValueError(f"the image token {token} is not the chat frame's")


def _settings_of(family: str) -> Any:
    """A family's class of settings."""
    if family == QWEN:
        from topt_deploy.prompts.families.qwen2_5_vl.host import Qwen25VLSettings

        return Qwen25VLSettings
    if family == MLLAMA:
        from topt_deploy.prompts.families.mllama.host import MllamaSettings

        return MllamaSettings
    if family == DEEPSEEK:
        from topt_deploy.prompts.families.deepseek_vl2.host import DeepseekVL2Settings

        return DeepseekVL2Settings
    raise BadData("an encoder of an unknown family", expected=f"one of {', '.join(FAMILIES)}", found=family)


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
