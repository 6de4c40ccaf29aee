"""``topt-deploy export --mlflow``: a folder that MLflow itself loads, and that predicts as the bundle in it does."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import compress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from topt_deploy.errors import BadBundle, BadConfig, BadData, UsageError
from topt_deploy.export import mlflow_model
from topt_deploy.export.mlflow_model import check_mlflow_place, write_mlflow
from topt_deploy.runtime import load

ABSENT = [name for name in ("mlflow", "pandas") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
COLUMNS = ["city_id", "region_id", "task", "prediction", "lower", "upper", "status", "reason"]


def with_flows(regions, flows):
    """As docs/how-to/mlflow.md says."""
    return regions.join(flows.groupby("origin_id")[["dest_id", "flow"]].agg(list), on="region_id")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def written(tmp_path_factory, demo_bundle):
    folder = tmp_path_factory.mktemp("mlflow") / "model"
    write_mlflow(folder, demo_bundle)
    return folder


@pytest.fixture
def model(written, quiet):
    import mlflow

    return mlflow.pyfunc.load_model(str(written))


@pytest.fixture(scope="module")
def frame(demo_city):
    """The demo as the one DataFrame that MLflow takes."""
    import pandas as pd

    regions, flows = (pd.read_parquet(demo_city / f"{name}.parquet") for name in ("regions", "mobility"))
    return with_flows(regions, flows)


@pytest.fixture(scope="module")
def expected(demo_bundle, demo_city):
    table = load(demo_bundle).predict(demo_city / "regions.parquet", demo_city / "mobility.parquet")
    return table.select(COLUMNS).to_pandas()


@pytest.mark.slow
@pytest.mark.usefixtures("demo_traced")
def test_the_command_writes_it_and_mlflow_predicts_the_same(topt_deploy, tmp_path, demo_run, frame, expected):
    import mlflow

    folder = tmp_path / "registered"
    said = topt_deploy("export", demo_run, "--out", tmp_path / "model.topt", "--mlflow", folder)
    assert said.code == 0, said.err
    assert f"mlflow {folder}" in said.out
    predicted = mlflow.pyfunc.load_model(str(folder)).predict(frame)
    assert predicted.equals(expected)
    copy = folder / "data" / "model.topt"
    bundle = {p.relative_to(tmp_path / "model.topt"): p.read_bytes() for p in (tmp_path / "model.topt").rglob("*.*")}
    assert {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*.*")} == bundle
    (tmp_path / "model.topt" / "MODEL_CARD.md").write_text("older")
    before = (tmp_path / "model.topt" / "MODEL_CARD.md").stat().st_mtime_ns
    said = topt_deploy("export", demo_run, "--out", tmp_path / "model.topt", "--mlflow", folder)
    assert said.code == 2, "an MLflow model is never written over"
    assert "already exists" in said.err
    assert (tmp_path / "model.topt" / "MODEL_CARD.md").stat().st_mtime_ns == before, "refused after the work"


def test_several_cities_are_predicted_as_wholes(model, frame, expected):
    import pandas as pd

    smaller = frame.iloc[:40].assign(city_id="smaller")
    kept = set(smaller.region_id)
    inside = [[dest in kept for dest in dests] for dests in smaller.dest_id]
    for column in ("dest_id", "flow"):
        smaller[column] = [list(compress(row, mask)) for row, mask in zip(smaller[column], inside, strict=True)]
    alone = model.predict(smaller)
    assert set(alone.city_id) == {"smaller"}
    shared = expected[expected.region_id.isin(kept)]
    assert not alone.prediction.reset_index(drop=True).equals(shared.prediction.reset_index(drop=True))
    both = model.predict(pd.concat([frame, smaller]))
    assert both.equals(pd.concat([expected, alone], ignore_index=True))


def test_the_example_in_it_is_a_golden_city(model, demo_bundle):
    predicted = model.predict(model.input_example)
    golden = pq.read_table(demo_bundle / "golden/golden-7.expected.parquet")
    for task in predicted.task.unique():  # what else the graph puts out stands there, too
        found = predicted.prediction[predicted.task == task].to_numpy()
        assert found == pytest.approx(golden.column(task).to_numpy(), rel=1e-4)


def test_the_signature_is_what_goes_in_and_comes_out(model, frame):
    import mlflow

    names = set(model.metadata.get_input_schema().input_names())
    assert names <= set(frame.columns)
    read = {
        "region_id",
        "lon",
        "lat",
        "dest_id",
        "flow",
        *(c for c in frame.columns if c.startswith(("poi_", "land_use_", "prompt_"))),
    }
    assert names == read | {"city_id"}
    predicted = model.predict(frame)
    mlflow.models.utils._enforce_schema(predicted, model.metadata.get_output_schema())
    assert list(predicted.columns) == model.metadata.get_output_schema().input_names()


def test_there_is_no_pickle_and_the_loader_is_ours(written, model):
    described = model.metadata.flavors["python_function"]
    assert described["loader_module"] == "topt_deploy.runtime.mlflow"
    suffixes = {path.suffix for path in written.rglob("*") if path.is_file()}
    assert suffixes <= {"", ".json", ".yaml", ".txt", ".topt", ".sha256", ".md", ".onnx", ".weights", ".parquet"}
    pins = (written / "requirements.txt").read_text().split()
    assert "topt-deploy[cpu]==" in " ".join(pins)
    assert not [pin for pin in pins if pin.startswith(("torch", "cloudpickle"))]


def test_serving_imports_no_torch_and_no_export(written):
    script = f"""
