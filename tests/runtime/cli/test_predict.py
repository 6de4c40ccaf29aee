"""What `topt-run predict` says: the same bytes however the input lies, and everything about them in the receipt."""

import hashlib
import json
import os
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import fixed_lists, replaced

TASKS = ("crime", "check_in", "service_call")
WIDE = [name for task in TASKS for name in (task, f"{task}_lower", f"{task}_upper")]


@pytest.fixture
def predicted(desk, topt_run):
    """Predict with these options; the output's table."""

    def call(*arguments, regions=None, out=None):
        regions = regions or desk.regions
        said = topt_run("predict", regions, *arguments)
        assert said.code == 0, said.err
        return pq.read_table(out or regions.with_name("predictions.parquet"))

    return call


def by_region(table):
    """Prediction, status and reason by region and task, floats to the last bit."""
    return {
        (row["region_id"], row["task"]): (row["prediction"].hex(), row["status"], row["reason"])
        for row in table.to_pylist()
    }


def shuffled(table, seed):
    rng = np.random.default_rng(seed)
    columns = rng.permutation(table.column_names).tolist()
    return table.take(rng.permutation(len(table))).select(columns)


class TestOutput:
    def test_is_the_table_of_the_contract(self, desk, predicted):
        table = predicted()
        regions = pq.read_table(desk.regions)
        assert {f.name: str(f.type) for f in table.schema} == {
            "city_id": "string", "region_id": "string", "task": "string", "prediction": "double", "lower": "double",
            "upper": "double", "status": "string", "reason": "string", "geometry": "binary",
        }  # fmt: skip
        assert len(table) == 3 * len(regions)
        assert table.column("task").to_pylist() == [task for task in TASKS for _ in range(len(regions))]
        assert table.column("region_id").to_pylist() == regions.column("region_id").to_pylist() * 3
        assert set(table.column("city_id").to_pylist()) == {"synthetic-demo"}
        values = table.column("prediction").to_numpy()
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        assert len(np.unique(values)) > 200

    def test_predicts_regions_without_a_label_too(self, desk, predicted):
        regions = pq.read_table(desk.regions)
        hidden = [r["region_id"] for r in regions.to_pylist() if r["crime"] is None]
        assert hidden
        found = by_region(predicted())
        assert all((region, task) in found for region in hidden for task in TASKS)

    def test_labels_are_not_looked_at(self, desk, predicted):
        before = predicted()
        table = pq.read_table(desk.regions)
        pq.write_table(table.drop_columns(["service_call"]).set_column(
            table.column_names.index("crime"), "crime", pa.array(["nonsense"] * len(table))), desk.regions)  # fmt: skip
        assert by_region(predicted()) == by_region(before)

    def test_polygons_pass_through(self, desk, predicted):
        regions = pq.read_table(desk.regions)
        table = predicted()
        assert table.column("geometry").to_pylist() == regions.column("geometry").to_pylist() * 3
        assert table.schema.metadata[b"geo"] == regions.schema.metadata[b"geo"]

    def test_is_geoparquet_to_geopandas(self, desk, predicted):
        geopandas = pytest.importorskip("geopandas")
        predicted("--wide")
        frame = geopandas.read_parquet(desk.out)
        assert str(frame.crs) == "OGC:CRS84"
        assert frame.geometry.is_valid.all()
        assert set(TASKS) < set(frame.columns)

    def test_no_geometry_in_none_out(self, desk, predicted):
        table = pq.read_table(desk.regions)
        pq.write_table(table.drop_columns("geometry"), desk.regions)
        out = predicted()
        assert "geometry" not in out.column_names
        assert b"geo" not in (out.schema.metadata or {})

    def test_wide_holds_the_same_numbers(self, predicted):
        long, wide = predicted(), predicted("--wide")
        assert wide.column_names == ["city_id", "region_id", *WIDE, "status", "reason", "geometry"]
        found = {(row["region_id"], task): row[task] for row in wide.to_pylist() for task in TASKS}
        assert found == {(row["region_id"], row["task"]): row["prediction"] for row in long.to_pylist()}

    def test_the_interval_holds_the_prediction_and_widens_with_the_coverage(self, predicted, desk):
        width = {}
        for coverage in (0.5, 0.9):
            rows = predicted("--coverage", coverage).to_pylist()
            assert all(0 <= row["lower"] <= row["prediction"] <= row["upper"] for row in rows)
            width[coverage] = [row["upper"] - row["lower"] for row in rows]
            assert json.loads(desk.receipt.read_text())["options"]["coverage"] == dict.fromkeys(TASKS, coverage)
        assert all(wide > narrow for wide, narrow in zip(width[0.9], width[0.5], strict=True))
        assert [row["prediction"] for row in predicted().to_pylist()] == [row["prediction"] for row in rows]

    def test_an_impossible_coverage_is_refused(self, refused):
        for coverage in ("1.0", "0", "0.999", "nan"):
            refused(2, "no interval", "--coverage", arguments=("--coverage", coverage))

    def test_few_labels_give_predictions_without_intervals(self, desk, predicted, topt_run):
        """Nobody asked for an interval; eight labels cannot carry the default one, and nine can."""
        manifest = desk.bundle / "manifest.json"
        record = json.loads(manifest.read_text())
        for labels, facts in zip((8, 9, 8), record["tasks"].values(), strict=True):
            facts["scores"] = facts["scores"][:labels]
        manifest.write_text(json.dumps(record))
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        (desk.bundle / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")
        table = predicted()
        assert table.column("prediction").null_count == 0
        assert table.column("lower").null_count == table.column("upper").null_count == len(table) * 2 / 3
        first, second, third = record["tasks"]
        coverage = json.loads(desk.receipt.read_text())["options"]["coverage"]
        assert coverage == {first: None, second: 0.9, third: None}
        assert topt_run("selftest", desk.bundle).code == 0
        assert topt_run("predict", desk.regions, "--coverage", "0.9").code == 2, "asked for, it is refused"

    def test_a_chosen_task_is_what_it_is_among_all(self, predicted):
        everything = by_region(predicted())
        for chosen in (("check_in",), ("service_call", "crime")):
            table = predicted(*(part for task in chosen for part in ("--task", task)))
            assert list(dict.fromkeys(table.column("task").to_pylist())) == list(chosen)
            assert by_region(table) == {key: value for key, value in everything.items() if key[1] in chosen}

    def test_another_id_column(self, desk, predicted):
        everything = by_region(predicted())
        table = pq.read_table(desk.regions)
        pq.write_table(
            table.rename_columns(["GEOID" if c == "region_id" else c for c in table.column_names]), desk.regions
        )
        assert by_region(predicted("--id-col", "GEOID")) == everything

    def test_what_is_shown_is_what_is_written(self, desk, topt_run):
        said = topt_run("predict", desk.regions)
        first = pq.read_table(desk.out).to_pylist()[0]
        assert said.out.splitlines()[0].split() == [
            "city_id",
            "region_id",
            "task",
            "prediction",
            "lower",
            "upper",
            "status",
        ]
        assert f"{first['prediction']:.1f}" in said.out.splitlines()[1]
        assert "(231 rows)" in said.out
        assert str(desk.receipt) in said.out
        facts = json.loads(topt_run("predict", desk.regions, "--log-format", "json").out)
        assert facts["event"] == "predicted"
        assert facts["file"] == str(desk.out)
        assert sum(facts["status"].values()) == 231


class TestPlaces:
    """Where the inputs, the bundle and the output are looked for."""

    def test_the_bundle_of_the_environment(self, desk, predicted, monkeypatch):
        before = predicted()
        monkeypatch.setenv("TOPT_BUNDLE", str(desk.bundle.rename(desk.folder / "elsewhere.topt")))
        assert predicted().equals(before)

    def test_what_the_operator_set_comes_before_the_bundle_beside(self, desk, topt_run, monkeypatch):
        monkeypatch.setenv("TOPT_BUNDLE", "/nonexistent")
        said = topt_run("predict", desk.regions)
        assert said.code == 66
        assert "/nonexistent: no such bundle" in said.err

    def test_named_places(self, desk, predicted, tmp_path):
        before = predicted()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        regions = shutil.copy(desk.regions, elsewhere / "r.parquet")
        mobility = shutil.copy(desk.mobility, elsewhere / "m.parquet")
        out = elsewhere / "o.parquet"
        table = predicted("--bundle", desk.bundle, "--mobility", mobility, "--out", out, regions=regions, out=out)
        assert table.equals(before)
        assert {path.name for path in elsewhere.iterdir()} == {"r.parquet", "m.parquet", "o.parquet", "o.receipt.json"}

    @pytest.mark.parametrize("form", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
    def test_a_zip_gives_the_same_bytes_as_the_folder(self, form, desk, predicted):
        predicted()
        before = desk.out.read_bytes()
        with zipfile.ZipFile(desk.folder / "bundle.zip", "w", form) as archive:
            for file in desk.bundle.rglob("*"):
                archive.write(file, file.relative_to(desk.bundle))
        predicted("--bundle", desk.folder / "bundle.zip")
        assert desk.out.read_bytes() == before

    def test_a_folder_is_the_regions_in_it(self, desk, predicted, topt_run):
        before = predicted()
        desk.out.unlink()
        for out in ((), ("--out", desk.folder / "named.parquet")):
            said = topt_run("predict", desk.folder, *out)
            assert said.code == 0, said.err
            assert pq.read_table(out[1] if out else desk.out).equals(before)

    def test_a_city_folder_names_the_city(self, desk, predicted):
        before = by_region(predicted())
        folder = desk.folder / "city=Oslo"
        folder.mkdir()
        table = pq.read_table(desk.regions)
        pq.write_table(table.drop_columns("city_id"), folder / "regions.parquet")
        pq.write_table(pq.read_table(desk.mobility).drop_columns("city_id"), folder / "mobility.parquet")
        out = predicted("--bundle", desk.bundle, regions=folder / "regions.parquet")
        assert set(out.column("city_id").to_pylist()) == {"Oslo"}
        assert by_region(out) == before

    def test_the_flows_of_other_cities_are_left_out(self, desk, predicted):
        before = by_region(predicted())
        flows = pq.read_table(desk.mobility)
        others = replaced(flows, city_id=["elsewhere"] * len(flows), origin_id=["X"] * len(flows))
        pq.write_table(pa.concat_tables([others, flows]), desk.mobility)
        assert by_region(predicted()) == before


class TestSameBytes:
    def test_again_and_elsewhere(self, desk, predicted, tmp_path):
        predicted()
        first = desk.out.read_bytes()
        predicted()
        assert desk.out.read_bytes() == first
        elsewhere = shutil.copytree(desk.folder, tmp_path / "another place")
        predicted(regions=elsewhere / "regions.parquet")
        assert (elsewhere / "predictions.parquet").read_bytes() == first

    @pytest.mark.parametrize("seed", range(3))
    def test_the_order_of_rows_and_columns_changes_no_bit(self, seed, desk, predicted):
        before = predicted()
        for path in (desk.regions, desk.mobility):
            table = pq.read_table(path)
            other = shuffled(table, seed)
            assert not other.select(table.column_names).equals(table)
            pq.write_table(other, path)
        after = predicted()
        assert by_region(after) == by_region(before)
        ids = pq.read_table(desk.regions).column("region_id").to_pylist()
        assert after.column("region_id").to_pylist() == ids * 3, "rows come in the input's order"
        shapes = dict(zip(before.column("region_id").to_pylist(), before.column("geometry").to_pylist(), strict=True))
        assert after.column("geometry").to_pylist() == [shapes[i] for i in after.column("region_id").to_pylist()]

    def test_repeated_flows_in_any_order_change_no_bit(self, desk, predicted):
        flows = pq.read_table(desk.mobility)
        third = replaced(flows, flow=flows.column("flow").to_numpy() / 3)
        repeated = pa.concat_tables([third, flows.cast(third.schema), third])
        found = []
        for seed in range(3):
            pq.write_table(shuffled(repeated, seed), desk.mobility)
            found.append(by_region(predicted()))
        assert found[0] == found[1] == found[2]

    @pytest.mark.parametrize("form", ["row groups", "compression", "types", "lists", "named lists", "aliases", "large"])
    def test_the_form_of_the_file_changes_no_bit(self, form, desk, predicted):
        before = by_region(predicted())
        regions, mobility = pq.read_table(desk.regions), pq.read_table(desk.mobility)
        options = {}
        if form == "row groups":
            options = {"row_group_size": 10}
        elif form == "compression":
            options = {"compression": "zstd", "use_dictionary": False, "data_page_version": "2.0"}
        elif form == "types":
            names = [c for c in regions.column_names if c.startswith("poi_")]
            regions = replaced(regions, **{c: regions.column(c).cast(pa.int32()).cast(pa.float32()) for c in names})
            regions = replaced(regions, region_id=regions.column("region_id").dictionary_encode())
            mobility = replaced(mobility, flow=mobility.column("flow").cast(pa.float64()))
        elif form in ("lists", "named lists"):
            for view in ("poi", "land_use"):
                names = [c for c in regions.column_names if c.startswith(f"{view}_")]
                # The model's order is that of the names where they are columns.
                names = sorted(names, reverse=form == "named lists")
                values = np.stack([regions.column(c).to_numpy() for c in names], axis=1)
                lists = pa.array(values.tolist(), pa.list_(pa.float64()))
                meta = {"categories": json.dumps([c.removeprefix(f"{view}_") for c in names])}
                field = pa.field(view, lists.type, metadata=meta)
                regions = regions.drop_columns(names).append_column(field, lists)
        elif form == "aliases":
            names = {"origin_id": "h_geocode", "dest_id": "w_geocode", "flow": "S000"}
            mobility = mobility.rename_columns([names.get(c, c) for c in mobility.column_names])
        else:
            for column in ("origin_id", "dest_id"):
                mobility = replaced(mobility, **{column: mobility.column(column).cast(pa.large_string())})
            regions = replaced(regions, region_id=regions.column("region_id").cast(pa.large_string()))
        pq.write_table(regions, desk.regions, **options)
        pq.write_table(mobility, desk.mobility, **options)
        assert by_region(predicted()) == before


class TestReceipt:
    def test_every_hash_can_be_checked(self, desk, predicted):
        table = predicted()
        receipt = json.loads(desk.receipt.read_text())

        def sha256(path):
            return hashlib.sha256(path.read_bytes()).hexdigest()

        assert receipt["output"] == {"file": "predictions.parquet", "sha256": sha256(desk.out), "rows": len(table)}
        assert receipt["inputs"]["regions"] == {"file": str(desk.regions), "sha256": sha256(desk.regions)}
        assert receipt["inputs"]["mobility"] == {"file": str(desk.mobility), "sha256": sha256(desk.mobility)}
        assert receipt["bundle"] == {
            "file": str(desk.bundle), "sha256": sha256(desk.bundle / "manifest.json"), "signed_by": None,
        }  # fmt: skip

    def test_says_how_it_was_done(self, desk, predicted):
        import onnxruntime

        predicted("--task", "crime", "--wide")
        receipt = json.loads(desk.receipt.read_text())
        assert receipt["options"] == {
            "tasks": ["crime"], "wide": True, "id_col": "region_id", "coverage": {"crime": 0.9}, "device": "cpu",
            "on_bad_row": "fail",
        }  # fmt: skip
        assert receipt["set_aside"] == {}
        assert len(receipt["key"]) == 64
        assert receipt["provider"] == "CPUExecutionProvider"
        assert receipt["precision"] == "fp32"
        assert receipt["versions"]["onnxruntime"] == onnxruntime.__version__
        assert receipt["versions"]["pyarrow"] == pa.__version__
        assert receipt["versions"]["numpy"] == np.__version__
        assert set(receipt["seconds"]) == {"open", "hash", "predict", "write"}
        assert sum(receipt["status"].values()) == 77

    def test_names_that_are_not_utf_8(self, desk, predicted, topt_run):
        predicted()
        folder = desk.folder / os.fsdecode(b"M\xfcnchen")
        folder.mkdir()
        regions = folder / "regions.parquet"
        for file in (desk.regions, desk.mobility):
            shutil.move(file, folder)
        said = topt_run("predict", regions, "--bundle", desk.bundle)
        assert said.code == 0, said.err
        assert (folder / desk.out.name).read_bytes() == desk.out.read_bytes()
        receipt = json.loads((folder / desk.receipt.name).read_text(encoding="utf-8"))
        assert receipt["inputs"]["regions"]["file"] == str(regions)

    def test_counts_what_is_extrapolated_and_says_why(self, desk, predicted):
        before = by_region(predicted())
        assert [status for _, status, _ in before.values()].count("ok") > 0.8 * len(before)
        table = pq.read_table(desk.regions)
        foods = table.column("poi_food").to_pylist()
        high, foods[0] = max(foods), max(foods) * 30
        pq.write_table(replaced(table, poi_food=foods), desk.regions)
        after = by_region(predicted())
        assert high > 0
        assert before["D001", "crime"][1:] == ("ok", None)
        for (region, _), (_, status, reason) in after.items():
            assert (status == "extrapolated") == (reason is not None)
            if region == "D001":
                assert status == "extrapolated"
                assert "poi_food above the training range" in reason
        counts = json.loads(desk.receipt.read_text())["status"]
        assert counts == {s: sum(own == s for _, own, _ in after.values()) for s in ("extrapolated", "ok")}

    def test_a_count_a_little_above_the_range_is_no_reason_for_doubt(self, desk, predicted):
        before = by_region(predicted())
        table = pq.read_table(desk.regions)
        foods = table.column("poi_food").to_pylist()
        foods[0] = max(foods) * 1.2
        pq.write_table(replaced(table, poi_food=foods), desk.regions)
        assert by_region(predicted())["D001", "crime"][1:] == before["D001", "crime"][1:] == ("ok", None)

    def test_a_region_unlike_the_training_regions_is_marked_though_each_count_is_within_its_range(
        self, desk, predicted, reseal
    ):
        """An airport: the most of everything that is rarely found together, leverage 0.70 here; as it was, 0.23."""
        reseal(desk.bundle, lambda record: record["leverage"].update(threshold=0.6))
        table = pq.read_table(desk.regions)
        names = [c for c in table.column_names if c.startswith(("poi_", "land_use_"))]
        values = {c: table.column(c).to_pylist() for c in names}
        before = by_region(predicted())["D001", "crime"]
        for i, own in enumerate(values.values()):
            own[0] = max(own) if i % 2 else min(own)
        pq.write_table(replaced(table, **values), desk.regions)
        after = by_region(predicted("--coverage", "0.8"))["D001", "crime"]
        assert before[1] == "ok"
        assert after[1] == "extrapolated"
        assert after[2].startswith("unlike the training regions: leverage ")

    def test_says_when_flows_are_below_or_above(self, desk, predicted):
        flows = pq.read_table(desk.mobility)
        rows = [row for row in flows.to_pylist() if row["origin_id"] != "D002"]
        rows.append({**rows[0], "origin_id": "D003", "dest_id": "D004", "flow": 10**9})
        pq.write_table(pa.Table.from_pylist(rows, schema=flows.schema), desk.mobility)
        reasons = {region: reason for (region, _), (_, _, reason) in by_region(predicted()).items()}
        assert "outflow below the training range" in reasons["D002"]
        assert "outflow above the training range" in reasons["D003"]
        assert "inflow above the training range" in reasons["D004"]

    def test_reasons_are_few_enough_to_read(self, desk, predicted):
        table = pq.read_table(desk.regions)
        names = [c for c in table.column_names if c.startswith("poi_")]
        pq.write_table(replaced(table, **{c: [10**6] * len(table) for c in names}), desk.regions)
        reasons = {reason for _, _, reason in by_region(predicted()).values()}
        assert all(reason.count(";") <= 3 and reason.endswith(" more") for reason in reasons)


class TestMap:
    @pytest.fixture(autouse=True)
    def _geo(self):
        pytest.importorskip("pyogrio", reason="needs the geo extra")

    @pytest.mark.parametrize("suffix", [".gpkg", ".geojson"])
    def test_gis_can_read_it(self, suffix, desk, predicted):
        import pyogrio
        import shapely

        path = desk.folder / f"map{suffix}"
        wide = predicted("--wide")
        long_out = desk.folder / "long.parquet"
        predicted("--geo", path, "--out", long_out, out=long_out)
        meta, features = pyogrio.read_arrow(path)
        assert features.num_rows == 77
        assert meta["crs"] in ("EPSG:4326", "OGC:CRS84")
        ids = features.column("region_id").to_pylist()
        for task in TASKS:
            found = dict(zip(ids, features.column(task).to_pylist(), strict=True))
            expected = dict(zip(wide.column("region_id").to_pylist(), wide.column(task).to_pylist(), strict=True))
            assert found == pytest.approx(expected, rel=1e-12)
        name = meta["geometry_name"] or "wkb_geometry"
        shapes = shapely.from_wkb(features.column(name).to_pylist())
        given = shapely.from_wkb(pq.read_table(desk.regions).column("geometry").to_pylist())
        assert shapely.equals_exact(shapes, given, tolerance=1e-6).all()
        assert pq.read_table(long_out).num_rows == 231

    def test_points_where_there_are_no_polygons(self, desk, predicted):
        import pyogrio
        import shapely

        table = pq.read_table(desk.regions)
        pq.write_table(shuffled(table.drop_columns("geometry"), 0), desk.regions)
        predicted("--geo", desk.folder / "map.geojson")
        _, features = pyogrio.read_arrow(desk.folder / "map.geojson")
        shapes = shapely.from_wkb(features.column("wkb_geometry").to_pylist())
        places = {row["region_id"]: (row["lon"], row["lat"]) for row in table.to_pylist()}
        for region, shape in zip(features.column("region_id").to_pylist(), shapes, strict=True):
            assert (shape.x, shape.y) == pytest.approx(places[region], abs=1e-6)


@pytest.fixture(scope="module")
def predictor(demo_bundle):
    from topt_deploy.runtime import load

    return load(demo_bundle)


@pytest.fixture(scope="module")
def tables(demo_bundle):
    return tuple(pq.read_table(demo_bundle.with_name(f"{name}.parquet")) for name in ("regions", "mobility"))


class TestPythonFace:
    def test_arrow_in_arrow_out(self, predictor, tables, predicted):
        table = predictor.predict(*tables)
        assert isinstance(table, pa.Table)
        assert table.equals(predicted())
        assert predictor.tasks == TASKS
        assert predictor.provider == "CPUExecutionProvider"

    def test_paths_and_tables_are_the_same(self, predictor, tables, desk):
        assert predictor.predict(desk.regions, desk.mobility).equals(predictor.predict(*tables))
        assert predictor.predict(desk.regions, tables[1]).equals(predictor.predict(*tables))

    def test_other_columns_are_of_no_interest(self, predictor, tables):
        regions, mobility = tables
        more = regions.append_column("notes", pa.array([{"a": [1]}] * len(regions)))
        flows = mobility.append_column("remark", pa.array([b"x"] * len(mobility)))
        assert predictor.predict(more, flows).equals(predictor.predict(regions, mobility))

    def test_options(self, predictor, tables):
        table = predictor.predict(*tables, tasks=["crime"], wide=True)
        assert table.column_names == [
            "city_id",
            "region_id",
            "crime",
            "crime_lower",
            "crime_upper",
            "status",
            "reason",
            "geometry",
        ]

    def test_twenty_four_threads_at_once_say_the_same(self, demo_bundle, tables):
        from topt_deploy.runtime.predictor import open_predictor

        predictor = open_predictor(demo_bundle, threads=1)  # its session is made by whichever thread comes first
        start = threading.Barrier(24)

        def predict(_):
            start.wait()
            sink = pa.BufferOutputStream()
            table = predictor.predict(*tables)
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            return sink.getvalue().to_pybytes()

        with ThreadPoolExecutor(24) as pool:
            results = set(pool.map(predict, range(24)))
        assert len(results) == 1
        assert pa.ipc.open_stream(results.pop()).read_all().equals(predictor.predict(*tables))

    def test_another_city_of_another_size(self, predictor, tables):
        regions, mobility = tables
        kept = set(regions.column("region_id").to_pylist()[:9])
        rows = [row for row in mobility.to_pylist() if {row["origin_id"], row["dest_id"]} <= kept]
        table = predictor.predict(regions.slice(0, 9), pa.Table.from_pylist(rows, schema=mobility.schema))
        assert len(table) == 27
        assert np.isfinite(table.column("prediction").to_numpy()).all()

    def test_a_city_of_one_region_is_predicted_or_refused(self, predictor, tables):
        from topt_deploy.errors import BadData

        regions, mobility = tables
        flows = replaced(mobility.slice(0, 1), origin_id=["D001"], dest_id=["D001"])
        try:
            table = predictor.predict(regions.slice(0, 1), flows)
        except BadData as error:
            assert "region" in str(error)  # noqa: PT017
        else:
            assert np.isfinite(table.column("prediction").to_numpy()).all()

    def test_errors_are_exceptions_with_the_facts(self, predictor, tables):
        from topt_deploy.errors import BadData, NoInput, UsageError

        regions, mobility = tables
        with pytest.raises(BadData, match="wrong length") as caught:
            predictor.predict(replaced(regions, prompt_crime=fixed_lists(np.zeros((77, 3)))), mobility)
        assert caught.value.column == "prompt_crime"
        assert caught.value.file == "regions table"
        with pytest.raises(NoInput, match="no mobility table"):
            predictor.predict(regions)
        with pytest.raises(UsageError, match="'theft'"):
            predictor.predict(regions, mobility, tasks=["theft"])

    def test_prompts_that_name_no_encoder_are_taken(self, predictor, tables):
        regions, mobility = tables
        plain = regions.cast(
            pa.schema([pa.field(f.name, f.type) for f in regions.schema], metadata=regions.schema.metadata)
        )
        assert plain.schema.field("prompt_crime").metadata is None
        assert predictor.predict(plain, mobility).equals(predictor.predict(regions, mobility))

    def test_loading_checks_everything(self, desk):
        from topt_deploy.errors import BadBundle, NoDevice, NoInput
        from topt_deploy.runtime import load

        with pytest.raises(NoInput):
            load(desk.folder / "nowhere.topt")
        with pytest.raises(NoDevice):
            load(desk.bundle, device="cuda")
        (desk.bundle / "MODEL_CARD.md").write_text("another card")
        with pytest.raises(BadBundle):
            load(desk.bundle)
