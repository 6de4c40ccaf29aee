"""Causal language models of transformers as a backend."""

from typing import Any

import torch
from transformers import AutoModel

from topt_deploy.errors import BadConfig
from topt_deploy.prompts.pooling import pooled
from topt_deploy.prompts.prompt import Prompt, TokenSequence
from topt_deploy.prompts.pytorch.causal_backend import TorchBackend
from topt_deploy.prompts.pytorch.checkpoint import Checkpoint, from_pretrained


def make_backend(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> TorchBackend:
    """Load a model (:class:`topt_deploy.prompts.families.registry.PyTorchModule`).

    Raises:
        BadConfig: If its tasks cannot share their beginning.
    """
    model = from_pretrained(AutoModel, checkpoint, dtype).to(device)
    backend = TorchBackend(model.get_input_embeddings(), model)
    _check_shares(backend, model, checkpoint)
    return backend


def _check_shares(backend: TorchBackend, model: Any, checkpoint: Checkpoint) -> None:
    """Refuse a model whose vectors change when tasks share their beginning: one that is not causal, for example.

    Whatever transformers calls a causal language model gets here, so this is tried out, on a few tokens.
    """
    ids = torch.arange(12) * 7 % model.get_input_embeddings().num_embeddings
    tasks = [ids[:8], torch.cat((ids[:5], ids[8:]))]
    prompt = Prompt(
        sequences=tuple(
            TokenSequence(ids=task.numpy(), positions=torch.arange(len(task))[None].numpy()) for task in tasks
        )
    )
    try:
        shared = pooled(backend, [prompt], chunk=3)[0]
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        shared, reason = None, f" ({error})"
    else:
        reason = ""
        with torch.inference_mode():
            whole = [model(input_ids=task[None].to(backend.device)).last_hidden_state[0].mean(0) for task in tasks]
        expected = torch.stack(whole).float().cpu().numpy()
        tolerance = 1e-3 if backend.dtype == torch.float32 else 5e-2
        if abs(shared - expected).max() <= tolerance * abs(expected).max():
            return
    raise BadConfig(
        f"a {checkpoint.config['model_type']} is not a causal decoder: tasks cannot share their beginning{reason}",
        file=checkpoint.path,
        expected="a decoder such as Llama, Qwen2 or SmolLM2",
    )
