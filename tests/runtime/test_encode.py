import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from encode_city import write_city
from encoders_qwen import tiny_qwen

from topt_deploy.encoder.templates import load_templates
from topt_deploy.model.encoder.load import open_checkpoint, torch_encoder
from topt_deploy.parquet import read_parquet
from topt_deploy.runtime import encoder

PARTS = ("spec", "precision", "sha256", "host", "backend")


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the command opens is a tiny model in PyTorch in place of exported graphs; how it was asked for."""
    tiny_qwen(tmp_path / "model")
    found = torch_encoder(open_checkpoint(str(tmp_path / "model")), device="cpu", precision="fp32")
    asked = []

    def open_encoder(path, **settings):
        asked.append({"path": path, **settings})
        return SimpleNamespace(templates=load_templates(), **{n: getattr(found, n) for n in PARTS})

    monkeypatch.setattr(encoder, "open_encoder", open_encoder)
    return asked


def test_a_city_is_encoded_by_a_bundle(topt_run, opened, tmp_path):
    regions = write_city(tmp_path / "city")
    arguments = ("encode", regions, "--bundle", tmp_path / "enc.topt", "--task", "crime", "--task", "none")
    said = topt_run(*arguments, "--threads", 2)
    assert said.code == 0, said
    assert opened == [{"path": tmp_path / "enc.topt", "engine": "onnxruntime", "threads": 2}]
    assert "5 regions encoded" in said.out
    table = read_parquet(regions.with_name("prompts.parquet"))
    assert table.column_names[4:] == ["prompt_crime", "prompt_none"]
    said = topt_run(*arguments, "--update-regions", "--log-format", "json")
    assert json.loads(said.out) == {
        "event": "encoded", "file": str(regions.with_name("prompts.parquet")), "encoded": 0, "cached": 5, "skipped": 0,
    }  # fmt: skip
    assert said.err == ""
    assert "prompt_none" in read_parquet(regions).column_names


def test_vectors_of_one_engine_are_not_taken_for_anothers(topt_run, opened, tmp_path):
    regions = write_city(tmp_path / "city")
    arguments = ("encode", regions, "--bundle", tmp_path / "enc.topt", "--task", "none")
    assert "5 regions encoded" in topt_run(*arguments).out
    assert "5 regions encoded" in topt_run(*arguments, "--engine", "openvino").out
    assert "5 as they were" in topt_run(*arguments, "--engine", "openvino").out


def test_errors_are_told_to_machines(topt_run, opened, tmp_path):
    regions = write_city(tmp_path / "city")
    (tmp_path / "city/images/03_1.png").unlink()
    said = topt_run("encode", regions, "--bundle", tmp_path / "enc.topt", "--log-format", "json")
    assert said.code == 65
    (line,) = said.err.splitlines()
    assert json.loads(line)["region_ids"] == ["03"]
    assert json.loads(line)["file"].endswith("03_1.png")
    assert not regions.with_name("prompts.parquet").exists()
