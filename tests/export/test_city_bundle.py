"""What export writes: a bundle that lists itself rightly, and holds nothing of the training city or the machine."""

import hashlib
import json
import os
import shutil
import socket
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest

SUFFIXES = {".json", ".sha256", ".md", ".onnx", ".weights", ".parquet"}


@pytest.fixture
def export(topt_deploy):
    return lambda *arguments: topt_deploy("export", *arguments)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_manifest_lists_everything_rightly(demo_bundle):
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    held = files(demo_bundle)
    seal = held.pop("manifest.json.sha256").decode()
    assert seal == f"{hashlib.sha256(held.pop('manifest.json')).hexdigest()}  manifest.json\n"
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in held.items()
    }
    assert {"models/topt.onnx", "models/topt.weights", "MODEL_CARD.md"} < held.keys()
    assert manifest["schema_version"] == 1


def test_the_manifest_says_what_is_read_and_predicted(demo_bundle, demo_city):
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    table = pq.read_table(demo_city / "regions.parquet")
    poi = [c.removeprefix("poi_") for c in table.column_names if c.startswith("poi_")]
    assert sorted(manifest["views"]["poi"]) == sorted(poi)
    assert list(manifest["tasks"]) == ["crime", "check_in", "service_call"]
    assert manifest["prompts"]["prompt_crime"]["width"] == 256
    assert "hashing-256" in manifest["prompts"]["prompt_crime"]["encoder"]
    assert manifest["source"]["synthetic"] is True
    assert manifest["source"]["regions"] == 77
    regions = (demo_city / "regions.parquet").read_bytes()
    assert manifest["source"]["regions_sha256"] == hashlib.sha256(regions).hexdigest()
    for name in poi:
        values = table.column(f"poi_{name}").to_numpy()
        assert manifest["ranges"][f"poi_{name}"] == [values.min(), values.max()]
    out = dict.fromkeys(table.column("region_id").to_pylist(), 0.0)
    for flow in pq.read_table(demo_city / "mobility.parquet").to_pylist():
        out[flow["origin_id"]] += flow["flow"]
    assert manifest["ranges"]["outflow"] == [min(out.values()), max(out.values())]


def test_the_card_warns_and_shows_what_to_expect(demo_bundle):
    card = (demo_bundle / "MODEL_CARD.md").read_text()
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    assert "synthetic" in card
    assert "Not for decisions about individuals" in card
    for task, facts in manifest["tasks"].items():
        assert f"| {task} | {facts['report']['held_out']['mae']:.1f} |" in card


def test_no_row_of_the_training_city_is_in_it(demo_bundle, demo_city):
    """Golden cities are drawn: no id, place, count row, prompt or text of the training city travels with a bundle."""
    training = pq.read_table(demo_city / "regions.parquet")
    ids = set(training.column("region_id").to_pylist())

    def rows(table, columns):
        return {tuple(row.values()) for row in table.select(columns).to_pylist()}

    def prompts(table, column):
        return np.array(table.column(column).to_pylist(), dtype=np.float32)

    views = {view: [c for c in training.column_names if c.startswith(f"{view}_")] for view in ("poi", "land_use")}
    for size in (7, 31):
        golden = pq.read_table(demo_bundle / f"golden/golden-{size}.regions.parquet")
        assert len(golden) == size
        assert not ids & set(golden.column("region_id").to_pylist())
        assert not {"text", "geometry", "images", "crime", "check_in", "service_call"} & set(golden.column_names)
        assert not rows(golden, ["lon", "lat"]) & rows(training, ["lon", "lat"])
        for columns in views.values():
            assert not rows(golden, columns) & rows(training, columns)
        for task in ("crime", "check_in", "service_call"):
            a, b = prompts(golden, f"prompt_{task}"), prompts(training, f"prompt_{task}")
            assert np.abs(a[:, None] - b[None]).max(axis=2).min() > 1e-3
        flows = pq.read_table(demo_bundle / f"golden/golden-{size}.mobility.parquet")
        assert not ids & {*flows.column("origin_id").to_pylist(), *flows.column("dest_id").to_pylist()}
    everything = b"".join(files(demo_bundle).values())
    for region in sorted(ids):
        assert region.encode() not in everything, region
    for row in training.select(["text", "lon", "lat"]).to_pylist():
        assert row["text"][-60:].encode() not in everything
        for degrees in (row["lon"], row["lat"]):
            assert np.float64(degrees).tobytes() not in everything
            assert repr(degrees).encode() not in everything


