"""DeepSeek-VL2, which transformers lacks: the published checkpoint on transformers' SigLIP and DeepSeek-V2 parts.

Module names are the published tensors' names, so that a checkpoint loads without a table of names and every expert
is a layer of its own. What differs from transformers' deepseek_v2: rotary positions without complex numbers, plain
multi-head attention where ``use_mla`` is false (VL2-tiny), and gates with a sigmoid and a correction (VL2).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DeepseekV2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2DecoderLayer,
    DeepseekV2MLP,
    DeepseekV2Model,
    DeepseekV2RMSNorm,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

from topt_deploy.errors import BadData, NoInput
from topt_deploy.prompts.prompt import Array
from topt_deploy.prompts.pytorch.causal_backend import TorchBackend
from topt_deploy.storage.os_errors import reading

from .config import DeepseekVL2Config
from .vision import Projector, VisionTower, arrange

UNUSED = ("language.lm_head.", "vision.attn_pool.")
"""Published tensors that no hidden state depends on."""


class LatentAttention(DeepseekV2Attention):
    """Multi-head latent attention; the cache holds what keys and values are expanded from."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        """(B, S, H) to the same; ``position_embeddings`` are cosines and sines, (B, S, rope width) each."""
        assert position_embeddings is not None
        batch, tokens, _ = hidden_states.shape
        if self.q_lora_rank is None:
            q = self.q_proj(hidden_states)  # type: ignore[misc]
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))  # type: ignore[misc]
        q = q.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_proj_with_mqa(hidden_states)[:, None]  # (B, 1, S, …)
        latent, k_rope = latent.split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        q_rope, k_rope = apply_rotary_pos_emb(_halves(q_rope), _halves(k_rope), *position_embeddings)
        latent = self.kv_a_layernorm(latent)
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)
        kv = self.kv_b_proj(latent[:, 0]).reshape(batch, latent.shape[2], self.num_heads, -1).transpose(1, 2)
        k_nope, value = kv.split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1, -1)), dim=-1)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        query = torch.cat((q_nope, q_rope), dim=-1)
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, **settings)
        return self.o_proj(out.reshape(batch, tokens, -1)), None


def _halves(x: Tensor) -> Tensor:
    """Pairs (a₀ b₀ a₁ b₁ …) to halves (a₀ a₁ … b₀ b₁ …), which rotate alike; products of two such stay the same."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class Gate(nn.Module):
    """The gate, which sends each token to its experts."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.config, self.each = config, int(config.num_experts_per_tok or 0)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(n, H) to the experts' weights, float32 (n, k), and the experts, int64 (n, k)."""
        config = self.config
        scores = F.linear(hidden.float(), self.weight.float())
        scores = scores.softmax(dim=-1) if config.scoring_func == "softmax" else scores.sigmoid()
        ranks = scores + self.e_score_correction_bias if config.topk_method == "noaux_tc" else scores
        chosen = ranks.topk(self.each, dim=-1).indices
        weights = scores.gather(1, chosen)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, chosen


class Experts(nn.Module):
    """Routed and shared experts; every expert sees its own tokens alone.

    Args:
        config: The language model's.
        dense: True if each sees all tokens instead, and what is not its own counts nothing: the same result, without
            sizes that depend on what tokens say, which TensorRT-RTX has no operator for.
    """

    def __init__(self, config: DeepseekV2Config, *, dense: bool = False) -> None:
        super().__init__()
        self.dense = dense
        inner = config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = nn.ModuleList(
            DeepseekV2MLP(config, intermediate_size=inner) for _ in range(config.n_routed_experts)
        )
        self.shared_experts = DeepseekV2MLP(config, intermediate_size=inner * config.n_shared_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, H) to the same."""
        tokens = hidden.flatten(0, 1)
        weights, chosen = self.gate(tokens)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            if self.dense:
                out = out + expert(tokens) * (weights * (chosen == i)).sum(dim=1, keepdim=True).to(out.dtype)
                continue
            row, slot = (chosen == i).nonzero(as_tuple=True)
            share = expert(tokens.index_select(0, row)) * weights[row, slot, None]
            # a token has an expert once, so this adds nothing twice; not every runtime has a scatter that adds
            out = out.index_put((row,), out.index_select(0, row) + share.to(out.dtype))
        return out.reshape(hidden.shape) + self.shared_experts(hidden)


class DecoderLayer(DeepseekV2DecoderLayer):
    """One layer of the language model.

    Args:
        config: The language model's.
        layer_idx: Its place in the cache.
        routed: True if it has experts.
        dense: Of :class:`Experts`.
    """

    def __init__(self, config: DeepseekV2Config, layer_idx: int, *, routed: bool, dense: bool = False) -> None:
        nn.Module.__init__(self)
        attention: Any = LatentAttention if config.use_mla else LlamaAttention
        self.self_attn = attention(config, layer_idx)
        mlp: Any = Experts(config, dense=dense) if routed else DeepseekV2MLP(config)
        self.mlp = mlp
        self.input_layernorm = language_norm(config)
        self.post_attention_layernorm = language_norm(config)


def language_norm(config: DeepseekV2Config) -> DeepseekV2RMSNorm:
    """The language model's norm."""
    return DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def rotary(config: DeepseekV2Config) -> LlamaRotaryEmbedding:
    """From positions to cosines and sines."""
    return LlamaRotaryEmbedding(config)  # type: ignore[arg-type]