import sys, mlflow
model = mlflow.pyfunc.load_model({str(written)!r})
assert len(model.predict(model.input_example)) == 21
print(sorted({{"torch", "onnx", "topt_deploy.export", "cloudpickle.cloudpickle"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch" not in done.stdout
    assert "export" not in done.stdout


def test_a_changed_byte_is_refused_when_mlflow_loads_it(tmp_path, demo_bundle):
    import mlflow

    write_mlflow(tmp_path / "model", demo_bundle)
    weights = tmp_path / "model/data/model.topt/models/topt.weights"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BadBundle, match="is not the file that the manifest describes"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


def test_a_damaged_bundle_leaves_no_folder(tmp_path, desk):
    (desk.bundle / "models/topt.weights").write_bytes(b"")
    with pytest.raises(BadBundle):
        write_mlflow(tmp_path / "model", desk.bundle)
    assert not [path for path in tmp_path.iterdir() if path != desk.folder]


def test_without_mlflow_it_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_model, "find_spec", lambda name: None if name == "mlflow" else find_spec(name))
    with pytest.raises(BadConfig, match="mlflow, which is not installed") as caught:
        check_mlflow_place(tmp_path / "model")
    assert "topt-deploy[mlflow]" in caught.value.fix


def test_nothing_is_written_over(tmp_path, demo_bundle):
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        write_mlflow(tmp_path / "model", demo_bundle)
    assert list((tmp_path / "model").iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda f: f.drop(columns="flow"), "column is absent"),
        (lambda f: f.assign(flow="many"), "not equally long lists"),
        (lambda f: f.assign(flow=[[1.0]] * len(f)), "not equally long lists"),
        (lambda f: f.assign(dest_id=[["D001"]] * len(f), flow=[["many"]] * len(f)), "not ids and numbers"),
        (lambda f: f.assign(dest_id=[["X"]] * len(f), flow=[[1]] * len(f)), "names regions that the regions table"),
        (lambda f: f.assign(poi_food=["many", *[1.0] * (len(f) - 1)]), "several kinds of values"),
        (lambda f: f.assign(poi_food=-1), "counts must be finite and not negative"),
        (lambda f: f.drop(columns="poi_food"), "the categories of view 'poi' are not the model's"),
    ],
)
def test_bad_frames_are_refused_as_tables_are(model, frame, wrong, message):
    with pytest.raises(BadData, match=message):
        model.predict(wrong(frame))


def test_a_region_without_outgoing_flows_is_no_mistake(model, frame):
    silent = frame.copy()
    silent.loc[3, ["dest_id", "flow"]] = None
    silent_as_list = frame.copy()
    silent_as_list.at[3, "dest_id"] = silent_as_list.at[3, "flow"] = []
    assert model.predict(silent).equals(model.predict(silent_as_list))
    assert not model.predict(silent).equals(model.predict(frame))


def test_a_pair_that_occurs_twice_is_summed(model, frame, expected):
    halves = frame.assign(dest_id=[d * 2 for d in frame.dest_id], flow=[[f / 2 for f in row] * 2 for row in frame.flow])
    assert model.predict(halves).equals(expected)


def test_zipped_bundles_go_in_as_they_are(tmp_path, demo_bundle, frame, expected):
    import mlflow

    shutil.make_archive(str(tmp_path / "bundle"), "zip", demo_bundle)
    write_mlflow(tmp_path / "model", tmp_path / "bundle.zip")
    assert (tmp_path / "model/data/bundle.zip").is_file()
    assert mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(frame).equals(expected)


def test_a_bundle_with_its_encoder_takes_texts(tmp_path, prompted):
    """The prompts are then made on the way, and so no column of the input."""
    import mlflow
    import pandas as pd

    write_mlflow(tmp_path / "model", prompted / "model.topt")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    bare, flows = (pd.read_parquet(prompted / f"{name}.parquet") for name in ("bare", "mobility"))
    tables = [
        shutil.copy(prompted / f"{name}.parquet", tmp_path) for name in ("bare", "mobility")
    ]  # a cache comes beside
    alone = load(prompted / "model.topt").predict(*map(Path, tables))
    assert model.predict(with_flows(bare, flows)).prediction.tolist() == alone.column("prediction").to_pylist()
    assert "topt-deploy[cpu,encoder]==" in (tmp_path / "model/requirements.txt").read_text()
