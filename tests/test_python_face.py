"""``import topt_deploy as topt``: each public function once, with the tables that users hold in Python."""

import ast
import inspect
import os
import pickle
import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import click
import geopandas
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from commands import PATIENCE_S, Desk, shell
from open_data import middle, squares, write

import topt_deploy as topt
from topt_deploy.errors import BadBundle, BadConfig, BadData, NoInput, UsageError
from topt_deploy.export.cli.export import export as export_command
from topt_deploy.export.export_run import export_run
from topt_deploy.runtime.cli.encode import encode as encode_command
from topt_deploy.runtime.cli.predict import predict as predict_command
from topt_deploy.train.cli.build import build as build_command
from topt_deploy.train.cli.encode import encode as encode_with_pytorch
from topt_deploy.train.cli.report import report as report_command
from topt_deploy.train.cli.train import train as train_command


@pytest.fixture(scope="module")
def model(demo_bundle: Path) -> topt.Model:
    return topt.load(demo_bundle)


@pytest.fixture(scope="module")
def tables(demo_city: Path) -> tuple[pa.Table, pa.Table]:
    regions, mobility = (pq.ParquetFile(demo_city / f"{name}.parquet").read() for name in ("regions", "mobility"))
    return regions, mobility


@pytest.fixture(scope="module")
def expected(demo_city: Path, demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """What the command line predicts."""
    out = tmp_path_factory.mktemp("expected") / "predictions.parquet"
    said = shell(f"topt-run predict {demo_city} --bundle {demo_bundle} --out {out}", demo_city)
    assert said.code == 0, said
    return pq.ParquetFile(out).read()


def without_geometry(table: pa.Table) -> dict[str, list]:
    return {name: table.column(name).to_pylist() for name in table.column_names if name != "geometry"}


def same(found: pd.DataFrame | pl.DataFrame | pa.Table, expected: pa.Table) -> bool:
    if isinstance(found, pd.DataFrame):
        found = pa.Table.from_pandas(pd.DataFrame(found).drop(columns="geometry", errors="ignore"))
    elif isinstance(found, pl.DataFrame):
        found = found.to_arrow()
    return without_geometry(found) == without_geometry(expected)


class TestPredict:
    def test_paths_are_what_the_command_line_predicts(self, model, demo_city, expected):
        regions, mobility = demo_city / "regions.parquet", demo_city / "mobility.parquet"
        for given in ((regions, mobility), (str(regions), str(mobility)), (str(regions),), (demo_city,)):
            found = model.predict(*given)
            assert isinstance(found, pa.Table)
            assert found.equals(expected, check_metadata=True)

    def test_arrow_tables_batches_datasets_and_streams(self, model, tables, expected):
        regions, mobility = tables
        assert model.predict(regions, mobility).equals(expected, check_metadata=True)
        (batch,) = regions.combine_chunks().to_batches()
        found = model.predict(batch, mobility)
        assert isinstance(found, pa.RecordBatch)
        assert same(pa.Table.from_batches([found]), expected)
        assert same(model.predict(ds.dataset(regions), ds.dataset(mobility)), expected)
        assert same(model.predict(pa.RecordBatchReader.from_batches(regions.schema, [batch]), mobility), expected)

    def test_pandas(self, model, tables, expected):
        regions, mobility = (table.to_pandas() for table in tables)
        found = model.predict(regions, mobility)
        assert type(found) is pd.DataFrame
        assert same(found, expected)
        assert same(model.predict(regions.set_index("region_id"), mobility), expected)
        assert same(model.predict(regions.astype({"region_id": "category"}), mobility), expected)

    def test_polars(self, model, tables, expected):
        regions, mobility = (pl.from_arrow(table) for table in tables)
        found = model.predict(regions, mobility)
        assert type(found) is pl.DataFrame
        assert same(found, expected)

    def test_geopandas(self, model, tables, expected):
        frame, mobility = tables[0].to_pandas(), tables[1].to_pandas()
        points = geopandas.points_from_xy(frame["lon"], frame["lat"])
        frame = frame.drop(columns=["lon", "lat", "geometry"], errors="ignore")
        regions = geopandas.GeoDataFrame(frame, geometry=points, crs="EPSG:4326")
        found = model.predict(regions, mobility)
        assert type(found) is geopandas.GeoDataFrame
        assert found.crs == regions.crs
        assert same(found, expected)
        wide = model.predict(regions.rename_geometry("shape"), mobility, wide=True)
        assert wide.active_geometry_name == "shape"
        assert wide.geometry.geom_equals(regions.geometry).all()
        with pytest.raises(BadData, match="another reference system"):
            model.predict(regions.to_crs(3857), mobility)
        with pytest.raises(BadData):
            model.predict(regions.set_crs(None, allow_override=True), mobility)

    def test_any_table_that_streams_arrow(self, model, tables, expected):
        class Stream:
            def __init__(self, table: pa.Table) -> None:
                self.table = table

            def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
                return self.table.__arrow_c_stream__(requested_schema)

        regions, mobility = tables
        place = regions.schema.get_field_index("region_id")
        views = regions.set_column(place, "region_id", regions.column("region_id").cast(pa.string_view()))
        found = model.predict(Stream(views), Stream(mobility))
        assert isinstance(found, pa.Table)
        assert same(found, expected)

    def test_options_have_the_command_lines_names(self, model, tables, expected):
        regions, mobility = tables
        one = model.predict(regions, mobility, tasks="crime")
        assert one.equals(model.predict(regions, mobility, tasks=["crime"]))
        assert set(one.column("task").to_pylist()) == {"crime"}
        renamed = regions.rename_columns(["area" if n == "region_id" else n for n in regions.column_names])
        assert same(model.predict(renamed, mobility, id_col="area"), expected)
        narrow, wide = (model.predict(regions, mobility, coverage=c, wide=True) for c in (0.5, 0.9))
        assert narrow.column("crime_upper")[0].as_py() < wide.column("crime_upper")[0].as_py()

    def test_bad_rows_are_refused_masked_or_left_out_with_a_warning(self, model, tables):
        regions, mobility = (table.to_pandas() for table in tables)
        column = next(name for name in regions if name.startswith("poi_"))
        regions[column] = regions[column].astype(float)
        regions.loc[3, column] = -1
        with pytest.raises(BadData, match="counts must be finite"):
            model.predict(regions, mobility)
        with pytest.warns(topt.RowsSetAside, match="masked: 1 bad_count"):
            masked = model.predict(regions, mobility, wide=True, on_bad_row="mask")
        assert masked.loc[3, "status"] == "masked"
        gone = mobility[~mobility[["origin_id", "dest_id"]].isin([regions["region_id"][3]]).any(axis=1)]
        with pytest.warns(topt.RowsSetAside, match="left out: 1 bad_count"):
            rest = model.predict(regions, gone, wide=True, on_bad_row="quarantine")
        assert len(rest) == len(regions) - 1

    def test_what_is_no_table_is_refused_by_name(self, model, tables, tmp_path):
        regions, mobility = tables
        for wrong in (3, None, [{"region_id": "a"}], pd.Series(["a"]), pl.LazyFrame({"region_id": ["a"]})):
            with pytest.raises(UsageError, match="the regions are not a table"):
                model.predict(wrong, mobility)
        with pytest.raises(UsageError, match="the mobility are not a table"):
            model.predict(regions, 3)
        with pytest.raises(BadData, match="regions table: a column holds several kinds"):
            model.predict(pd.DataFrame({"region_id": ["a", 3]}), mobility)
        with pytest.raises(BadData, match="the table is empty"):
            model.predict(regions.to_pandas()[:0], mobility)
        with pytest.raises(NoInput):
            model.predict(str(tmp_path / "nowhere.parquet"))
        with pytest.raises(UsageError, match="no such on_bad_row"):
            model.predict(regions, mobility, on_bad_row="ignore")
        with pytest.raises(UsageError, match="does not predict 'noise'"):
            model.predict(regions, mobility, tasks="noise")


class TestModel:
    def test_it_says_what_it_predicts_and_reads(self, model, tables, demo_bundle):
        regions = tables[0]
        assert model.tasks == ("crime", "check_in", "service_call")
        assert set(model.inputs.regions) <= set(regions.column_names)
        assert list(model.inputs.mobility) == ["origin_id", "dest_id", "flow"]
        assert (model.path, model.device) == (demo_bundle, "cpu")
        shown = repr(model)
        for part in ("crime, check_in, service_call", "77 regions", "flows", "cpu", str(demo_bundle)):
            assert part in shown
        assert {check.city for check in model.selftest()} == {"golden-7", "golden-31", "enlarged-725"}

    def test_wrong_arguments_are_refused_by_name(self, demo_bundle, tmp_path):
        with pytest.raises(UsageError, match="no such device"):
            topt.load(demo_bundle, device="gpu")
        with pytest.raises(UsageError, match="threads is too small"):
            topt.load(demo_bundle, threads=0)
        with pytest.raises(NoInput, match="no such bundle"):
            topt.load(tmp_path / "nowhere.topt")
        with pytest.raises(NoInput, match="no such key"):
            topt.load(str(demo_bundle), require_signature=str(tmp_path / "key.pem"))

    def test_it_is_pickled_by_path_and_hash(self, desk: Desk, tables, expected, monkeypatch):
        monkeypatch.chdir(desk.folder)
        model = topt.load("model.topt")
        packed = pickle.dumps(model)
        assert len(packed) < 1000
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            assert same(pool.submit(model.predict, *tables).result(), expected)
        card = desk.bundle / "manifest.json"
        card.write_text(card.read_text() + " ")
        with pytest.raises(BadBundle):
            pickle.loads(packed)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    def test_a_forked_process_opens_it_again(self, demo_bundle, tables, expected):
        model = topt.load(demo_bundle, threads=2)  # ONNX Runtime's threads are not forked along
        assert same(model.predict(*tables), expected)
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            assert same(pool.submit(_predict_in_child, model, tables).result(timeout=PATIENCE_S), expected)


def _predict_in_child(model: topt.Model, tables: tuple[pa.Table, pa.Table]) -> pa.Table:
    return model.predict(*tables)


def test_importing_it_imports_nothing_else():
    heavy = "{'numpy', 'pyarrow', 'click', 'onnxruntime', 'torch', 'pandas', 'polars', 'geopandas'}"
    code = f"import sys, topt_deploy; dir(topt_deploy); print({heavy} & set(sys.modules))"
    assert shell(f'{sys.executable} -c "{code}"', Path.cwd()).out == "set()\n"


def test_predicting_from_files_imports_no_library_of_tables(demo_city, demo_bundle):
    """pandas is not among them: pyarrow itself imports it where it is installed."""
    code = (
        "import sys, topt_deploy as topt; topt.load('model.topt').predict('.');"
        "print({'polars', 'geopandas', 'torch', 'pyarrow.dataset', 'pyarrow.parquet'} & set(sys.modules))"
    )
    said = shell(f'{sys.executable} -c "{code}"', demo_city)
    assert (said.code, said.out) == (0, "set()\n"), said


@pytest.fixture(scope="module")
def small_city(demo_city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's city, with settings that train in a second."""
    city = tmp_path_factory.mktemp("small") / "city"
    city.mkdir()
    for name in ("regions.parquet", "mobility.parquet"):
        (city / name).write_bytes((demo_city / name).read_bytes())
    (city / "topt.toml").write_text((demo_city / "topt.toml").read_text().replace("folds = 3", "folds = 2"))
    return city


@pytest.fixture(scope="module")
def trained(small_city: Path) -> topt.TrainedRun:
    return topt.train(small_city, tasks="crime", set={"srel.epochs": 2, "prompt4re.epochs": 2}, seed=3)


class TestBuild:
    def test_a_recipe_is_a_file_or_a_mapping(self, tmp_path, monkeypatch):
        squares(tmp_path)
        (x, y), (x9, y9) = middle(1), middle(9)
        write(tmp_path / "crimes.csv", f"day,lon,lat\n2019-05-01,{x},{y}\n2020-05-01,{x9},{y9}\n2020-06-01,{x9},{y9}")
        write(tmp_path / "city.toml", """
            [regions]
            file = "areas.geojson"
            id = "area_numbe"
            [labels.crime]
            file = "crimes.csv"
            date = "day"
            history = true
            """)  # fmt: skip
        period = {"since": "2020-01-01", "until": date(2021, 1, 1), "city": "Nine", "timezone": "America/Chicago"}
        seen: list[tuple[int, int]] = []
        found = topt.build(str(tmp_path / "city.toml"), tmp_path / "a", progress=lambda *n: seen.append(n), **period)
        assert type(found) is topt.BuildReport
        assert (found.out, found.city, found.regions, found.tasks) == (tmp_path / "a", "Nine", 9, {"crime": 2.0})
        assert found.views == {"history": (1, 1.0)}
        assert seen[-1][0] == seen[-1][1] > 0
        monkeypatch.chdir(tmp_path)
        recipe = tomllib.loads(Path("city.toml").read_text())
        assert topt.build(recipe, "b", **period).tasks == found.tasks
        assert Path("a/regions.parquet").read_bytes() == Path("b/regions.parquet").read_bytes()

    def test_what_does_not_go_is_refused_by_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        recipe = {"regions": {"file": str(squares(tmp_path)), "id": "area_numbe"}}
        for wrong, told in (
            ({"since": "spring"}, "not a date"), ({"timezone": "Chicago"}, "unknown time zone"),
            ({"on_bad_row": "mask"}, "not a way"), ({"since": "2020-01-01", "until": "2020-01-01"}, "empty"),
        ):  # fmt: skip
            with pytest.raises(BadConfig, match=told):
                topt.build(recipe, "out", **wrong)
        with pytest.raises(NoInput):
            topt.build("absent.toml", "out")
        with pytest.raises(BadConfig, match="needs regions"):
            topt.build({}, "out")
        assert not Path("out").exists()


class TestTrain:
    def test_a_run_has_metrics_and_held_out_predictions(self, trained, small_city):
        assert trained.path.parent == small_city / "runs"
        assert (trained.tasks, trained.config.seed, trained.config.tasks["crime"].srel.epochs) == (("crime",), 3, 2)
        found = trained.metrics["crime"].held_out
        table = trained.held_out.to_pandas().dropna()
        assert found.regions == len(table)
        assert found.mae == pytest.approx((table["held_out"] - table["label"]).abs().mean())
        assert f"MAE {found.mae:.1f}" in repr(trained)
        assert topt.TrainedRun(str(trained.path)).metrics == trained.metrics

    def test_it_is_exported_and_reported(self, trained, small_city):
        bundle = trained.export(str(small_city / "named.topt"), zip=True)
        assert bundle == small_city / "named.topt"
        assert topt.load(bundle).predict(small_city).column("task").unique().to_pylist() == ["crime"]
        page = trained.report()
        assert page == trained.path / "report.html"
        assert "crime" in page.read_text().lower()

    def test_what_does_not_go_is_refused_by_name(self, trained, small_city, tmp_path):
        with pytest.raises(NoInput, match="no city in this folder"):
            topt.train(tmp_path)
        for wrong in ({"device": "gpu"}, {"precision": "fp8"}, {"preset": "best"}, {"threads": 0}):
            with pytest.raises(UsageError, match=f"{next(iter(wrong))}"):
                topt.train(small_city, **wrong)
        with pytest.raises(UsageError, match="cannot change with --resume"):
            topt.train(small_city, resume=True, seed=1)
        with pytest.raises(BadConfig, match="nothing"):
            topt.train(small_city, set={"srel.nothing": 1})
        with pytest.raises(NoInput, match="no training run in this folder"):
            topt.TrainedRun(tmp_path)
        for wrong in ({"format": "tflite"}, {"encoder_precision": "int2"}, {"flavour": "plain"}):
            with pytest.raises(UsageError, match=f"no such {next(iter(wrong))}"):
                trained.export(small_city / "other.topt", **wrong)
        with pytest.raises(UsageError, match="apply to engines only"):
            trained.export(small_city / "other.topt", precision="fp16")

    def test_the_package_of_training_can_be_called(self):
        import topt_deploy.train

        assert topt.train is topt_deploy.train
        assert list(inspect.signature(topt.train).parameters)[:3] == ["city", "out", "preset"]


class TestEncode:
    def test_files_are_encoded_as_the_command_does(self, prompted, tmp_path):
        city = tmp_path / "bare.parquet"
        city.write_bytes((prompted / "bare.parquet").read_bytes())
        said = shell(f"topt-run encode {city} --bundle {prompted / 'encoder.topt'} --out command.parquet", tmp_path)
        assert said.code == 0, said
        found = topt.encode(city, bundle=prompted / "encoder.topt")
        written = tmp_path / "prompts.parquet"
        assert written.read_bytes() == (tmp_path / "command.parquet").read_bytes()
        expected = pq.ParquetFile(written).read()
        assert found.to_pydict() == expected.to_pydict()
        assert found.field("prompt_crime").metadata == expected.field("prompt_crime").metadata
        one = topt.encode(city, bundle=prompted / "encoder.topt", tasks="crime", update_regions=True)
        assert "prompt_crime" in one.column_names
        assert pq.ParquetFile(city).read().equals(one, check_metadata=True)

    def test_tables_in_memory_come_back_in_their_kind(self, prompted):
        regions = pl.from_arrow(pq.ParquetFile(prompted / "bare.parquet").read())
        found = topt.encode(regions, bundle=prompted / "encoder.topt", tasks=["crime"], update_regions=True)
        assert type(found) is pl.DataFrame
        assert set(found.columns) == {*regions.columns, "prompt_crime"}
        assert found["prompt_crime"].null_count() == 0

    def test_a_model_in_pytorch_gives_its_vectors(self, prompted, tiny_models):
        regions = pq.ParquetFile(prompted / "bare.parquet").read().slice(0, 3)
        found = topt.encode(regions, model=tiny_models("text"), tasks="crime")
        assert found.column("status").to_pylist() == ["ok"] * 3

    def test_what_does_not_go_is_refused_by_name(self, prompted):
        regions = pq.ParquetFile(prompted / "bare.parquet").read()
        bundle = prompted / "encoder.topt"
        with pytest.raises(UsageError, match="one encoder is needed"):
            topt.encode(regions)
        with pytest.raises(UsageError, match="one encoder is needed"):
            topt.encode(regions, bundle=bundle, model="somewhere")
        with pytest.raises(UsageError, match="has no files"):
            topt.encode(regions, bundle=bundle, out="prompts.parquet")
        with pytest.raises(UsageError, match="no such device"):
            topt.encode(regions, bundle=bundle, device="gpu")
        pictured = regions.append_column("images", pa.array([["a.png"]] * len(regions)))
        with pytest.raises(UsageError, match="images_root"):
            topt.encode(pictured, bundle=bundle)


def options(command: click.Command, *left_out: str) -> set[str]:
    """The names of a command's options, as they are typed."""
    names = {
        max(o.opts, key=len).removeprefix("--").replace("-", "_")
        for o in command.params
        if o.param_type_name == "option"
    }
    return ({"tasks" if name == "task" else name for name in names}) - set(left_out)


def parameters(*functions: object) -> set[str]:
    return {
        p.name
        for function in functions
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }


class TestNames:
    def test_options_are_named_as_on_the_command_line(self):
        outputs = {"out", "geo", "resume", "metrics_file", "log_format"}
        processes = {"workers", "engine", "timeout"}  # a thread of the caller's cannot be stopped
        asked = options(predict_command, *outputs, *processes, "bundle", "mobility")
        assert parameters(topt.load, topt.Model.predict) - {"progress"} == asked
        assert parameters(topt.train) == options(train_command)
        words = {"from": "since", "to": "until"}  # "from" is a word of Python's own
        recipes = {"init", "regions", "id_col", "name_col", "src_crs", "grid", "boundary", "points", "areas", "flows"}
        recipes |= {"labels", "embeddings", "history"}  # a mapping says these
        asked = options(build_command, "out", "log_format", *recipes)
        assert parameters(topt.build) - {"progress"} == {words.get(name, name) for name in asked}
        assert parameters(topt.TrainedRun.export) == options(export_command, "out", "encoder_only")
        assert parameters(topt.TrainedRun.report) == options(report_command, "out")
        both = options(encode_command, "log_format") | options(encode_with_pytorch, "processes", "shared_cache")
        assert parameters(topt.encode) - {"progress"} == both

    def test_the_run_exports_with_the_exporters_own_options(self):
        assert parameters(topt.TrainedRun.export) == parameters(export_run)

    def test_the_stub_names_what_there_is(self):
        stub = ast.parse(Path(topt.__file__).with_suffix(".pyi").read_text())
        named = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert named == {*topt._PUBLIC, "train"}
        for name in named:
            assert getattr(topt, name).__doc__
        assert named <= set(dir(topt))
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = topt.nothing
