"""The decoder of causal language models whose layers are Llama's in form: rotary positions, layers, last norm."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, PreTrainedConfig

from topt_deploy.prompts.pytorch.checkpoint import Checkpoint

from .pieces import Network, Piece, Spec, Use
from .traced_operators import transformers_attention

EMBEDDING = "model.embed_tokens.weight"

ATTENTION = "topt"
AttentionInterface.register(ATTENTION, transformers_attention)

BATCH, TOKENS, PAST, ALL = "batch", "tokens", "past", "past + tokens"


class Past:
    """Stands for transformers' cache in one layer: puts what is new behind what was, and keeps both."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """The keys and values that attention reads, (B, K, P + S, D) each."""
        self.key, self.value = torch.cat((self.key, key), dim=2), torch.cat((self.value, value), dim=2)
        return self.key, self.value


class Rotary(nn.Module):
    """Positions (A, B, S) to cosines and sines (B, S, D)."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        with torch.device("cpu"):
            self.rotary = build()

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions[0] if positions.shape[0] == 1 else positions
        cos, sin = self.rotary(torch.zeros((), dtype=torch.float32), positions)
        return cos, sin


class Norm(nn.Module):
    """A norm whose output is a tuple, as every piece's is."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = norm

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (self.inner(hidden),)


class Allowed(nn.Module):
    """:func:`topt_deploy.prompts.pooling.allowed`, once for all layers: ``begins`` (B, S) to bool (B, 1, S, P + S)."""

    def forward(self, begins: Tensor, past_key: Tensor) -> tuple[Tensor]:
        new = torch.arange(begins.shape[1])
        among = (new >= begins[:, :, None]) & (new <= new[:, None])
        before = torch.ones_like(past_key[:, 0, :, 0], dtype=torch.bool)[:, None].expand(-1, begins.shape[1], -1)
        return (torch.cat((before, among), dim=2)[:, None],)


class Layer(nn.Module):
    """A decoder layer of transformers with its past as tensors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(
        self, hidden: Tensor, allowed: Tensor, cos: Tensor, sin: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        past = Past(past_key, past_value)
        out = self.inner(hidden, attention_mask=allowed, position_embeddings=(cos, sin), past_key_values=past)
        return (out[0] if isinstance(out, tuple) else out), past.key, past.value


def for_export(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with the attention that export keeps whole."""
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = ATTENTION
    return config


def decoder(
    *,
    width: int,
    axes: int,
    rotary: Callable[[], nn.Module],
    rotary_width: int,
    layers: Sequence[tuple[str, Callable[[], nn.Module]]],
    cache: tuple[int, int, int],
    norm: Callable[[], nn.Module],
    prefix: str,
    for_engines: Mapping[str, Callable[[], nn.Module]] | None = None,
) -> Network:
    """The network from token embeddings to last hidden states.

    Args:
        width: H.
        axes: A, of the positions.
        rotary: Makes transformers' module from positions to cosines and sines.
        rotary_width: How many cosines a position has.
        layers: Per layer its kind's name and what makes it; layers of one kind are traced once.
        cache: Key heads, width of a key, width of a value.
        norm: Makes the last norm.
        prefix: Of the weights' names: ``"model."``.
        for_engines: Makes a kind's layers for TensorRT (:attr:`.pieces.Piece.for_engines`).
    """
    heads, key_width, value_width = cache
    hidden = Spec(dtype=torch.float32, dims=(BATCH, TOKENS, width))
    positions = Spec(dtype=torch.int64, dims=(axes, BATCH, TOKENS))
    past_key = Spec(dtype=torch.float32, dims=(BATCH, heads, PAST, key_width))
    past_value = Spec(dtype=torch.float32, dims=(BATCH, heads, PAST, value_width))
    begins = Spec(dtype=torch.int64, dims=(BATCH, TOKENS))
    mask = Spec(dtype=torch.bool, dims=(BATCH, 1, TOKENS, ALL))
    angles = Spec(dtype=torch.float32, dims=(BATCH, TOKENS, rotary_width))
    layer_inputs = {
        "hidden": hidden,
        "allowed": mask,
        "cos": angles,
        "sin": angles,
        "past_key": past_key,
        "past_value": past_value,
    }

    kinds = _kinds(dict(layers), layer_inputs, for_engines or {})
    uses = [
        Use(piece=Piece(
            name="rotary", build=lambda: Rotary(rotary), inputs={"positions": positions}, outputs=("cos", "sin")
        )),
        Use(
            piece=Piece(
                name="allowed", build=Allowed, inputs={"begins": begins, "past_key": past_key}, outputs=("allowed",)
            ),
            names={"past_key": "past_key_0"},
        ),
    ]  # fmt: skip
    for i, (kind, _) in enumerate(layers):
        names = {name: f"{name}_{i}" for name in ("past_key", "past_value", "present_key", "present_value")}
        uses.append(Use(piece=kinds[kind], weights=f"{prefix}layers.{i}.", names=names))
    last = Piece(name="norm", build=lambda: Norm(norm()), inputs={"hidden": hidden}, outputs=("last_hidden",))
    uses.append(Use(piece=last, weights=f"{prefix}norm."))
    pasts = {
        f"past_{what}_{i}": spec
        for i in range(len(layers))
        for what, spec in (("key", past_key), ("value", past_value))
    }
    presents = [f"present_{what}_{i}" for i in range(len(layers)) for what in ("key", "value")]
    return Network(
        name="decoder",
        inputs={"hidden": hidden, "positions": positions, "begins": begins, **pasts},
        outputs=("last_hidden", *presents),
        uses=tuple(uses),
    )


def _kinds(
    builders: Mapping[str, Callable[[], nn.Module]],
    inputs: Mapping[str, Spec],
    for_engines: Mapping[str, Callable[[], nn.Module]],
) -> dict[str, Piece]:
    """A piece for every kind of layer, with its form for TensorRT where it has one."""

    def piece(name: str, build: Callable[[], nn.Module], other: Piece | None = None) -> Piece:
        outputs = ("hidden", "present_key", "present_value")
        return Piece(name=name, build=lambda: Layer(build()), inputs=inputs, outputs=outputs, for_engines=other)

    others = {kind: piece(f"{kind} for engines", build) for kind, build in for_engines.items()}
    return {kind: piece(kind, build, others.get(kind)) for kind, build in builders.items()}


def networks(config: PreTrainedConfig) -> tuple[Network, ...]:
    """The decoder of a text-only model with Llama's layers: Llama, SmolLM2, Mistral, Qwen 2 and 3."""
    config = for_export(config)
    with torch.device("meta"):
        whole = AutoModel.from_config(config)
    layer, norm, rotary = (type(part) for part in (whole.layers[0], whole.norm, whole.rotary_emb))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = [("layer", lambda: layer(config, 0))] * config.num_hidden_layers
    return (
        decoder(
            width=config.hidden_size,
            axes=1,
            rotary=lambda: rotary(config),
            rotary_width=head,
            layers=kinds,
            cache=(config.num_key_value_heads, head, head),
            norm=lambda: norm(config.hidden_size, eps=config.rms_norm_eps),
            prefix="model.",
        ),
    )


def canonical(name: str) -> str:
    """The name of a weight as :func:`networks` calls it: as the causal model's checkpoint does."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def auto_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """A checkpoint's configuration as transformers reads it; none of the model's own code is run."""
    return AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
