"""Tiny models of every family, exported: tracing takes seconds, so each of a model's layers is traced once."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from encoders_deepseek import tiny_deepseek
from encoders_mllama import tiny_mllama
from encoders_qwen import tiny_qwen
from encoders_text import tiny_text
from safetensors.torch import load_file, save_file

from topt_deploy.export.prompts import assemble, encoder_bundle
from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
from topt_deploy.prompts.templates import load_templates
from topt_deploy.storage.atomic import atomic_folder

OUTLIER = 60.0


def tiny_text_with_an_outlier(folder: Path) -> None:
    """A text-only model whose second layer has a channel :data:`OUTLIER` times as large as the others.

    What reads the channel divides by that again: the same function as without, exactly, until it is rounded.
    """
    tiny_text(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.input_layernorm.weight"][3] *= OUTLIER
    for part in "qkv":
        tensors[f"model.layers.1.self_attn.{part}_proj.weight"][:, 3] /= OUTLIER
    save_file(tensors, file, metadata={"format": "pt"})


MAKERS: dict[str, Callable[[Path], Any]] = {
    "text": tiny_text_with_an_outlier,
    "qwen2_5_vl": tiny_qwen,
    "mllama": tiny_mllama,
    "deepseek_vl2": tiny_deepseek,
}
FAMILIES = tuple(MAKERS)
EXPORTED = {
    "text": ("fp32", "fp16", "int8", "int4"),
    "qwen2_5_vl": ("fp32", "int8", "int4"),
    "mllama": ("fp32",),
    "deepseek_vl2": ("fp32",),
}
"""What is exported of each family."""


def export_all(model: Path, folder: Path, precisions: Sequence[str]) -> None:
    """Export a model in every precision to ``folder/<precision>.topt``."""
    torch.set_num_threads(1)
    folder.mkdir()
    checkpoint = open_checkpoint(str(model))
    with ExitStack() as stack:
        # Pieces are the same from one precision to the next, and so are their traces.
        stack.enter_context(patch.object(encoder_bundle, "recipe", cache(encoder_bundle.recipe)))
        stack.enter_context(patch.object(assemble, "trace", cache(assemble.trace)))
        for precision in precisions:
            with atomic_folder(folder / f"{precision}.topt") as place:
                encoder_bundle.export_encoder(
                    checkpoint, place, precision=precision, templates=load_templates(), say=lambda _: None
                )
