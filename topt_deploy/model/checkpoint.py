"""Weights and optimiser state as safetensors: no pickle, and whole or absent."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn, optim

from topt_deploy.config.load import config_from_dict
from topt_deploy.data.city import Schema
from topt_deploy.errors import BadConfig, BadData
from topt_deploy.storage.atomic import atomic_file
from topt_deploy.storage.os_errors import reading

from .topt import ModelSpec, TopT

_MODEL, _OPTIMISER, _RANDOM = "model.", "optimiser.", "random."


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # save_file has a temporary file of its own in the same folder, whose name nobody knows who would sweep it.
    data = save(plain, metadata={"facts": json.dumps(facts)})
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        NoInput: If the file is missing.
        BadData: If it is not a whole safetensors file.
    """
    with reading(path):
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("facts", "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
        except SafetensorError as error:
            raise BadData(f"not a whole safetensors file ({error})", file=path, fix="train again") from error


def save_training(path: Path, module: nn.Module, optimiser: optim.Optimizer, facts: Mapping[str, Any]) -> None:
    """A checkpoint from which training goes on as if it had never stopped: weights, moments, random state."""
    tensors = {_MODEL + name: tensor for name, tensor in module.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"{_OPTIMISER}{index}.{key}"] = torch.as_tensor(value)
    tensors[_RANDOM + "cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[_RANDOM + "cuda"] = torch.cuda.get_rng_state()
    save_tensors(path, tensors, facts)


def restore_training(path: Path, module: nn.Module, optimiser: optim.Optimizer, *, identity: str) -> dict[str, Any]:
    """Put back what :func:`save_training` wrote, and return its facts.

    Raises:
        BadConfig: If the checkpoint's ``identity``, the hash of all that training depends on, is another.
    """
    tensors, facts = load_tensors(path)
    if facts.get("identity") != identity:
        raise BadConfig(
            "this checkpoint belongs to other data or another configuration",
            file=path,
            fix="resume with the files and settings the run began with, or start a new run",
        )
    module.load_state_dict({k.removeprefix(_MODEL): v for k, v in tensors.items() if k.startswith(_MODEL)})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMISER):
            index, key = name.removeprefix(_OPTIMISER).split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    torch.set_rng_state(tensors[_RANDOM + "cpu"])
    if torch.cuda.is_available() and _RANDOM + "cuda" in tensors:
        torch.cuda.set_rng_state(tensors[_RANDOM + "cuda"])
    return facts


def save_model(path: Path, model: TopT) -> None:
    """The fused model's weights with the specification to build it from."""
    spec = model.spec
    facts = {
        "config": spec.config.as_dict(),
        "schema": {
            "views": {view: list(names) for view, names in spec.schema.views.items()},
            "mobility": spec.schema.mobility,
            "prompts": dict(spec.schema.prompts),
            "places": spec.schema.places,
        },
        "ranks": dict(spec.ranks),
        "rows": dict(spec.rows),
        "leverage": spec.leverage,
    }
    save_tensors(path, model.state_dict(), facts)


def load_model(path: Path) -> TopT:
    """Build and fill the fused model, in evaluation mode, on the CPU."""
    tensors, facts = load_tensors(path)
    schema = facts["schema"]
    spec = ModelSpec(
        config=config_from_dict(facts["config"], str(path)),
        schema=Schema(
            views={view: tuple(names) for view, names in schema["views"].items()},
            mobility=schema["mobility"],
            prompts=schema["prompts"],
            places=schema.get("places", True),
        ),
        ranks=facts["ranks"],
        rows=facts.get("rows", {}),
        leverage=facts.get("leverage", 0),
    )
    model = TopT(spec)
    model.load_state_dict(tensors)
    return model.eval()
