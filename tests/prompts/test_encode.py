from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encode_city import IDS, Stopped, Watched, write_city
from encoders_mllama import tiny_mllama
from encoders_qwen import tiny_qwen
from encoders_text import tiny_text
from PIL import Image

from topt_deploy.data.parquet import read_parquet, write_parquet
from topt_deploy.errors import BadData, UsageError
from topt_deploy.prompts import encode as module
from topt_deploy.prompts.cache import Cache
from topt_deploy.prompts.encode import Encoder, PooledEncoder, encode, limit_pixels
from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
from topt_deploy.prompts.pytorch.load import torch_encoder
from topt_deploy.prompts.table import read_regions
from topt_deploy.prompts.templates import load_templates

TASKS = ("crime", "none")
TEMPLATES = load_templates()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> PooledEncoder:
    folder = tmp_path_factory.mktemp("qwen")
    tiny_qwen(folder)
    return torch_encoder(open_checkpoint(str(folder)), device="cpu", precision="fp32")


@pytest.fixture
def city(tmp_path: Path) -> Path:
    write_city(tmp_path)
    return tmp_path


def run(city: Path, encoder: Encoder, tasks=TASKS, **settings):
    regions = read_regions(city / "regions.parquet", TEMPLATES.wording)
    return encode(regions, encoder, TEMPLATES, tasks, root=city, **settings)


def vectors(table, task: str) -> np.ndarray:
    return np.array(table.column(f"prompt_{task}").to_pylist(), dtype=np.float64)


def test_every_region_gets_the_vector_of_its_own_text_and_images(city, qwen):
    done = run(city, qwen)
    assert (done.encoded, done.cached, done.skipped) == (5, 0, 0)
    assert done.table.column("region_id").to_pylist() == sorted(IDS)
    rows = {row["region_id"]: row for row in read_parquet(city / "regions.parquet").to_pylist()}
    for region, row in rows.items():
        pixels = [np.asarray(Image.open(city / name).convert("RGB")) for name in row["images"]]
        prompt = qwen.prompt(row["text"], pixels, [TEMPLATES.question(task) for task in TASKS])
        (expected,) = qwen.vectors([prompt])
        for task, vector in zip(TASKS, expected, strict=True):
            assert np.array_equal(vectors(done.table, task)[int(region)], vector)
    field = done.table.schema.field("prompt_crime")
    assert field.metadata[b"encoder"].decode() == qwen.spec.identity
    assert field.metadata[b"template"].decode() == TEMPLATES.sha256("crime")
    assert field.metadata[b"precision"] == b"fp32"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama"])
def test_regions_that_share_a_batch_keep_their_vectors(city, qwen, tmp_path, family):
    encoder = qwen
    if family == "mllama":
        tiny_mllama(tmp_path / "model")
        encoder = torch_encoder(open_checkpoint(str(tmp_path / "model")), device="cpu", precision="fp32")
    alone = run(city, encoder)
    watched = Watched(encoder)
    together = run(city, watched, batch=3)
    assert watched.computed == [3, 2]
    for task in TASKS:
        assert np.abs(vectors(together.table, task) - vectors(alone.table, task)).max() < 1e-5


def test_a_batch_stays_below_its_number_of_tokens(city, qwen, monkeypatch):
    groups = []

    def pooled(backend, prompts):
        groups.append(len(prompts))
        return module_pooled(backend, prompts)

    module_pooled = module.pooled
    monkeypatch.setattr(module, "pooled", pooled)
    run(city, qwen, batch=5)
    assert groups == [5]
    longest = max(len(ids.ids) for ids in qwen.prompt("Region 03", [np.zeros((90, 70, 3), np.uint8)], ["a"]).sequences)
    monkeypatch.setattr(module, "BATCH_TOKENS", longest)
    groups.clear()
    run(city, qwen, batch=5)
    assert groups == [1] * 5


def test_what_did_not_change_is_not_computed_again(city, qwen):
    with Cache(city / "cache") as cache:
        first = run(city, qwen, cache=cache)
        watched = Watched(qwen)
        again = run(city, watched, cache=cache)
        assert watched.computed == []
        assert (again.encoded, again.cached) == (0, 5)
        assert again.table.equals(first.table, check_metadata=True)

        table = read_parquet(city / "regions.parquet")
        texts = table.column("text").to_pylist()
        texts[IDS.index("02")] += " One has closed."
        column = table.schema.get_field_index("text")
        write_parquet(city / "regions.parquet", table.set_column(column, "text", [texts]))
        Image.new("RGB", (60, 60)).save(city / "images/00_1.png")
        watched = Watched(qwen)
        changed = run(city, watched, cache=cache)
        assert watched.computed == [1, 1]
        differ = (vectors(changed.table, "crime") != vectors(first.table, "crime")).any(axis=1)
        assert differ.tolist() == [True, False, True, False, False]

        watched = Watched(qwen)
        more = run(city, watched, tasks=(*TASKS, "check_in"), cache=cache)
        assert watched.computed == [1] * 5
        assert np.array_equal(vectors(more.table, "crime"), vectors(changed.table, "crime"))
        assert (
            np.abs(vectors(more.table, "check_in") - vectors(run(city, qwen, ("check_in",)).table, "check_in")).max()
            < 1e-5
        )


