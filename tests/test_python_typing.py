"""A type checker sees the public names from outside, in a client's program and the package as it is installed."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from commands import shell

ROOT = Path(__file__).parent.parent
SETTINGS = """\
[mypy]
strict = true
mypy_path = site
[mypy-topt_deploy.*]
ignore_errors = true
[mypy-torch.*,transformers.*,sklearn.*,rich.*,onnxruntime.*,pyarrow.*,onnx.*,openvino.*,numpy.*]
follow_imports = skip
ignore_missing_imports = true
"""
RIGHT = """\
from pathlib import Path

import polars as pl

import topt_deploy as topt

built: topt.BuildReport = topt.build("chicago.toml", Path("chicago"), since="2019-01-01", on_bad_row="quarantine")
pairs: tuple[int, float] | None = built.flows
set_aside: int = topt.build({"regions": {"grid": "h3:8", "boundary": "edge.geojson"}}, "chicago/").set_aside
run = topt.train("chicago/", tasks=["crime"], set={"srel.epochs": 100})
mae: float = run.metrics["crime"].held_out.mae
bundle: Path = run.export("model.topt", encoder_precision="int8")
page: Path = run.report("report.html")
model: topt.Model = topt.load(bundle, device="cpu")
tasks: tuple[str, ...] = model.tasks
columns: dict[str, str] = dict(model.inputs.regions)
regions = pl.read_parquet("regions.parquet")
frame: pl.DataFrame = model.predict(regions, Path("mobility.parquet"), on_bad_row="mask")
table = model.predict("regions.parquet", tasks="crime", wide=True)
prompts: pl.DataFrame = topt.encode(regions, bundle="encoder.topt")
version: str = topt.__version__
try:
    model.selftest()
except topt.ToptError as error:
    print(error.fix)
"""
WRONG = {
    'topt.load("model.topt", device="gpu")': "arg-type",
    "topt.load(3)": "arg-type",
    "model.predict(3)": "call-overload",
    'model.predict("regions.parquet", on_bad_rows="mask")': "call-overload",
    'model.predict("regions.parquet", on_bad_row="ignore")': "call-overload",
    'number: int = model.predict(regions, "mobility.parquet")': "assignment",
    'run.metrics["crime"].heldout': "attr-defined",
    "topt.nothing": "attr-defined",
    'run.export(format="tflite")': "arg-type",
    'topt.train("chicago/", epochs=3)': "call-arg",
    'topt.build("chicago.toml")': "call-arg",
    'topt.build("chicago.toml", "chicago/", on_bad_row="mask")': "arg-type",
    "topt.encode(regions, bundle=3)": "call-overload",
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a wheel installs it, the stages within it, and a client's settings of mypy."""
    folder = tmp_path_factory.mktemp("client")
    places = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    package = folder / "site" / "topt_deploy"
    package.mkdir(parents=True)
    for part in (ROOT / places["topt_deploy"]).iterdir():
        (package / part.name).symlink_to(part)
    for name, place in places.items():
        if name != "topt_deploy":
            (package / name.rpartition(".")[2]).symlink_to(ROOT / place)
    (folder / "mypy.ini").write_text(SETTINGS)
    return folder


@pytest.mark.slow
def test_a_client_is_checked(client: Path):
    """One run of mypy for what is right and what is wrong: it reads the package for seconds."""
    first = len(RIGHT.splitlines()) + 1
    (client / "client.py").write_text(RIGHT + "\n".join(WRONG) + "\n")
    said = shell(f"{sys.executable} -m mypy --config-file mypy.ini --hide-error-context client.py", client)
    errors = re.findall(r"^client\.py:(\d+): error: .*\[([a-z-]+)\]$", said.out, re.MULTILINE)
    expected = {str(first + line): code for line, code in enumerate(WRONG.values())}
    assert {line: code for line, code in errors} == expected, said
