"""DeepSeek-VL2, which transformers lacks: the published checkpoint on transformers' SigLIP and DeepSeek-V2 parts.

Module names are the published tensors' names, so that a checkpoint loads without a table of names and every expert
is a layer of its own. What differs from transformers' deepseek_v2: rotary positions without complex numbers, plain
multi-head attention where ``use_mla`` is false (VL2-tiny), and gates with a sigmoid and a correction (VL2).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from topt_deploy.storage.atomic import reading

UNUSED = ("language.lm_head.", "vision.attn_pool.")
"""Published tensors that no hidden state depends on."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower.

    Attributes:
        width, inner: Of its hidden states, and within its MLPs.
        layers, heads: How many.
        patch: Edge of a patch in pixels.
        side: Whole patches in each direction of a tile.
        tile: Edge of a tile in pixels.
        attention: The implementation of transformers to use.
    """

    width: int
    inner: int
    layers: int
    heads: int
    patch: int
    side: int
    tile: int
    attention: str = "sdpa"


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """From patches to token embeddings.

    Attributes:
        ratio: So many patches in each direction make one token.
        inner: Width between its linear layers.
        depth: How many linear layers.
    """

    ratio: int
    inner: int
    depth: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DeepseekVL2Config:
    """A published config.json in the terms of transformers.

    Attributes:
        vision: The image tower.
        projector: Between tower and language model.
        language: The language model, with what transformers' class does not know as attributes of its own:
            ``use_mla``, ``scoring_func``. Without MLA, ``head_dim`` is the width of a head.
    """

    vision: VisionConfig
    projector: ProjectorConfig
    language: DeepseekV2Config

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "DeepseekVL2Config":
        """Read config.json, with the defaults of the published code.

        Raises:
            BadData: If it is another model's, or a variant that none of the three published sizes is.
        """
        try:
            vision, projector, language = (
                dict(config[f"{part}_config"]) for part in ("vision", "projector", "language")
            )
            ratio = projector.get("mlp_ratio", 1)
            width, heads = language["hidden_size"], language["num_attention_heads"]
            language["num_hidden_layers"], language["n_routed_experts"], language["n_shared_experts"]
        except KeyError as error:
            raise BadData(f"{error} is absent", file="config.json", expected="a DeepSeek-VL2 model's") from error
        language = {"use_mla": True, "scoring_func": "softmax", "topk_method": "greedy", **language}
        gate = (language["scoring_func"], language["topk_method"])
        _supported("language_config.scoring_func, topk_method", gate, ("softmax", "greedy"), ("sigmoid", "noaux_tc"))
        _supported("language_config.n_group", language.get("n_group"), None, 1)
        _supported("language_config.moe_layer_freq", language.get("moe_layer_freq", 1), 1)
        _supported(
            "projector_config.projector_type",
            projector.get("projector_type", "downsample_mlp_gelu"),
            "downsample_mlp_gelu",
        )
        _supported("projector_config.token_pooling", projector.get("token_pooling", False), False)
        if not language["use_mla"]:
            head = width // heads  # the unused sizes are null or 0, which transformers' class refuses or divides by
            language |= {"kv_lora_rank": 1, "q_lora_rank": None, "qk_nope_head_dim": 0}
            language |= {"qk_rope_head_dim": head, "v_head_dim": head}
        tower, patch, tile = vision.get("width", 1024), vision.get("patch_size", 16), vision.get("image_size", 384)
        return cls(
            vision=VisionConfig(
                width=tower,
                inner=int(tower * vision.get("mlp_ratio", 4)),
                layers=vision.get("layers", 24),
                heads=vision.get("heads", 16),
                patch=patch,
                side=tile // patch,
                tile=tile,
            ),
            projector=ProjectorConfig(
                ratio=projector.get("downsample_ratio", 2), inner=ratio * width, depth=projector.get("depth", 2)
            ),
            language=DeepseekV2Config(**(language | {"attn_implementation": "sdpa"})),
        )


def _supported(what: str, found: object, *known: object) -> None:
    if found not in known:
        raise BadData(
            f"{what} is not that of a published DeepSeek-VL2",
            file="config.json",
            expected=" or ".join(map(repr, known)),
            found=repr(found),
        )


class Patches(nn.Module):
    """Patches of tiles with their positions: the tower's first layer, a convolution written as a linear map."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch, self.side = config.patch, config.side
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(3 * config.patch**2, config.width)})
        self.pos_embed = nn.Parameter(torch.empty(1, config.side**2, config.width))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, height, width) to (N, side², C); pixels beyond the last whole patch are left out."""
        p, side = self.patch, self.side
        x = pixels[:, :, : side * p, : side * p].reshape(-1, 3, side, p, side, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, side**2, 3 * p**2)
        return self.patch_embed["proj"](x) + self.pos_embed


class VisionAttention(nn.Module):
    """Self-attention of SigLIP with query, key and value in one map, as timm has it."""

    is_causal = False

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, P, C) to the same."""
        n, p, _ = hidden.shape
        q, k, v = self.qkv(hidden).reshape(n, p, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS[self.config.attention]
        out, _ = attend(self, q, k, v, None, scaling=q.shape[-1] ** -0.5)
        return self.proj(out.reshape(n, p, -1))


class VisionMLP(nn.Module):
    """The two maps of a SigLIP block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.inner)
        self.fc2 = nn.Linear(config.inner, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, P, C) to the same."""
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


class VisionBlock(nn.Module):
    """One block of the tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1, self.attn = vision_norm(config), VisionAttention(config)
        self.norm2, self.mlp = vision_norm(config), VisionMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, P, C) to the same."""
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


def vision_norm(config: VisionConfig) -> nn.LayerNorm:
    """The tower's norm."""
    return nn.LayerNorm(config.width, eps=1e-6)


class VisionTower(Patches):
    """SigLIP without its pooling head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.norm = vision_norm(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, height, width) to (N, side², C)."""
        hidden = super().forward(pixels)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)


