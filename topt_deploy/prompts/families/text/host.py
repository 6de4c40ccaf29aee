"""Causal models that read text alone, such as Llama or SmolLM2."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from topt_deploy.errors import BadData
from topt_deploy.prompts.encoder_spec import EncoderSpec
from topt_deploy.prompts.prompt import Array, Prompt, TokenSequence
from topt_deploy.prompts.tokens import Chat, Tokens, task_ids


@dataclass(frozen=True, eq=False)
class TextOnly:
    """A family without images: one position axis, counting from 0.

    Attributes:
        chat: The model's chat frame.
        tokens: Its tokenizer.
    """

    chat: Chat
    tokens: Tokens

    def prompt(self, text: str, images: Sequence[Array], questions: Sequence[str]) -> Prompt:
        """Build one region's prompt (:class:`topt_deploy.prompts.prompt.Family`)."""
        if images:
            raise BadData(
                "this language model reads no images",
                expected="text alone",
                found=f"{len(images)} images",
                fix="take a vision-language model, or leave the images out of the table",
            )
        ids = task_ids(self.chat, self.tokens, text, 0, questions)
        return Prompt(sequences=tuple(TokenSequence(ids=i, positions=np.arange(len(i))[None]) for i in ids))


SETTINGS = CHAT = None


def make_host(spec: EncoderSpec, chat: Chat, tokens: Tokens) -> TextOnly:
    """The host side of a model (:class:`topt_deploy.prompts.families.registry.HostModule`)."""
    return TextOnly(chat, tokens)
