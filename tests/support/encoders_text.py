"""A tiny causal language model with random weights, saved as published text-only checkpoints are."""

from pathlib import Path

import torch
from tokenizer import tiny_tokenizer
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# SmolLM2's: a default system message, and content as plain text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_text(folder: Path, *, template: str | None = CHAT_TEMPLATE, **config: object) -> LlamaForCausalLM:
    """Save config, weights, tokenizer and chat template to ``folder``; return the model.

    Args:
        folder: To be made.
        template: The chat template.
        config: Changes to the model's configuration.
    """
    byte_pairs = Tokenizer.from_str(tiny_tokenizer().decode())
    byte_pairs.no_truncation()
    byte_pairs.no_padding()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": len(tokenizer), "num_key_value_heads": 2, **sizes, **config}))
    for parameter in model.parameters():  # transformers' own are so small that layers hardly matter
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
