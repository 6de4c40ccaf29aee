"""The description of a prompt encoder, as JSON: everything the host side needs besides the tokenizer's own file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from topt_deploy.errors import BadData

from .prompt import Family
from .tokens import Chat, Tokens

TEXT, QWEN, MLLAMA, DEEPSEEK = "text", "qwen2_5_vl", "mllama", "deepseek_vl2"
FAMILIES = (TEXT, QWEN, MLLAMA, DEEPSEEK)


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
    """

    family: str
    name: str
    weights_sha256: str
    width: int
    settings: Mapping[str, Any]
    chat: Mapping[str, str]
    imageless: Mapping[str, str] | None = None

    @property
    def identity(self) -> str:
        """The name that prompt columns give for their encoder: the same for every precision and runtime."""
        return f"{self.name} sha256:{self.weights_sha256[:16]}"

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
            from topt_deploy.prompts.families.qwen2_5_vl.host import Qwen25VL, Qwen25VLSettings

            return Qwen25VL(Qwen25VLSettings(**self.settings), chat, tokens)
        if self.family == MLLAMA:
            from topt_deploy.prompts.families.mllama.host import Mllama, MllamaSettings

            return Mllama(MllamaSettings(**self.settings), chat, tokens, Chat(**(self.imageless or self.chat)))
        if self.family == DEEPSEEK:
            from topt_deploy.prompts.families.deepseek_vl2.host import DeepseekVL2, DeepseekVL2Settings

            return DeepseekVL2(DeepseekVL2Settings(**self.settings), chat, tokens)
        raise BadData("an encoder of an unknown family", expected=f"one of {', '.join(FAMILIES)}", found=self.family)
