"""A checkpoint as an encoder in PyTorch, whichever family it is of."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from topt_deploy.arguments import check_choice, check_least
from topt_deploy.errors import BadConfig
from topt_deploy.model.training_device import check_device
from topt_deploy.prompts.encode import Encoder, PooledEncoder, limit_pixels
from topt_deploy.prompts.encoder_spec import DEEPSEEK, MLLAMA, QWEN
from topt_deploy.prompts.families.deepseek_vl2.pytorch.model import DeepseekBackend, DeepseekVL2Model
from topt_deploy.prompts.families.mllama.pytorch import MllamaBackend
from topt_deploy.prompts.families.qwen2_5_vl.pytorch import QwenBackend
from topt_deploy.prompts.pooling import Backend, pooled
from topt_deploy.prompts.prompt import Prompt, TokenSequence
from topt_deploy.prompts.templates import Templates, load_templates

from .causal_backend import TorchBackend
from .checkpoint import OTHER, PRECISIONS, Checkpoint, from_pretrained, open_checkpoint, quiet
from .transformers_encoder import other_encoder


def torch_encoder(checkpoint: Checkpoint, *, device: str, precision: str) -> Encoder:
    """The model in PyTorch, ready to encode.

    Args:
        checkpoint: The model.
        device: "cpu" or "cuda".
        precision: One of :data:`PRECISIONS`.

    Raises:
        NoDevice: If the device is absent.
        BadData, BadConfig: If the model cannot be loaded, or is not what its files say.
    """
    if checkpoint.spec.family == OTHER:
        return other_encoder(checkpoint, device=device, precision=precision)
    return PooledEncoder(
        spec=checkpoint.spec,
        precision=precision,
        runtime="torch",
        sha256=checkpoint.sha256,
        host=checkpoint.spec.host(checkpoint.tokenizer),
        backend=torch_backend(checkpoint, device=device, precision=precision),
    )


@contextmanager
def encoder_for(
    model: object,
    *,
    device: str,
    threads: int,
    precision: str,
    max_pixels: int | None,
    allow_download: bool,
    revision: str | None,
) -> Iterator[tuple[Encoder, Templates]]:
    """A model that encodes within a ``with`` block, and the shipped templates (:func:`.encode_regions.encode`).

    PyTorch's number of threads is the caller's again afterwards.
    """
    check_choice("device", device, ("cpu", "cuda"))
    check_choice("precision", precision, PRECISIONS)
    check_least("max_pixels", max_pixels)
    quiet()
    check_device(device)
    checkpoint = open_checkpoint(str(model), allow_download=allow_download, revision=revision)
    if max_pixels is not None:
        checkpoint = replace(checkpoint, spec=limit_pixels(checkpoint.spec, max_pixels))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield torch_encoder(checkpoint, device=device, precision=precision), load_templates()
    finally:
        torch.set_num_threads(before)


def torch_backend(checkpoint: Checkpoint, *, device: str, precision: str) -> Backend:
    """The networks in PyTorch (:func:`torch_encoder`)."""
    from transformers import AutoModel, MllamaModel, Qwen2_5_VLForConditionalGeneration

    check_device(device)
    dtype, family = PRECISIONS[precision], checkpoint.spec.family
    if family == DEEPSEEK:
        return DeepseekBackend(DeepseekVL2Model.load(checkpoint.path, dtype, device))
    if family == QWEN:
        # The base class alone does not know every name that its vision weights have had.
        return QwenBackend(from_pretrained(Qwen2_5_VLForConditionalGeneration, checkpoint, dtype).model.to(device))
    if family == MLLAMA:
        return MllamaBackend(from_pretrained(MllamaModel, checkpoint, dtype).to(device))
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