def test_no_place_on_the_exporting_machine_is_in_it(demo_bundle):
    names = {str(Path.home()), str(Path.cwd()), str(demo_bundle.parent), "/tmp/", "site-packages", socket.gethostname()}
    names |= {os.environ[name] for name in ("USER", "LOGNAME", "HOSTNAME") if len(os.environ.get(name, "")) > 4}
    for name, data in files(demo_bundle).items():
        for place in names:
            assert len(place) < 4 or place.encode() not in data, f"{place} is in {name}"


def test_nothing_in_it_can_run_code(demo_bundle):
    for name, data in files(demo_bundle).items():
        path = demo_bundle / name
        assert path.suffix in SUFFIXES, name
        assert not path.stat().st_mode & 0o111, f"{name} is executable"
        if path.suffix == ".parquet":
            assert data[:4] == data[-4:] == b"PAR1"
        elif path.suffix == ".onnx":
            proto = onnx.load_from_string(data)
            assert {node.domain for node in proto.graph.node} == {""}, "operators of the standard alone"
        elif path.suffix == ".weights":
            assert np.isfinite(np.frombuffer(data, dtype=np.float32)).all()
        else:
            assert data.decode().isprintable() or "\n" in data.decode()


@pytest.mark.slow
def test_exported_again_as_a_zip_it_is_the_same_to_the_byte(demo_bundle, demo_run, export, tmp_path):
    """Once more through tracing, graph and gate: only the clock may differ, and nothing of it is in there."""
    out = tmp_path / "model.zip"
    said = export(demo_run, "--zip", "--out", out)
    assert said.code == 0, said.err
    assert "parity passed on 8 cities" in said.out
    assert f"--bundle {out}" in said.out
    held = files(demo_bundle)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        zipped = {name: archive.read(name) for name in archive.namelist()}
        assert {info.date_time[0] for info in archive.infolist()} == {1980}
    assert zipped.keys() == held.keys()
    for name in held:
        assert zipped[name] == held[name], name
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


class TestRefused:
    def test_an_unfinished_run(self, demo_run, export, tmp_path):
        folder = shutil.copytree(demo_run, tmp_path / "run")
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"finished": False}))
        said = export(folder)
        assert said.code == 2
        assert "not finished" in said.err
        assert "topt-deploy train --resume" in said.err

    @pytest.mark.parametrize("form", [(), ("--zip",)])
    def test_a_folder_that_is_no_bundle_is_not_overwritten(self, form, demo_run, export, tmp_path):
        out = tmp_path / "precious"
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        said = export(demo_run, "--out", out, *form)
        assert said.code == 2
        assert "not a bundle" in said.err
        assert files(tmp_path) == {"precious/thesis.txt": b"years of work"}

    @pytest.mark.parametrize("form", [(), ("--zip",)])
    def test_a_file_that_is_no_bundle_is_not_overwritten(self, form, demo_run, export, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        said = export(demo_run, "--out", tmp_path / "thesis.txt", *form)
        assert said.code == 2
        assert files(tmp_path) == {"thesis.txt": b"years of work"}

    def test_a_missing_folder_is_said_before_the_work(self, demo_run, export, tmp_path):
        said = export(demo_run, "--out", tmp_path / "nowhere" / "model.topt")
        assert said.code == 73
        assert "cannot create" in said.err
        assert "parity" not in said.err, "half a minute's work for nothing"

    def test_a_run_whose_weights_are_damaged(self, demo_run, export, tmp_path):
        folder = shutil.copytree(demo_run, tmp_path / "run")
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        said = export(folder, "--out", tmp_path / "model.topt")
        assert said.code not in (0, 70), said.err
        assert "model.safetensors" in said.err
        assert not (tmp_path / "model.topt").exists()
