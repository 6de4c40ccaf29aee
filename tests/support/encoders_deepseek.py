"""A tiny DeepSeek-VL2 with random weights, in the names and config form of the published checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizer import tiny_tokenizer

from topt_deploy.prompts.families.deepseek_vl2.host import CONTROL
from topt_deploy.prompts.families.deepseek_vl2.pytorch.config import DeepseekVL2Config
from topt_deploy.prompts.families.deepseek_vl2.pytorch.model import DeepseekVL2Model

TILE = 46
"""Three patches of 14 and a rest, as 384 has: an odd number of patches, which the projector fills up."""
RESOLUTIONS = [[TILE * a, TILE * b] for a, b in ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (3, 2), (3, 3))]
SIZES = {
    "tiny": {
        "use_mla": False, "kv_lora_rank": None, "q_lora_rank": None,
        "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    },
    "small": {
        "kv_lora_rank": 12, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    },
    "base": {
        "kv_lora_rank": 12, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10,
        "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.0,
    },
}  # fmt: skip
"""What tells the three published sizes' language models apart."""


def deepseek_config(size: str = "small", vocabulary: int = 700, **language: object) -> dict:
    """A config.json."""
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_deepseek_vl_v2.DeepseekVLV2Config"},
        "model_type": "deepseek_vl_v2",
        "candidate_resolutions": RESOLUTIONS,
        "global_view_pos": "head",
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "vision", "layers": 2, "width": 24, "heads": 2, "mlp_ratio": 1.7362,
            "patch_size": 14, "image_size": TILE,
        },
        "projector_config": {"model_type": "mlp_projector", "n_embed": 32},
        "language_config": {
            "architectures": ["DeepseekV2ForCausalLM"],
            "auto_map": {"AutoModel": "modeling_deepseek.DeepseekV2Model"},
            "model_type": "deepseek_v2",
            "bos_token_id": 0, "eos_token_id": 1, "lm_head": True, "rm_head": False, "torch_dtype": "bfloat16",
            "first_k_dense_replace": 1, "hidden_size": 32, "intermediate_size": 40, "max_position_embeddings": 4096,
            "moe_intermediate_size": 20, "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3, "vocab_size": vocabulary,
            **SIZES[size], **language,
        },
    }  # fmt: skip


def tiny_deepseek(folder: Path, size: str = "small", seed: int = 0, **language: object) -> dict:
    """Save config, weights in two files, tokenizer and image preprocessing to ``folder``; return the config.

    Args:
        folder: To be made.
        size: Which published size it takes after: "tiny", "small" or "base".
        seed: Of the weights.
        language: Changes to ``language_config``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = deepseek_config(size, **language)
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "add_special_token": False, "candidate_resolutions": RESOLUTIONS, "downsample_ratio": 2, "ignore_id": -100,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_token": "<image>", "mask_prompt": False,
        "normalize": True, "pad_token": "<｜▁pad▁｜>", "patch_size": 14, "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer(CONTROL))
    tensors = random_tensors(config, seed)
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{i}-of-000002.safetensors")
    return config


def random_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the published names, those that no hidden state depends on included."""
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in DeepseekVL2Model(DeepseekVL2Config.read(config)).state_dict().items()
        }
    width, patch = config["vision_config"]["width"], config["vision_config"]["patch_size"]
    shapes["vision.patch_embed.proj.weight"] = (width, 3, patch, patch)
    shapes["vision.attn_pool.latent"] = (1, 1, width)
    shapes["language.lm_head.weight"] = shapes["language.model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        drawn = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            drawn *= drawn[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            drawn = 1 + 0.2 * drawn
        else:
            drawn *= 0.3
        tensors[name] = drawn
    return tensors
