"""NVIDIA's driver as ctypes sees it, with a library of our own in its place; and the real one's absence."""

import ctypes
import gc
import subprocess
import sys

import numpy as np
import pytest
from fake_gpu import fake_libcuda

from topt_deploy.errors import NoDevice
from topt_deploy.tensorrt import cuda_driver
from topt_deploy.tensorrt.cuda_driver import Driver


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return str(fake_libcuda(tmp_path_factory.mktemp("cuda")))


def test_what_a_gpu_is(library, monkeypatch, tmp_path):
    (tmp_path / "version").write_text("580.95.05\n")
    monkeypatch.setattr(cuda_driver, "KERNEL_MODULE", tmp_path / "version")
    found = Driver(library).gpu
    assert vars(found) == {
        "name": "NVIDIA Make-believe 0", "capability": "8.9", "memory": 24 << 30, "cuda": "13.2", "driver": "580.95.05",
    }  # fmt: skip
    assert str(found) == "NVIDIA Make-believe 0 (compute capability 8.9, CUDA 13.2)"
    monkeypatch.setattr(cuda_driver, "KERNEL_MODULE", tmp_path / "absent")
    assert Driver(library).gpu.driver == ""


def test_no_driver():
    with pytest.raises(NoDevice, match="no NVIDIA driver") as caught:
        Driver("libcuda-of-nobody.so.1")
    assert "cannot open shared object file" in caught.value.found
    assert "--device cpu" in caught.value.fix


@pytest.mark.parametrize(
    ("setting", "value", "part"),
    [
        ("FAKE_CUDA_INIT", "100", "CUDA_ERROR_NO_DEVICE (100): no GPU can be seen"),
        ("FAKE_CUDA_INIT", "803", "restart after an update"),
        ("FAKE_CUDA_INIT", "3", "forked"),
        ("FAKE_CUDA_INIT", "777", "CUDA_ERROR_OF_SOME_KIND (777)"),
        ("FAKE_CUDA_GPUS", "0", "no GPU can be seen"),
    ],
)
def test_errors_are_explained(library, setting, value, part, monkeypatch):
    monkeypatch.setenv(setting, value)
    with pytest.raises(NoDevice) as caught:
        Driver(library)
    assert part in caught.value.found


def test_memory_goes_there_and_back_and_is_given_back(library):
    driver = Driver(library)
    blocks = ctypes.CDLL(library).fake_blocks
    before = blocks()
    a = np.arange(7, dtype=np.float32)
    one, two = driver.allocate(a.nbytes), driver.allocate(a.nbytes)
    driver.upload(one.address, a.ctypes.data, a.nbytes)
    driver.copy(two.address, one.address, a.nbytes)
    back = np.empty_like(a)
    driver.download(back.ctypes.data, two.address, a.nbytes)
    driver.wait()
    assert np.array_equal(a, back)
    nothing = driver.allocate(0)
    assert nothing.address
    assert blocks() == before + 3
    del one, two, nothing
    gc.collect()
    assert blocks() == before


def test_memory_that_cannot_be_had(library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_BYTES", "1000")
    driver = Driver(library)
    with pytest.raises(NoDevice, match="cuMemAllocAsync") as caught:
        driver.allocate(1 << 30)
    assert "its memory is full" in caught.value.found


def test_asking_imports_nothing():
    heavy = "[m for m in ('numpy', 'torch', 'onnxruntime') if m in sys.modules]"
    code = f"import sys, topt_deploy.tensorrt.cuda_driver; print({heavy})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
