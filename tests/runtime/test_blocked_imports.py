"""`topt-run` works where PyTorch and the like cannot be imported, and starts without what it does not need."""

import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from commands import environment
from encode_city import write_city

BLOCKED = (
    "torch", "transformers", "onnx", "onnxscript", "sklearn", "scipy", "pandas", "geopandas", "rich", "shapely",
    "pyogrio", "pyproj", "safetensors",
)  # fmt: skip
BLOCK = f"""
import sys
class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocked)
"""
MAIN = """
from topt_deploy.runtime.cli import main
main()
"""


def python(code, *arguments, folder):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment(), capture_output=True, text=True
    )


def test_the_block_holds(tmp_path):
    for name in BLOCKED:
        assert f"{name} is blocked" in python(f"{BLOCK}\nimport {name}", folder=tmp_path).stderr


@pytest.mark.parametrize("arguments", [(), ("--wide", "--task", "crime")])
def test_predict_works_end_to_end(arguments, desk, topt_run):
    done = python(BLOCK + MAIN, "predict", "regions.parquet", *arguments, folder=desk.folder)
    assert done.returncode == 0, done.stderr
    blocked = desk.out.read_bytes()
    assert pq.read_table(desk.out).num_rows == (77 if arguments else 231)
    assert topt_run("predict", desk.regions, *arguments).code == 0
    assert desk.out.read_bytes() == blocked, "the same bytes as with everything installed"


def test_predict_has_its_memory_from_the_system(desk):
    """Arrow's own allocator takes 10 MB more, and is chosen for good when Arrow is imported."""
    code = """
import os
def end(code, exit=os._exit):
    import pyarrow
    print(pyarrow.default_memory_pool().backend_name, flush=True)
    exit(code)
os._exit = end
"""
    done = python(code + MAIN, "predict", "regions.parquet", folder=desk.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "system"


@pytest.mark.parametrize("command", ["info", "selftest"])
def test_the_other_commands_work_too(command, desk):
    done = python(BLOCK + MAIN, command, "model.topt", folder=desk.folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl", "mllama", "deepseek_vl2"])
def test_encode_works_too(family, encoders, tmp_path):
    write_city(tmp_path, images=family != "text")
    arguments = ("regions.parquet", "--bundle", str(encoders(family)), "--task", "crime", "--no-cache")
    done = python(BLOCK + MAIN, "encode", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 regions encoded" in done.stdout


def test_predict_makes_missing_prompts_too(prompted, tmp_path, topt_run):
    for name in ("bare.parquet", "mobility.parquet"):
        shutil.copy(prompted / name, tmp_path)
    bundle = str(prompted / "model.topt")
    done = python(BLOCK + MAIN, "predict", "bare.parquet", "--bundle", bundle, "--no-cache", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    blocked = (tmp_path / "predictions.parquet").read_bytes()
    assert topt_run("predict", tmp_path / "bare.parquet", "--bundle", bundle, "--no-cache").code == 0
    assert (tmp_path / "predictions.parquet").read_bytes() == blocked, "the same bytes as with everything installed"


def test_errors_need_no_more_than_success(desk):
    desk.mobility.write_bytes(b"nothing")
    done = python(BLOCK + MAIN, "predict", "regions.parquet", folder=desk.folder)
    assert done.returncode == 65
    assert "Traceback" not in done.stderr


def test_the_python_face_works_too(desk):
    code = """
import pyarrow.parquet as pq
import topt_deploy as topt
table = topt.load("model.topt").predict(pq.read_table("regions.parquet"), pq.read_table("mobility.parquet"))
print(len(table))
"""
    # Blocking pandas with an error is harsher than its absence, which pyarrow.parquet copes with.
    done = python(BLOCK + code, folder=desk.folder)
    assert done.stdout.strip() == "231", done.stderr


def test_predict_imports_nothing_that_costs_its_start(desk):
    code = f"""
import os, sys
def leave(code):
    sys.stdout.write("\\nLOADED " + " ".join(sys.modules))
    sys.stdout.flush()
os._exit = leave
{MAIN}
"""
    done = python(code, "predict", "regions.parquet", folder=desk.folder)
    loaded = set(done.stdout.split("LOADED ")[1].split())
    assert {"onnxruntime", "pyarrow", "click"} < loaded
    dear = {"pyarrow.compute", "pyarrow.dataset", "pyarrow.parquet", "pyarrow.fs", "pyarrow.pandas_compat", "numpy.ma"}
    assert not loaded & (dear | {"zipfile", "tokenizers", "PIL", *BLOCKED})
    ours = ("gpu", "engine.build", "runtime.bound", "runtime.encoder", "runtime.engines", "runtime.enginecache")
    assert not loaded & {f"topt_deploy.{name}" for name in ours}
