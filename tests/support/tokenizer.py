"""A small real tokenizer, trained on the spot: byte-level BPE with the control tokens of a chat model."""

from collections.abc import Sequence
from importlib import resources

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(control: Sequence[str] = (), *, vocabulary: int = 600, nfkc: bool = False) -> bytes:
    """The bytes of a tokenizer.json, trained on the shipped templates' own text.

    As some published files do, it adds a token before each text, pads and truncates, unless told not to.

    Args:
        control: Control tokens besides :data:`CONTROL`, such as those that stand for images.
        vocabulary: Tokens, control tokens apart.
        nfkc: Normalise the text, and find control tokens in what comes of it.
    """
    text = (resources.files("topt_deploy.prompts") / "templates.toml").read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    if nfkc:
        tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=nfkc) for token in (*CONTROL, *control)])
    tokenizer.add_tokens(["<tool_call>"])
    first = CONTROL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer.to_str().encode()
