"""A checkpoint's tensors under the export's names: all that a recipe needs is there, and nothing else is left over."""

from dataclasses import replace

import pytest
import torch
from encoders_exported import FAMILIES
from safetensors.torch import load_file

from topt_deploy.errors import BadData, UsageError
from topt_deploy.export.prompts.checkpoint_tensors import Tensors, recipe
from topt_deploy.prompts.pytorch.checkpoint import OTHER, open_checkpoint

UNREAD = ("lm_head", "language.lm_head", "language_model.lm_head", "vision.attn_pool")
"""What no hidden state depends on."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_asked_for_and_there(tiny_models, family):
    checkpoint = open_checkpoint(str(tiny_models(family)))
    made = recipe(checkpoint)
    tensors = Tensors(checkpoint, made.canonical)
    needed = {made.embedding: None}
    for network in made.networks:
        for use in network.uses:
            with torch.device("meta"):
                module = use.piece.build()
            needed |= {use.weight(name): parameter for name, parameter in module.named_parameters()}
    for name, parameter in needed.items():
        assert parameter is None or tensors.load(name).numel() == parameter.numel(), name
    held = {made.canonical(name) for file in checkpoint.weights for name in load_file(file)}
    assert {name for name in held - needed.keys() if not name.startswith(UNREAD)} == set()


def test_what_tensors_are(tiny_models):
    checkpoint = open_checkpoint(str(tiny_models("deepseek_vl2")))
    assert len(checkpoint.weights) == 2
    made = recipe(checkpoint)
    tensors = Tensors(checkpoint, made.canonical)
    stored = {made.canonical(n): t for file in checkpoint.weights for n, t in load_file(file).items()}
    assert tensors.count() == sum(tensor.numel() for tensor in stored.values())
    for name, tensor in stored.items():
        assert tensors.shape(name) == tuple(tensor.shape)
        assert torch.equal(tensors.load(name), tensor)
    assert torch.equal(tensors.rows(made.embedding, 3, 9), stored[made.embedding][3:9])


def test_a_weight_that_is_not_there(tiny_models):
    checkpoint = open_checkpoint(str(tiny_models("text")))
    tensors = Tensors(checkpoint, recipe(checkpoint).canonical)
    for ask in (tensors.load, tensors.shape, lambda name: tensors.rows(name, 0, 1)):
        with pytest.raises(BadData, match="lack a weight") as refused:
            ask("model.layers.9.mlp.up_proj.weight")
        assert refused.value.expected == "model.layers.9.mlp.up_proj.weight"


def test_a_family_without_a_recipe(tiny_models):
    checkpoint = open_checkpoint(str(tiny_models("text")))
    with pytest.raises(UsageError, match="can be run in PyTorch only"):
        recipe(replace(checkpoint, spec=replace(checkpoint.spec, family=OTHER)))
