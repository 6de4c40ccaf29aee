"""A tiny Llama-3.2-Vision with random weights, saved as the published checkpoints are."""

import json
from pathlib import Path

import torch
from encoders_weights import draw_weights
from tokenizer import tiny_tokenizer
from tokenizers import Tokenizer
from transformers import MllamaConfig, MllamaForConditionalGeneration, PreTrainedTokenizerFast

CONTROL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|python_tag|>", "<|image|>",
)  # fmt: skip
# The published frame without tools: a dated system message, but none where there are images.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{%- endif %}"
    "{%- set found = namespace(images=false) %}"
    "{%- for message in messages %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{%- set found.images = true %}{%- endif %}"
    "{%- endfor %}{%- endfor %}"
    "{%- if not found.images %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n<|eot_id|>' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|image|>' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
TILE = 56
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "MllamaImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_image_tiles": 4,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": TILE, "width": TILE},
}


def tiny_mllama(folder: Path, seed: int = 0) -> MllamaForConditionalGeneration:
    """Save config, weights, tokenizer, chat template and image preprocessing to ``folder``; return the model.

    Five text layers, two of them looking at the images; three local and two global, gated vision layers.
    """
    byte_pairs = Tokenizer.from_str(tiny_tokenizer(CONTROL).decode())
    byte_pairs.no_truncation()
    byte_pairs.no_padding()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    bos, eos, pad, image = tokenizer.convert_tokens_to_ids(
        ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|image|>"]
    )
    config = MllamaConfig(
        text_config={
            "vocab_size": image,  # as published, the image's token lies behind the vocabulary
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "cross_attention_layers": [1, 3],
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "attention_heads": 2,
            "num_hidden_layers": 3,
            "num_global_layers": 2,
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 24 * 3,
            "image_size": TILE,
            "patch_size": 14,
        },
        image_token_index=image,
    )
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config).eval()
    draw_weights(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {"processor_class": "MllamaProcessor"}))
    return model
