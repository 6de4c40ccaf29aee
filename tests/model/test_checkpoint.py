import os
import subprocess

import pytest
import torch
from torch import nn, optim

from topt_deploy.errors import BadData, CannotCreate, Exit, IOFailure, NoInput
from topt_deploy.model.checkpoint import load_tensors, restore_training, save_tensors, save_training


def test_tensors_and_facts_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(2.5, dtype=torch.float64), "c": torch.arange(3)}
    tensors["view"] = tensors["a"].T  # not contiguous
    save_tensors(path, tensors, {"epoch": 3, "name": "café"})
    loaded, facts = load_tensors(path)
    assert facts == {"epoch": 3, "name": "café"}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_holds_no_pickle(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, {})
    start = (tmp_path / "x.safetensors").read_bytes()[:9]
    assert start[8:9] == b"{"  # a length and then JSON


def test_a_missing_file(tmp_path):
    with pytest.raises(NoInput, match="no such file"):
        load_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadData, match="not a whole safetensors file") as caught:
        load_tensors(path)
    assert str(path) in str(caught.value)


def test_a_missing_folder(tmp_path):
    with pytest.raises(CannotCreate):
        save_tensors(tmp_path / "no" / "x.safetensors", {"a": torch.zeros(2)}, {})


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_an_input_output_failure_and_keeps_the_old_file(tiny_disk):
    path = tiny_disk / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(8)}, {"old": True})
    with pytest.raises(IOFailure, match="No space left") as caught:
        save_tensors(path, {"a": torch.zeros(1 << 20)}, {})
    assert caught.value.exit_code == Exit.IO_ERROR
    assert load_tensors(path)[1] == {"old": True}
    assert [file.name for file in tiny_disk.iterdir()] == ["x.safetensors"]


def training(dropout=0.4):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))
    return module, optim.Adam(module.parameters(), lr=0.05, weight_decay=1e-3, fused=True)


def steps(module, optimiser, count):
    x = torch.linspace(-1, 1, 20).reshape(5, 4)
    for _ in range(count):
        optimiser.zero_grad()
        module(x).square().mean().backward()
        optimiser.step()


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    module, optimiser = training()
    steps(module, optimiser, 5)
    save_training(tmp_path / "c.safetensors", module, optimiser, {"epoch": 5, "identity": "x"})
    steps(module, optimiser, 7)

    again, fresh = training()
    torch.manual_seed(999)
    assert restore_training(tmp_path / "c.safetensors", again, fresh, identity="x") == {"epoch": 5, "identity": "x"}
    steps(again, fresh, 7)
    expected = module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_a_checkpoint_without_optimiser_state_would_show(tmp_path):
    """The test above can fail: weights and random state alone are not enough."""
    module, optimiser = training()
    steps(module, optimiser, 5)
    save_training(tmp_path / "c.safetensors", module, optimiser, {"identity": "x"})
    steps(module, optimiser, 7)
    again, fresh = training()
    restore_training(tmp_path / "c.safetensors", again, fresh, identity="x")
    fresh.state.clear()
    steps(again, fresh, 7)
    assert not torch.equal(again[0].weight, module[0].weight)
