"""A region's text as token ids: the model's chat frame around it, and the model's own tokenizer, without jinja."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topt_deploy.errors import BadBundle, BadData, OutOfMemory
from topt_deploy.no_memory import rust_at_work

Array = np.ndarray[Any, Any]
NO_MEMORY = ("memory allocation", "TextInputSequence must be str", "PyObject pointer is null")
"""The library's words where it has no memory for a regular expression, for a copy of the text, or for its answer."""


@dataclass(frozen=True)
class Chat:
    """A model's chat frame, split once out of its chat template.

    Attributes:
        before: The text before the user's own words and images, with the BOS token where the model has one.
        image: The text that stands for one image.
        after: The text after the user's words, up to where the answer would begin.
    """

    before: str
    image: str
    after: str

    def text(self, geo_text: str, images: int, question: str) -> str:
        """One task's whole input, images first; an empty geo-text or question leaves no empty line behind."""
        return self.before + self.image * images + "\n".join(filter(None, (geo_text, question))) + self.after


class Tokens:
    """A tokenizer as its file says, without what the file adds around a text, cuts off, or fills up.

    Args:
        tokenizer_json: The bytes of the model's tokenizer.json.

    Attributes:
        special: The control tokens, such as those of the chat frame.

    Raises:
        BadData: If the bytes are no tokenizer.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        from tokenizers import Tokenizer

        try:
            with rust_at_work():  # a bundle's was read by another process first, which may end as it likes
                self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except BaseException as error:  # the library raises bare exceptions
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            if _found_no_memory(error):
                raise OutOfMemory("tokenizer.json") from error
            raise BadData(f"not a tokenizer ({error})", file="tokenizer.json", fix="fetch the model again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = {number: token.content for number, token in added.items() if token.special}
        self.special = frozenset(self._control.values())

    def ids(self, text: str) -> Array:
        """Token ids, int64 (n,)."""
        try:
            with rust_at_work():
                return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        except BaseException as error:
            if _found_no_memory(error):
                raise OutOfMemory("tokenizer.json") from error
            if not _is_panic(error):
                raise
            raise BadBundle(
                f"the tokenizer fails ({error})", file="tokenizer.json", fix="export the encoder again"
            ) from error

    def id(self, token: str) -> int:
        """The id of one token.

        Raises:
            BadData: If the tokenizer has no such token.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise BadData(f"no token {token!r}", file="tokenizer.json", fix="take the tokenizer of this very model")
        return int(found)

    def refuse_control(self, text: str, what: str) -> None:
        """Refuse text that would end the user's turn or stand for an image.

        Args:
            text: Text from a table or a template.
            what: Its name in the error.

        Raises:
            BadData: If it holds a control token, as it stands or after the tokenizer's own normalisation.
        """
        found = {token for token in self.special if token in text}
        found |= {self._control[number] for number in self.ids(text).tolist() if number in self._control}
        if found:
            raise BadData(
                f"{what} contains a control token of the language model",
                expected="plain text",
                found=", ".join(map(repr, sorted(found))),
                fix="remove it, or write it apart, such as '< |' for '<|'",
            )


def _is_panic(error: BaseException) -> bool:
    """Tell if it is a panic of Rust's code, which is no :class:`Exception` to Python."""
    return type(error).__name__ == "PanicException"


def _found_no_memory(error: BaseException) -> bool:
    """Tell if what the library raised is about memory (:data:`NO_MEMORY`)."""
    return isinstance(error, MemoryError) or any(told in str(error) for told in NO_MEMORY)


def task_ids(chat: Chat, tokens: Tokens, text: str, images: int, questions: Sequence[str]) -> list[Array]:
    """The token ids, int64 (n,), of every task's whole input; image tokens as they stand in the frame.

    Raises:
        BadData: If text or a question contains a control token.
    """
    tokens.refuse_control(text, "geo-text")
    for question in questions:
        tokens.refuse_control(question, "a task's question")
    return [tokens.ids(chat.text(text, images, question)) for question in questions]