def test_another_encoders_vectors_are_not_taken(city, qwen):
    others = {
        "precision": replace(qwen, precision="bf16"),
        "runtime": replace(qwen, runtime="onnxruntime"),
        "configuration": replace(qwen, sha256="0" * 64),
        "weights": replace(qwen, spec=replace(qwen.spec, weights_sha256="0" * 64)),
        "settings": replace(qwen, spec=limit_pixels(qwen.spec, 3136)),
        "frame": replace(qwen, spec=replace(qwen.spec, chat={**qwen.spec.chat, "after": "?"})),
    }
    with Cache(city / "cache") as cache:
        run(city, qwen, cache=cache)
        for what, other in others.items():
            assert run(city, other, cache=cache).cached == 0, what
        renamed = replace(qwen, spec=replace(qwen.spec, name="the same by another name"))
        assert run(city, renamed, cache=cache).cached == 5


@pytest.mark.parametrize("batch", [1, 2])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(city, qwen, batch):
    write_parquet(city / "whole", run(city, qwen, batch=batch).table)
    with Cache(city / "cache") as cache, pytest.raises(Stopped):
        run(city, Watched(qwen, stop_after=3), batch=batch, cache=cache)
    with Cache(city / "cache") as cache:
        watched = Watched(qwen)
        done = run(city, watched, batch=batch, cache=cache)
    kept = 3 // batch * batch
    assert (sum(watched.computed), done.cached) == (5 - kept, kept)
    write_parquet(city / "resumed", done.table)
    assert (city / "resumed").read_bytes() == (city / "whole").read_bytes()


def test_progress_counts_every_region(city, qwen):
    (city / "images/01_0.jpg").write_bytes(b"no image")
    seen = []
    with Cache(city / "cache") as cache:
        settings = {"cache": cache, "on_bad_image": "skip", "batch": 2}
        run(city, qwen, progress=lambda *counts: seen.append(counts), **settings)
        assert seen == sorted(seen)
        assert seen[-1] == (5, 5)
        seen.clear()
        run(city, qwen, progress=lambda *counts: seen.append(counts), **settings)
    assert seen == [(n, 5) for n in range(1, 6)]


def spoil(city: Path, how: str) -> None:
    file = city / "images/03_1.png"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif how == "absent":
        file.unlink()
    elif how == "no image":
        file.write_bytes(b"<html>404</html>")
    elif how == "a thread":
        Image.new("RGB", (450, 2)).save(file)


@pytest.mark.parametrize("how", ["truncated", "absent", "no image", "a thread"])
def test_an_unreadable_image_fails_or_leaves_its_region_out(city, qwen, how):
    whole = run(city, qwen).table
    spoil(city, how)
    with pytest.raises(BadData) as caught:
        run(city, qwen)
    assert "03_1.png" in caught.value.file
    assert caught.value.ids == ["03"]
    assert "--on-bad-image skip" in caught.value.fix
    done = run(city, qwen, on_bad_image="skip")
    assert (done.encoded, done.skipped) == (4, 1)
    assert done.table.column("status").to_pylist() == ["ok", "ok", "ok", "skipped", "ok"]
    assert done.table.column("reason")[3].as_py().startswith("images/03_1.png: ")
    for task in TASKS:
        column = done.table.column(f"prompt_{task}")
        assert column[3].as_py() is None  # no zeros, and no vector of the other two images
        assert column.null_count == 1
        assert all(column[row].as_py() == whole.column(f"prompt_{task}")[row].as_py() for row in (0, 1, 2, 4))


def test_a_text_that_breaks_the_frame_is_never_skipped(city, qwen):
    table = read_parquet(city / "regions.parquet")
    texts = [text.replace("04", "<|im_end|>") for text in table.column("text").to_pylist()]
    write_parquet(city / "regions.parquet", table.set_column(table.schema.get_field_index("text"), "text", [texts]))
    with pytest.raises(BadData, match="control token") as caught:
        run(city, qwen, on_bad_image="skip")
    assert caught.value.ids == ["04"]


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_a_useless_vector_stops_the_run_and_is_not_kept(city, qwen, value):
    class Broken(Watched):
        def vectors(self, prompts):
            found = super().vectors(prompts)
            return found if sum(self.computed) < 3 else np.full_like(found, value)

    with Cache(city / "cache") as cache:
        with pytest.raises(BadData, match="no usable vector") as caught:
            run(city, Broken(qwen), cache=cache)
        assert caught.value.ids == ["02"]
        assert run(city, qwen, cache=cache).cached == 2


def test_a_model_of_text_takes_texts_and_refuses_images(city, tmp_path):
    tiny_text(tmp_path / "model")
    encoder = torch_encoder(open_checkpoint(str(tmp_path / "model")), device="cpu", precision="fp32")
    with pytest.raises(BadData, match="reads no images") as caught:
        run(city, encoder, on_bad_image="skip")
    assert caught.value.ids == ["00", "01", "03", "04"]
    write_city(city, images=False)
    assert run(city, encoder).encoded == 5


def test_fewer_pixels_make_another_encoder(city, qwen):
    limited = limit_pixels(qwen.spec, 56 * 56)
    assert limited.identity != qwen.spec.identity
    assert "max_pixels=3136" in limited.identity
    with pytest.raises(UsageError, match="--max-pixels"):
        limit_pixels(replace(qwen.spec, settings={}), 3136)
