import json
from pathlib import Path

import pyarrow as pa
import pytest
from encode_city import IDS, write_city
from encoders_qwen import tiny_qwen
from encoders_text import tiny_text

from topt_deploy.data.parquet import read_parquet, write_parquet
from topt_deploy.prompts.encode import PooledEncoder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_qwen(folder / "qwen")
    tiny_text(folder / "text")
    return folder


@pytest.fixture
def city(tmp_path: Path) -> Path:
    write_city(tmp_path / "city")
    return tmp_path / "city"


def test_a_city_is_encoded_and_its_table_updated(topt_deploy, models, city):
    before = read_parquet(city / "regions.parquet")
    said = topt_deploy("encode", city, "--model", models / "qwen", "--update-regions")
    assert said.code == 0, said
    assert "5 regions encoded, 0 as they were, 0 skipped" in said.out
    prompts = read_parquet(city / "prompts.parquet")
    tasks = ["prompt_crime", "prompt_check_in", "prompt_service_call"]
    assert prompts.column_names == ["region_id", "city_id", "status", "reason", *tasks]
    regions = read_parquet(city / "regions.parquet")
    assert regions.column_names == [*before.column_names, *tasks]
    assert regions.select(before.column_names).equals(before)
    assert regions.column("region_id").to_pylist() == list(IDS)
    by_id = dict(zip(prompts.column("region_id").to_pylist(), prompts.column("prompt_crime").to_pylist(), strict=True))
    assert regions.column("prompt_crime").to_pylist() == [by_id[region] for region in IDS]
    first = (city / "prompts.parquet").read_bytes()
    again = topt_deploy("encode", city / "regions.parquet", "--model", models / "qwen", "--resume", "--batch", 4)
    assert "0 regions encoded, 5 as they were, 0 skipped" in again.out
    assert (city / "prompts.parquet").read_bytes() == first


def test_own_templates_and_tasks(topt_deploy, models, city):
    own = city / "own.toml"
    own.write_text('[tasks.noise]\nquestion = "How loud is it here?"\n')
    arguments = ("encode", city, "--model", models / "qwen", "--no-cache", "--out", city / "noise.parquet")
    assert topt_deploy(*arguments, "--templates", own, "--task", "noise").code == 0
    assert read_parquet(city / "noise.parquet").column_names[-1] == "prompt_noise"
    assert not (city / ".topt").exists()
    said = topt_deploy(*arguments, "--task", "noise")
    assert said.code == 2
    assert "no template for task 'noise'" in said.err


def test_fewer_pixels_are_named(topt_deploy, models, city):
    said = topt_deploy("encode", city, "--model", models / "qwen", "--max-pixels", 56 * 56)
    assert said.code == 0, said
    field = read_parquet(city / "prompts.parquet").schema.field("prompt_crime")
    assert b"max_pixels=3136" in field.metadata[b"encoder"]


def test_an_interrupted_run_goes_on(topt_deploy, models, city, monkeypatch):
    assert topt_deploy("encode", city, "--model", models / "qwen", "--no-cache").code == 0
    whole = (city / "prompts.parquet").read_bytes()
    (city / "prompts.parquet").unlink()
    vectors, calls = PooledEncoder.vectors, []

    def stopped(self, prompts):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(prompts)
        return vectors(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(PooledEncoder, "vectors", stopped)
        said = topt_deploy("encode", city, "--model", models / "qwen")
    assert said.code == 130
    assert "--resume" in said.err
    assert not (city / "prompts.parquet").exists()
    said = topt_deploy("encode", city, "--model", models / "qwen", "--resume")
    assert "3 regions encoded, 2 as they were" in said.out
    assert (city / "prompts.parquet").read_bytes() == whole


def test_a_bad_image_fails_or_is_skipped(topt_deploy, models, city):
    (city / "images/03_1.png").write_bytes(b"<html>404</html>")
    said = topt_deploy("encode", city, "--model", models / "qwen")
    assert said.code == 65
    assert "03_1.png" in said.err
    assert "'03'" in said.err
    assert not (city / "prompts.parquet").exists()
    said = topt_deploy("encode", city, "--model", models / "qwen", "--on-bad-image", "skip")
    assert said.code == 3  # done in part
    assert "1 skipped" in said.out


@pytest.mark.parametrize(
    ("code", "reason", "arguments"),
    [
        (66, "not on this machine", ("--model", "nobody/such-model")),
        (2, "needs --revision", ("--model", "nobody/such-model", "--allow-download")),
        (2, "there is nothing to resume", ("--model", "{models}/qwen", "--resume")),
        (2, "--no-cache", ("--model", "{models}/qwen", "--resume", "--no-cache")),
        (2, "overwrite its input", ("--model", "{models}/qwen", "--out", "{city}/regions.parquet")),
        (73, "cannot create", ("--model", "{models}/qwen", "--out", "{city}/images")),
        (65, "reads no images", ("--model", "{models}/text")),
        (2, "tiles of its own size, or reads none", ("--model", "{models}/text", "--max-pixels", "5")),
        (2, "no template", ("--model", "{models}/qwen", "--task", "tax")),
        (66, "no such file", ("--model", "{models}/qwen", "--templates", "{city}/absent.toml")),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(topt_deploy, models, city, code, reason, arguments):
    before = sorted(city.rglob("*"))
    said = topt_deploy("encode", city, *(a.format(models=models, city=city) for a in arguments))
    assert said.code == code, said
    assert reason in said.err
    assert "Traceback" not in said.err
    assert [path for path in sorted(city.rglob("*")) if ".topt" not in path.parts] == before


def test_a_city_that_is_not_there(topt_deploy, models, tmp_path):
    said = topt_deploy("encode", tmp_path, "--model", models / "text")
    assert said.code == 66
    assert "no city in this folder" in said.err


def test_images_below_another_folder(topt_deploy, models, city, tmp_path):
    (city / "images").rename(tmp_path / "images")
    arguments = ("encode", city, "--model", models / "qwen", "--no-cache", "--task", "none")
    assert topt_deploy(*arguments).code == 65
    assert topt_deploy(*arguments, "--images-root", tmp_path).code == 0


def test_a_text_alone_is_built_and_encoded(topt_deploy, models, city):
    regions = read_parquet(city / "regions.parquet").drop_columns(["text", "images"])
    write_parquet(city / "regions.parquet", regions)
    assert topt_deploy("encode", city, "--model", models / "text", "--precision", "bf16", "--batch", 5).code == 0
    column = read_parquet(city / "prompts.parquet").column("prompt_crime")
    assert pa.types.is_fixed_size_list(column.type)
    assert len({json.dumps(vector) for vector in column.to_pylist()}) == 5
