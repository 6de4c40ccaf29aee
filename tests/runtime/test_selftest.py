"""`topt-run selftest`: cities and regions that travel with a bundle, once more on this machine."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from builders import fixed_lists, replaced

from topt_deploy.bundle.manifest import ENCODER
from topt_deploy.runtime.processor import deciding_sets

BAD_BUNDLE = 76


@pytest.fixture
def city(prompted, tmp_path):
    return shutil.copytree(prompted, tmp_path / "city", ignore=shutil.ignore_patterns("runs"))


@pytest.fixture
def encoder(encoders, tmp_path):
    return shutil.copytree(encoders("text"), tmp_path / "encoder.topt")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["model.topt", "beside.topt"])
def test_a_citys_bundle_tests_its_encoder_too(topt_run, city, name, engine):
    if engine == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed (extra openvino)")
    said = topt_run("selftest", city / name, "--encoder-engine", engine, "--log-format", "json")
    assert said.code == 0, said.err
    checks = json.loads(said.out)["checks"]
    assert [check.get("city") or check["region"] for check in checks] == [
        "golden-7", "golden-31", "enlarged-725", "golden-0", "golden-1", "golden-2",
    ]  # fmt: skip
    assert all(check["cosine"] > 0.999999 for check in checks[3:])


def test_an_encoder_that_is_elsewhere_is_not_tested(topt_run, city):
    (city / "encoder.topt").rename(city / "elsewhere.topt")
    said = topt_run("selftest", city / "beside.topt")
    assert said.code == 0, said.err
    assert "golden-31" in said.out
    assert "cosine" not in said.out


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_an_encoders_own_bundle(topt_run, encoders, precision):
    said = topt_run("selftest", encoders("qwen2_5_vl", precision))
    assert said.code == 0, said.err
    assert "golden-2: 3 images, cosine" in said.out
    assert f"passed on onnxruntime ({precision})" in said.out


def test_values_of_another_machine(topt_run, encoder, reseal):
    file = encoder / "golden" / "regions.parquet"
    table = pq.read_table(file)
    values = table.column("prompt_check_in").combine_chunks().flatten().to_numpy().reshape(3, -1).copy()
    values[1, 5] += 1e-3
    pq.write_table(replaced(table, prompt_check_in=fixed_lists(values)), file)
    said = topt_run("selftest", encoder)
    assert said.code == BAD_BUNDLE
    assert "golden/regions.parquet" in said.err
    reseal(encoder, lambda record: None)
    said = topt_run("selftest", encoder)
    assert said.code == BAD_BUNDLE
    assert "self-test failed on golden-1" in said.err
    assert "relative difference ≤ 0.0001" in said.err


@pytest.mark.parametrize("tolerance", [{"cosine": 1.1, "difference": 1e-4}, {"cosine": 0.999999, "difference": 0}])
def test_a_tolerance_that_nothing_passes(topt_run, encoder, reseal, tolerance):
    reseal(encoder, lambda record: record.update(tolerance=tolerance))
    said = topt_run("selftest", encoder)
    assert said.code == BAD_BUNDLE
    assert "self-test failed on golden-0" in said.err


def test_every_file_is_checked(topt_run, city):
    # Neither the engine's nor the golden regions': nothing else reads it.
    file = city / "model.topt" / ENCODER / "decoder.standard.onnx"
    file.write_bytes(bytes(file.stat().st_size))
    said = topt_run("selftest", city / "model.topt")
    assert said.code == BAD_BUNDLE
    assert "decoder.standard.onnx is not the file" in said.err


def test_golden_regions_that_are_none(topt_run, encoder, reseal):
    file = encoder / "golden" / "regions.parquet"
    pq.write_table(pq.read_table(file).drop_columns("text"), file)
    reseal(encoder, lambda record: None)
    said = topt_run("selftest", encoder)
    assert said.code == BAD_BUNDLE
    assert "lack a column" in said.err


def test_info_says_what_encoder_a_bundle_is(topt_run, encoders):
    said = topt_run("info", encoders("text", "int8"))
    assert said.code == 0, said.err
    assert "family text" in said.out
    assert "precision  int8" in said.out
    assert f"gated on   a processor with {', '.join(deciding_sets())}" in said.out
    told = json.loads(topt_run("info", encoders("text", "int8"), "--log-format", "json").out)
    assert told["precision"] == "int8"
    assert {measured["form"] for measured in told["parity"]} == {"onnxruntime", "standard"}


def test_an_encoder_is_not_taken_for_a_citys_bundle(topt_run, encoders, demo_city):
    said = topt_run("predict", demo_city / "regions.parquet", "--bundle", encoders("text", "int8"))
    assert said.code == 76
    assert "goes to --encoder-bundle" in said.err