def routed(config: DeepseekV2Config, layer: int) -> bool:
    """True if the layer has experts."""
    return layer >= config.first_k_dense_replace


class Decoder(DeepseekV2Model):
    """transformers' DeepSeek-V2 with the layers above."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super(DeepseekV2Model, self).__init__(config)  # not its own, which would build the layers that these replace
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, routed=routed(config, i)) for i in range(config.num_hidden_layers)
        )
        self.norm = language_norm(config)
        with torch.device("cpu"):  # its frequencies are computed, not loaded
            self.rotary_emb = rotary(config)  # type: ignore[assignment]


class DeepseekVL2Model(nn.Module):
    """The model without its language-model head."""

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__()
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config)
        self.image_newline = nn.Parameter(torch.empty(config.language.hidden_size))
        self.view_seperator = nn.Parameter(torch.empty(config.language.hidden_size))  # sic
        self.language = nn.ModuleDict({"model": Decoder(config.language)})

    def image(self, pixels: Tensor, layout: Tensor) -> Tensor:
        """Token embeddings (m, H) of one image: tiles (N, 3, height, width), and their order (:func:`arrange`)."""
        features = self.projector(self.vision(pixels))
        return arrange(features, layout, self.image_newline, self.view_seperator)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "DeepseekVL2Model":
        """Read a published checkpoint: config.json and safetensors files.

        Raises:
            NoInput: If a file is missing.
            BadData: If a file is broken, or its tensors are not those of the model.
        """
        with reading(folder / "config.json"):
            config = DeepseekVL2Config.read(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        with torch.device("meta"):
            model = cls(config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tensors = {}
        for name, tensor in _tensors(folder):
            if not name.startswith(UNUSED):
                flat = tensor.flatten(1) if name == "vision.patch_embed.proj.weight" else tensor
                tensors[name] = flat.to(device, dtype)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise BadData(
                "the tensors are not those of the model that config.json describes",
                file=folder,
                expected=_some(expected.items() - found.items()) or "nothing else",
                found=_some(found.items() - expected.items()) or "nothing of these",
                fix="fetch the model again, all its files from one revision",
            )
        model.load_state_dict(tensors, assign=True)
        return model.to(device).requires_grad_(False).eval()


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NoInput("no weights", file=folder, expected="*.safetensors", fix="fetch the whole model")
    for path in files:
        with reading(path):
            try:
                with safe_open(path, framework="pt") as file:
                    yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118, it is no dict
            except SafetensorError as error:
                raise BadData(f"not a safetensors file ({error})", file=path, fix="fetch it again") from error


def _some(tensors: set[tuple[str, tuple[int, ...]]]) -> str:
    listed = [f"{name} {' × '.join(map(str, shape))}" for name, shape in sorted(tensors)]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


class DeepseekBackend(TorchBackend):
    """Runs DeepSeek-VL2 (:class:`topt_deploy.prompts.pooling.Backend`)."""

    def __init__(self, model: DeepseekVL2Model) -> None:
        decoder = model.language["model"]
        super().__init__(decoder.embed_tokens, decoder)  # type: ignore[arg-type]
        self.model = model

    @torch.inference_mode()
    def vision(self, image: Mapping[str, Array]) -> Tensor:
        """Token embeddings (m, H), of the arrays that the family makes of one image."""
        layout = torch.tensor(image["layout"], device=self.device)
        return self.model.image(self.tensor(image["pixel_values"]), layout)