class Projector(nn.Module):
    """Neighbouring patches put together, and mapped to the language model's width."""

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__()
        self.ratio, self.side = config.projector.ratio, config.vision.side
        inner = config.projector.inner
        layers: list[nn.Module] = [nn.Linear(config.vision.width * self.ratio**2, inner)]
        for _ in range(1, config.projector.depth - 1):
            layers += [nn.GELU(), nn.Linear(inner, inner)]
        self.layers = nn.Sequential(*layers, nn.GELU(), nn.Linear(inner, config.language.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, side², C) to (N, ⌈side / ratio⌉², H)."""
        r, rows = self.ratio, -(-self.side // self.ratio)
        x = hidden.reshape(-1, self.side, self.side, hidden.shape[-1])
        x = F.pad(x, (0, 0, 0, rows * r - self.side, 0, rows * r - self.side))
        x = x.reshape(-1, rows, r, rows, r, hidden.shape[-1]).permute(0, 1, 3, 5, 2, 4)
        return self.layers(x.reshape(-1, rows**2, hidden.shape[-1] * r**2))


def arrange(features: Tensor, layout: Tensor, newline: Tensor, separator: Tensor) -> Tensor:
    """Token embeddings in their order.

    Args:
        features: (N, t, H), of tiles.
        layout: int64 (m,): 0 for the end of a line, 1 for the border between views, 2 + i for token i of all tiles.
        newline, separator: (H,).

    Returns:
        (m, H).
    """
    table = torch.cat((newline[None], separator[None], features.flatten(0, 1)))
    return table.index_select(0, layout)


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


class Layer(DeepseekV2DecoderLayer):
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
        self.layers = nn.ModuleList(Layer(config, i, routed=routed(config, i)) for i in range(config.num_hidden_layers))
        self.norm = language_norm(config)
        with torch.device("cpu"):  # its frequencies are computed, not loaded
            self.rotary_emb = rotary(config)  # type: ignore[assignment]


class DeepseekVL2(nn.Module):
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
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "DeepseekVL2":
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

    def __init__(self, model: DeepseekVL2) -> None:
        decoder = model.language["model"]
        super().__init__(decoder.embed_tokens, decoder)  # type: ignore[arg-type]
        self.model = model

    @torch.inference_mode()
    def vision(self, image: Mapping[str, Array]) -> Tensor:
        """Token embeddings (m, H), of the arrays that the family makes of one image."""
        layout = torch.tensor(image["layout"], device=self.device)
        return self.model.image(self.tensor(image["pixel_values"]), layout)
