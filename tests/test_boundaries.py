"""Who may import whom, checked by reading every import statement of the tree."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "topt_deploy": "topt_deploy",
    "train": "topt_deploy.train",
    "export": "topt_deploy.export",
    "runtime": "topt_deploy.runtime",
}
STAGES = PACKAGES.keys() - {"topt_deploy"}
# What is gated is what serves, so export runs a bundle with the runtime itself. No other stage imports another.
ALLOWED = {("export", "runtime")}

# What predicts may import this and nothing else, so that the runtime image stays as small as it is promised.
SERVING = sys.stdlib_module_names | {"topt_deploy", "numpy", "pyarrow", "click"}
SERVING_EXTRAS = {
    "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "tokenizers", "PIL", "shapely", "pyogrio", "pyproj",
    "cryptography", "ray", "pyspark", "py4j",
}  # fmt: skip
# Nobody who has no geometries, or whose prompts are encoded, should need these, nor wait for them to load.
ONLY_IN_FUNCTIONS = {
    "shapely", "pyogrio", "pyproj", "openvino", "tensorrt", "tensorrt_rtx", "tokenizers", "PIL", "cryptography", "ray",
    "pyspark",
}  # fmt: skip


class Import(NamedTuple):
    line: int
    name: str  # absolute and in full: `from ..graph import knn` is topt_deploy.graph.knn
    relative: bool
    in_function: bool


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def imports(tree: ast.AST, package: str, in_function: bool = False) -> Iterator[Import]:
    """Every import below `tree`, part of a module of `package`; import_module("literal") is one too."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield Import(node.lineno, alias.name, False, in_function)
            case ast.ImportFrom():
                parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                for alias in node.names:
                    name = ".".join([*parents, *filter(None, [node.module]), alias.name])
                    yield Import(node.lineno, name, bool(node.level), in_function)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(node.lineno, name, False, in_function)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, package, in_function or function)


def needs_pytorch(module: str) -> bool:
    """Whether this module of the core is one of those that import PyTorch: in topt_deploy.model, or named pytorch."""
    return within(module, "topt_deploy.model") or (within(module, "topt_deploy") and "pytorch" in module.split("."))


def faults(area: str, found: Import) -> Iterator[str]:
    """What is wrong with an import found in `area`: core, pytorch (the core's part that needs it) or a stage."""
    root = found.name.split(".")[0]
    if root in STAGES:
        yield f"{root} is importable only from the repository's root"
    owner = next((stage for stage in STAGES if within(found.name, PACKAGES[stage])), "core")
    if owner in STAGES and owner != area and (area, owner) not in ALLOWED:
        yield f"{area} imports the stage {owner}"
    elif owner in STAGES and owner == area and not found.relative:
        yield "a stage's own modules are imported relatively"
    elif owner in STAGES and owner != area and found.relative:
        yield "another stage is imported absolutely"
    elif owner == "core" and area in STAGES and found.relative:
        yield "the core is imported absolutely"
    if area in ("core", "runtime"):
        if root not in SERVING | SERVING_EXTRAS | STAGES:
            yield f"{root} is not installed where predictions are made"
        if needs_pytorch(found.name):
            yield f"{found.name} needs torch, which is not installed where predictions are made"
    if root in ONLY_IN_FUNCTIONS and not found.in_function:
        yield f"{root} is optional: import it inside the function that needs it"


def check(root: Path) -> tuple[set[str], list[str]]:
    """The areas that hold code, and every fault as `file:line: what`."""
    areas, report = set(), []
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            below = path.relative_to(root / folder).parent.parts
            module = ".".join([package, *below, path.stem])
            area = folder if folder in STAGES else "pytorch" if needs_pytorch(module) else "core"
            areas.add(area)
            for found in imports(ast.parse(path.read_text()), ".".join([package, *below])):
                where = f"{path.relative_to(root)}:{found.line}"
                report += [f"{where}: {fault}" for fault in faults(area, found)]
    return areas, report


