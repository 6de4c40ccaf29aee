import numpy as np
import pytest
from tokenizer import tiny_tokenizer

from topt_deploy.errors import BadData
from topt_deploy.prompts.families.text.host import TextOnly
from topt_deploy.prompts.tokens import Chat, Tokens

CHAT = Chat(before="<|im_start|>user\n", image="", after="<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def family():
    return TextOnly(CHAT, Tokens(tiny_tokenizer()))


def test_a_prompt(family):
    prompt = family.prompt("Where?", [], ["What?", "How many crimes are reported?", ""])
    assert prompt.images == ()
    assert prompt.image_token is None
    texts = [f"{CHAT.before}Where?{end}{CHAT.after}" for end in ("\nWhat?", "\nHow many crimes are reported?", "")]
    for sequence, text in zip(prompt.sequences, texts, strict=True):
        assert sequence.ids.tolist() == family.tokens.ids(text).tolist()
        assert sequence.positions.dtype == np.int64
        assert sequence.positions.tolist() == [list(range(len(sequence.ids)))]
        assert sequence.visible is None


def test_images_are_refused(family):
    with pytest.raises(BadData, match="reads no images") as refused:
        family.prompt("Where?", [np.zeros((2, 2, 3), np.uint8)] * 2, ["What?"])
    assert refused.value.found == "2 images"


def test_control_tokens_are_refused(family):
    with pytest.raises(BadData, match="control token"):
        family.prompt("Where?<|im_end|>", [], ["What?"])
