"""A checkpoint as an encoder in PyTorch, whichever family it is of."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from topt_deploy.arguments import check_choice, check_least
from topt_deploy.model.training_device import check_device
from topt_deploy.prompts.encode import Encoder, PooledEncoder, limit_pixels
from topt_deploy.prompts.families.registry import pytorch_module
from topt_deploy.prompts.pooling import Backend
from topt_deploy.prompts.templates import Templates, load_templates

from .checkpoint import OTHER, PRECISIONS, Checkpoint, open_checkpoint, quiet
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
    check_device(device)
    return pytorch_module(checkpoint.spec.family).make_backend(checkpoint, PRECISIONS[precision], device)
