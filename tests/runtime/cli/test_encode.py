"""`topt-run encode`: a city with images, by an exported encoder."""

import json
import shutil

import numpy as np
import pytest
from encode_city import write_city

from topt_deploy.data.parquet import read_parquet

TASKS = ("crime", "check_in", "service_call")


@pytest.fixture
def regions(tmp_path):
    return write_city(tmp_path / "city")


@pytest.fixture
def bundle(encoders):
    return encoders("qwen2_5_vl", "int8")


def vectors(table, task):
    return np.array(table.column(f"prompt_{task}").to_pylist())


def test_a_city_is_encoded_by_a_bundle(topt_run, bundle, regions):
    arguments = ("encode", regions, "--bundle", bundle, "--task", "crime", "--task", "none")
    said = topt_run(*arguments, "--threads", 2)
    assert said.code == 0, said
    assert "5 regions encoded" in said.out
    table = read_parquet(regions.with_name("prompts.parquet"))
    assert table.column_names[4:] == ["prompt_crime", "prompt_none"]
    assert table.schema.field("prompt_none").metadata[b"precision"] == b"int8"
    said = topt_run(*arguments, "--update-regions", "--log-format", "json")
    assert json.loads(said.out) == {
        "event": "encoded", "file": str(regions.with_name("prompts.parquet")), "encoded": 0, "cached": 5, "skipped": 0,
    }  # fmt: skip
    assert said.err == ""
    assert "prompt_none" in read_parquet(regions).column_names


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_vectors_are_pytorchs(topt_run, pictured, tmp_path, engine):
    if engine == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed (extra openvino)")
    shutil.copytree(pictured / "images", tmp_path / "images")
    regions = shutil.copy(pictured / "regions.parquet", tmp_path)
    said = topt_run("encode", regions, "--bundle", pictured / "encoder.topt", "--encoder-engine", engine, "--batch", 2)
    assert said.code == 0, said
    expected, found = read_parquet(pictured / "prompts.parquet"), read_parquet(tmp_path / "prompts.parquet")
    assert found.column_names == expected.column_names
    for task in TASKS:
        assert np.abs(vectors(found, task) - vectors(expected, task)).max() < 1e-4
        name = f"prompt_{task}"
        assert found.schema.field(name).metadata == expected.schema.field(name).metadata, (
            "the same encoder and template"
        )


def test_vectors_of_one_engine_are_not_taken_for_anothers(topt_run, bundle, regions):
    pytest.importorskip("openvino", reason="OpenVINO is not installed (extra openvino)")
    arguments = ("encode", regions, "--bundle", bundle, "--task", "none")
    assert "5 regions encoded" in topt_run(*arguments).out
    assert "5 regions encoded" in topt_run(*arguments, "--encoder-engine", "openvino").out
    assert "5 as they were" in topt_run(*arguments, "--encoder-engine", "openvino").out


def test_a_citys_bundle_lends_its_encoder(topt_run, prompted, tmp_path):
    regions = shutil.copy(prompted / "bare.parquet", tmp_path / "regions.parquet")
    made = {}
    for name in ("model.topt", "beside.topt", "encoder.topt"):
        out = tmp_path / f"{name}.parquet"
        said = topt_run("encode", regions, "--bundle", prompted / name, "--out", out, "--no-cache")
        assert said.code == 0, said
        made[name] = out.read_bytes()
    assert len(set(made.values())) == 1


def test_a_bundle_without_an_encoder(topt_run, demo_bundle, regions):
    said = topt_run("encode", regions, "--bundle", demo_bundle)
    assert said.code == 2
    assert "has no prompt encoder" in said.err


def test_own_templates(topt_run, bundle, regions, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('[tasks.noise]\nquestion = "How loud is it here?"\n')
    arguments = ("encode", regions, "--bundle", bundle, "--task", "noise")
    said = topt_run(*arguments)
    assert said.code == 2
    assert "no template for task 'noise'" in said.err
    assert topt_run(*arguments, "--templates", own).code == 0


def test_errors_are_told_to_machines(topt_run, bundle, regions):
    (regions.parent / "images/03_1.png").unlink()
    said = topt_run("encode", regions, "--bundle", bundle, "--log-format", "json")
    assert said.code == 65
    (line,) = said.err.splitlines()
    assert json.loads(line)["region_ids"] == ["03"]
    assert json.loads(line)["file"].endswith("03_1.png")
    assert not regions.with_name("prompts.parquet").exists()
