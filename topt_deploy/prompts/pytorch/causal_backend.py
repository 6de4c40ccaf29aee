"""A causal language model of transformers as a backend: prefix sharing on its own cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from topt_deploy.prompts.pooling import allowed
from topt_deploy.prompts.prompt import Array


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
    def embed(self, ids: Array, features: Tensor | None = None, places: Array | None = None) -> Tensor:
        """Token embeddings (…, H) of int64 (…), images among them (:class:`topt_deploy.prompts.pooling.Backend`)."""
        embeds: Tensor = self.embedding(torch.tensor(ids, device=self.device))
        if features is not None and places is not None:
            at = torch.tensor(places, device=self.device)
            embeds[at >= 0] = features[at[at >= 0]].to(embeds.dtype)
        return embeds

    def vision(self, image: Mapping[str, Array]) -> Tensor:
        """A text-only model has none."""
        raise NotImplementedError("this model reads no images")

    def join(self, features: Sequence[Tensor]) -> Tensor:
        """Features of images, one behind the other."""
        return torch.cat(list(features))

    def start(self, features: Sequence[Tensor], batch: int) -> Any:
        """An empty cache."""
        return DynamicCache(config=self.decoder.config)  # type: ignore[arg-type]

    @torch.inference_mode()
    def decode(
        self, state: Any, embeds: Tensor, positions: Array, visible: Array | None, begins: Array | None = None
    ) -> tuple[Tensor, Any]:
        """Read S more tokens (:class:`topt_deploy.prompts.pooling.Backend`)."""
        position_ids = torch.tensor(positions, device=self.device)  # (A, B, S)
        mask = None if begins is None else torch.tensor(allowed(begins, self.read(state)), device=self.device)
        out = self.decoder(
            inputs_embeds=embeds.to(self.dtype),
            position_ids=position_ids[0] if len(position_ids) == 1 else position_ids,
            attention_mask=mask,
            past_key_values=state,
            use_cache=True,
            **self.besides(visible),
        )
        return out.last_hidden_state, out.past_key_values

    @torch.inference_mode()
    def sums(self, hidden: Tensor, ranges: Array) -> Array:
        """Sums over ranges of tokens, float64 (B, R, H)."""
        sums = [[h[a:b].sum(0, dtype=torch.float64) for a, b in of] for h, of in zip(hidden, ranges, strict=True)]
        found: Array = torch.stack([torch.stack(of) for of in sums]).cpu().numpy()
        return found

    def read(self, state: Any) -> int:
        """The number of tokens that have been read."""
        return int(state.get_seq_length())

    def besides(self, visible: Array | None) -> dict[str, Any]:
        """Additional inputs of the decoder."""
        return {}

    def tensor(self, values: Array) -> Tensor:
        """An array of floats as the model has them."""
        return torch.tensor(values, device=self.device).to(self.dtype)