def test_the_tree_keeps_the_boundaries():
    areas, report = check(ROOT)
    assert areas == {"core", "pytorch", "train", "export", "runtime"}
    assert not report, "\n".join(report)


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("topt_deploy/graph.py", "from topt_deploy.train import data", "core imports the stage train"),
        ("topt_deploy/graph.py", "def f():\n    from .runtime import x", "core imports the stage runtime"),
        ("topt_deploy/cli.py", "from topt_deploy import export", "core imports the stage export"),
        ("topt_deploy/model/srel.py", "from ..train import loop", "pytorch imports the stage train"),
        ("topt_deploy/graph.py", "import torch", "torch is not installed"),
        ("topt_deploy/graph.py", "def f():\n    import torch.nn as nn", "torch is not installed"),
        ("topt_deploy/graph.py", "if x:\n    y = importlib.import_module('torch')", "torch is not installed"),
        ("topt_deploy/graph.py", "from .model import srel", "topt_deploy.model.srel needs torch"),
        ("topt_deploy/prompts/pooling.py", "from .pytorch import load", "prompts.pytorch.load needs torch"),
        ("topt_deploy/prompts/families/qwen/host.py", "from .pytorch import Backend", "pytorch.Backend needs torch"),
        (
            "topt_deploy/prompts/families/qwen/pytorch.py",
            "from ....train import loop",
            "pytorch imports the stage train",
        ),
        ("topt_deploy/graph.py", "import shapely", "shapely is optional"),
        ("topt_deploy/model/srel.py", "from shapely import wkb", "shapely is optional"),
        ("train/loop.py", "from topt_deploy.export import onnx", "train imports the stage export"),
        ("train/loop.py", "from ..export import onnx", "train imports the stage export"),
        ("train/loop.py", "from topt_deploy.train import data", "imported relatively"),
        ("train/loop.py", "from ..graph import knn", "imported absolutely"),
        ("train/report/page.py", "from ...features import knn", "imported absolutely"),
        ("train/report/page.py", "from topt_deploy.train.run import x", "imported relatively"),
        ("train/evaluation/literature/mgfn.py", "from ....export import x", "train imports the stage export"),
        ("export/parity.py", "import runtime.session", "runtime is importable only"),
        ("export/parity.py", "from topt_deploy.train import run", "export imports the stage train"),
        ("export/parity.py", "from ..runtime import predictor", "another stage is imported absolutely"),
        ("runtime/selftest.py", "from topt_deploy.export import parity", "runtime imports the stage export"),
        ("train/loop.py", "from topt_deploy.runtime import load", "train imports the stage runtime"),
        ("runtime/predict.py", "from train import data", "train is importable only"),
        ("runtime/predict.py", "from topt_deploy.model import srel", "topt_deploy.model.srel needs torch"),
        ("runtime/predict.py", "from topt_deploy.prompts.pytorch import load", "prompts.pytorch.load needs torch"),
        ("runtime/predict.py", "async def f():\n    import transformers", "transformers is not installed"),
        ("runtime/io/read.py", "from ...train import data", "runtime imports the stage train"),
        ("runtime/io/read.py", "class A:\n    import pandas", "pandas is not installed"),
        *(("runtime/x.py", f"import {x}", x) for x in ["onnx", "sklearn", "scipy", "geopandas", "rich"]),
    ],
)
def test_a_planted_fault_is_found(tmp_path, file, source, fault):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (line,) = check(tmp_path)[1]
    assert line.startswith(f"{file}:{source.count(chr(10)) + 1}: ")
    assert fault in line


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("topt_deploy/cli.py", "import click\nCOMMANDS = {'train': 'topt_deploy.train.cli'}"),
        ("topt_deploy/cli.py", "def f(name):\n    return import_module(COMMANDS[name])"),
        ("topt_deploy/geo.py", "def f():\n    import shapely, pyogrio"),
        ("topt_deploy/model/srel.py", "import torch\nfrom torch import nn\nfrom ..errors import BadInput"),
        ("train/loop.py", "import torch, sklearn\nfrom . import data\nfrom topt_deploy.model import srel"),
        ("train/evaluation/plain.py", "from ..report import page\nfrom .problem import Method"),
        ("train/evaluation/literature/mgfn.py", "from ...run import x\nfrom topt_deploy.features import y"),
        ("export/onnx.py", "import onnx, torch\nfrom topt_deploy import bundle"),
        ("export/parity.py", "from topt_deploy.runtime.predictor import load"),
        ("topt_deploy/prompts/families/qwen/pytorch.py", "import torch, transformers\nfrom .host import Settings"),
        ("topt_deploy/prompts/pytorch/load.py", "import torch\nfrom ..families.qwen.pytorch import Backend"),
        ("runtime/session.py", "import onnxruntime, pyarrow.parquet\nfrom topt_deploy.bundle import load"),
    ],
)
def test_what_is_allowed_passes(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert check(tmp_path)[1] == []
