"""The literal strings of a model's chat frame, split once out of its jinja chat template."""

import json
from pathlib import Path
from typing import Any

from topt_deploy.errors import BadConfig
from topt_deploy.prompts.tokens import Chat

FROZEN = (
    "{% macro strftime_now(form) %}{{ form | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%Y', '2024') | replace('%A', 'Friday') }}{% endmacro %}"
)
"""Templates that name the day get this one, which is the published Llama templates' own: a day changes vectors."""
_WORDS = "What the user says."


def chat_frames(folder: Path, *, images: bool) -> tuple[Chat, Chat]:
    """The frame around images and text, and the one around text alone.

    Args:
        folder: Of the model, with its tokenizer and chat template.
        images: True if the model reads any; if not, both frames are that of text.

    Raises:
        BadConfig: If the template does more than to put strings around, or a vision-language model has none.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    template = _older_template(folder) or (tokenizer.chat_template and tokenizer.get_chat_template())
    if template is None:
        if images:
            raise BadConfig(
                "the model has no chat template", file=folder, expected="chat_template.jinja, or one in its JSON files"
            )
        start = tokenizer.bos_token if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""
        plain = Chat(before=start, image="", after="")
        return plain, plain

    def render(count: int, words: str) -> str:
        parts: Any = [{"type": "image"}] * count + [{"type": "text", "text": words}]
        try:
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": parts if images else words}],
                chat_template=FROZEN + template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # jinja's own, and whatever the template makes of an unforeseen message
            raise BadConfig(f"the chat template takes no such message ({error})", file=folder) from error
        return str(rendered)

    before, after = _split(render(0, _WORDS), folder)
    imageless = chat = Chat(before=before, image="", after=after)
    if images:
        (one, after), (two, _) = (_split(render(count, _WORDS), folder) for count in (1, 2))
        image = two.removeprefix(one)
        chat = Chat(before=one.removesuffix(image), image=image, after=after)
    for count in (0, 1, 2, 3) if images else (0,):
        frame = chat if count else imageless
        if frame.text(f"{_WORDS}\n{_WORDS}", count, _WORDS) != render(count, f"{_WORDS}\n{_WORDS}\n{_WORDS}"):
            raise BadConfig(
                "the chat template does not put the same strings around every message",
                file=folder,
                expected="the same text before, after and for each image",
                found=f"another with {count} images",
            )
    return chat, imageless


def own_frame(folder: Path) -> Chat:
    """The frame of a text encoder: its chat template's if it has one, else what its tokenizer puts around a text.

    Raises:
        BadConfig: As :func:`chat_frames` does.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template or _older_template(folder):
        return chat_frames(folder, images=False)[0]
    around = tokenizer(_WORDS, return_special_tokens_mask=True)
    words = [position for position, special in enumerate(around["special_tokens_mask"]) if not special]
    names = tokenizer.convert_ids_to_tokens(around["input_ids"])
    return Chat(before="".join(names[: words[0]]), image="", after="".join(names[words[-1] + 1 :]))


def _split(rendered: str, folder: Path) -> tuple[str, str]:
    before, words, after = rendered.partition(_WORDS)
    if not words or _WORDS in after:
        raise BadConfig("the chat template does not repeat the user's words once", file=folder, found=repr(rendered))
    return before, after


def _older_template(folder: Path) -> str | None:
    """The template of processors before they had a file chat_template.jinja, which went before the tokenizer's."""
    file = folder / "chat_template.json"
    if (folder / "chat_template.jinja").exists() or not file.exists():
        return None
    template: str = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    return template
