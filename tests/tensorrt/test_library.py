"""Which TensorRT is found, and what is said where none is."""

import subprocess
import sys

import pytest
from engines import rtx

from topt_deploy.errors import NoDevice, UsageError
from topt_deploy.tensorrt import library as module
from topt_deploy.tensorrt.library import RTX, TENSORRT, find_library


def test_what_is_installed_is_found_with_its_version():
    found = rtx()
    assert found.flavour == RTX
    assert found.version == found.module.__version__
    assert found.title == f"TensorRT-RTX {found.version}"


def test_either_is_taken_where_none_is_named(monkeypatch):
    """The first of the two that loads; here that is a module of ours."""
    monkeypatch.setitem(module.MODULES, TENSORRT, "no_such_tensorrt")
    monkeypatch.setitem(module.MODULES, RTX, "topt_deploy")
    assert find_library().flavour == RTX
    monkeypatch.setitem(module.MODULES, TENSORRT, "topt_deploy")
    assert find_library().flavour == TENSORRT


@pytest.mark.parametrize(
    ("flavour", "parts"),
    [
        (TENSORRT, ["no_such_tensorrt", "topt-deploy[trt]", "TensorRT 11", "libnvinfer.so.10"]),
        (RTX, ["no_such_rtx", "topt-deploy[rtx]"]),
        (None, ["no_such_tensorrt", "no_such_rtx", "topt-deploy[trt]", "topt-deploy[rtx]"]),
    ],
)
def test_what_is_absent_is_named_with_what_to_install(monkeypatch, flavour, parts):
    monkeypatch.setitem(module.MODULES, TENSORRT, "no_such_tensorrt")
    monkeypatch.setitem(module.MODULES, RTX, "no_such_rtx")
    with pytest.raises(NoDevice) as refused:
        find_library(flavour)
    for part in parts:
        assert part in str(refused.value)


def test_a_library_that_does_not_load_is_as_good_as_absent(tmp_path, monkeypatch):
    """What TensorRT's package does where its libraries are not there."""
    (tmp_path / "half_installed.py").write_text("import ctypes\nctypes.CDLL('libnvinfer.so.999')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(module.MODULES, TENSORRT, "half_installed")
    with pytest.raises(NoDevice, match="does not load") as refused:
        find_library(TENSORRT)
    assert "libnvinfer.so.999" in refused.value.found


def test_an_unknown_flavour():
    with pytest.raises(UsageError, match="no such flavour"):
        find_library("trt")


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, topt_deploy.tensorrt.build, topt_deploy.tensorrt.profile; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "onnx", "tensorrt", "tensorrt_rtx", "numpy", "onnxruntime"} & set(loaded)
