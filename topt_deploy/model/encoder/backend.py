"""A causal language model of transformers as a backend: prefix sharing on its own cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from topt_deploy.encoder.backend import allowed
from topt_deploy.encoder.prompt import Array


class TorchBackend:
    """Runs a decoder that is called with token embeddings, positions and a cache.

    Args:
        embedding: Token embeddings.
        decoder: transformers' base model, without a language-model head: no logits are computed that nobody reads.
    """

    chunk = 2048

    def __init__(self, embedding: nn.Module, decoder: nn.Module) -> None:
        self.embedding, self.decoder = embedding, decoder
        parameter = next(decoder.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @torch.inference_mode()
    def embed(self, ids: Array) -> Array:
        """Token embeddings, float32 (n, H), of int64 (n,)."""
        return self.array(self.embedding(torch.tensor(ids, device=self.device)))

    def vision(self, image: Mapping[str, Array]) -> Array:
        """A text-only model has none."""
        raise NotImplementedError("this model reads no images")

    def start(self, features: Sequence[Array], batch: int) -> Any:
        """An empty cache."""
        return DynamicCache(config=self.decoder.config)  # type: ignore[arg-type]

    @torch.inference_mode()
    def decode(
        self, state: Any, embeds: Array, positions: Array, visible: Array | None, begins: Array | None = None
    ) -> tuple[Array, Any]:
        """Read S more tokens (:class:`topt_deploy.encoder.backend.Backend`)."""
        position_ids = torch.tensor(positions, device=self.device)  # (A, B, S)
        mask = None if begins is None else torch.tensor(allowed(begins, self.read(state)), device=self.device)
        out = self.decoder(
            inputs_embeds=self.tensor(embeds),
            position_ids=position_ids[0] if len(position_ids) == 1 else position_ids,
            attention_mask=mask,
            past_key_values=state,
            use_cache=True,
            **self.besides(visible),
        )
        return self.array(out.last_hidden_state), out.past_key_values

    def read(self, state: Any) -> int:
        """How many tokens have been read."""
        return int(state.get_seq_length())

    def besides(self, visible: Array | None) -> dict[str, Any]:
        """What else the decoder is called with."""
        return {}

    def tensor(self, values: Array) -> Tensor:
        """An array of floats as the model has them."""
        return torch.tensor(values, device=self.device).to(self.dtype)

    @staticmethod
    def array(values: Tensor) -> Array:
        """A tensor as float32 on the CPU."""
        array: Array = values.float().cpu().numpy()
        return array
