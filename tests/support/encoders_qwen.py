"""A tiny Qwen2.5-VL with random weights, saved as the published checkpoints are."""

import json
from pathlib import Path

import torch
from encoders_weights import draw_weights
from tokenizers import AddedToken
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

WORDS = "At 41.85, -87.65 there are 12 cafés and 40 shops. How much crime is there? You are a helpful assistant."
CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# The published frame without videos: a system message, then images and text as they come.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def tiny_qwen(folder: Path, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Save config, weights, tokenizer, chat template and image preprocessing to ``folder``; return the model.

    Windows are as large as in the published models, where the second of three layers looks at the whole image.
    """
    tokenizer = _tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 112,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    draw_weights(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 64}
    preprocessor = limits | CLIP | {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model


def _tokenizer() -> Qwen2Tokenizer:
    """Byte-level pairs as the family has them, learned from a sentence."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator([WORDS] * 4, vocab_size=320)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, special=True) for token in CONTROL[1:]]}
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
