"""What is encoded is what was meant: texts that fit, images as they are, and a cache that nobody else has written."""

import os
import shutil
import sqlite3
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import replaced
from commands import shell
from encode_city import write_city
from PIL import Image

from topt_deploy.errors import BadBundle, BadData, NoPermission, OutOfMemory
from topt_deploy.prompts import encode as module
from topt_deploy.prompts.cache import Cache, _checksum
from topt_deploy.prompts.encode import encode
from topt_deploy.prompts.encode_job import open_cache
from topt_deploy.prompts.table import read_regions
from topt_deploy.prompts.templates import load_templates
from topt_deploy.runtime.predictor import load

TEMPLATES = load_templates()


@pytest.fixture(scope="module")
def encoder(encoders):
    """A tiny text model, exported."""
    from topt_deploy.runtime.prompt_encoder import open_encoder

    return open_encoder(encoders("text"), threads=1).encoder


def table(folder, text, images=False):
    write_city(folder, images=images)
    regions = pq.read_table(folder / "regions.parquet")
    return read_regions(replaced(regions, text=[text, *["short"] * 4]), TEMPLATES.wording)


class TestLength:
    def test_a_text_beyond_the_models_context(self, tmp_path, encoder):
        short = replace(encoder, spec=replace(encoder.spec, context=400))
        done = encode(table(tmp_path, "a street " * 20), short, TEMPLATES, ("crime",), root=tmp_path)
        assert done.encoded == 5
        with pytest.raises(BadData, match="longer than the language model reads") as caught:
            encode(table(tmp_path, "a street " * 400), short, TEMPLATES, ("crime",), root=tmp_path)
        assert caught.value.ids == ["04"]
        assert "400 tokens" in caught.value.expected

    def test_a_text_without_end_is_not_even_tokenised(self, tmp_path, encoder, monkeypatch):
        real = type(encoder.host).prompt

        def of_short_ones(self, text, *more):
            assert len(text) < 1000
            return real(self, text, *more)

        monkeypatch.setattr(type(encoder.host), "prompt", of_short_ones)
        short = replace(encoder, spec=replace(encoder.spec, context=2048))
        with pytest.raises(BadData, match="longer than"):
            encode(table(tmp_path, "x" * 5_000_000), short, TEMPLATES, ("crime",), root=tmp_path)

    def test_the_export_records_it(self, encoder, tiny_models):
        from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint

        assert open_checkpoint(str(tiny_models("text"))).spec.context == encoder.spec.context > 0


class TestImages:
    def test_one_named_time_and_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "REGION_PIXELS", 1_000_000)
        Image.fromarray(np.zeros((500, 900, 3), np.uint8)).save(tmp_path / "a.png")
        assert len(module._pictures(tmp_path, ["a.png"] * 2)) == 2
        with pytest.raises(module._BadImage) as caught:
            module._pictures(tmp_path, ["a.png"] * 300)
        assert "too many pixels together" in caught.value.error.message

    def test_a_table_in_memory_reads_none(self, prompted, tmp_path, monkeypatch):
        """Whoever sends a table must not choose files of the server's."""
        monkeypatch.chdir(tmp_path)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "secret.png")
        with pytest.raises(BadData, match="no folder"):
            module._pictures(None, ["secret.png"])
        regions = pq.read_table(prompted / "bare.parquet")
        regions = replaced(regions, images=pa.array([["secret.png"]] * len(regions)))
        with pytest.raises(BadData, match="image"):
            load(prompted / "model.topt").predict(regions, pq.read_table(prompted / "mobility.parquet"))

    @pytest.mark.parametrize("skipped", [False, True])
    def test_a_skipped_region_is_done_in_part(self, skipped, pictured, tmp_path, topt_run):
        city = shutil.copytree(pictured, tmp_path / "city")
        if skipped:
            next((city / "images").iterdir()).write_bytes(b"no image")
        said = topt_run(
            "encode", city / "regions.parquet", "--bundle", city / "encoder.topt", "--no-cache",
            "--on-bad-image", "skip", "--out", tmp_path / "p.parquet", "--task", "crime",
        )  # fmt: skip
        assert said.code == (3 if skipped else 0), said.err


class TestCache:
    @pytest.fixture
    def file(self, tmp_path):
        return tmp_path / ".topt" / "prompts.sqlite"

    def test_a_vector_of_another_length_is_none(self, file):
        with open_cache(file) as cache:
            cache.put({"a": np.ones(4, np.float32), "b": np.ones(3, np.float32)})
            assert set(cache.get(["a", "b"], width=4)) == {"a"}

    def test_a_view_in_its_place(self, file):
        """One that never ends, or that gives every key the same vector."""
        open_cache(file).__exit__()
        with sqlite3.connect(file) as database:
            database.execute("DROP TABLE vectors")
            database.execute(
                "CREATE VIEW vectors AS WITH RECURSIVE r(key) AS (SELECT 'a' UNION ALL SELECT key FROM r)"
                " SELECT key, x'00' AS vector, x'00' AS checksum FROM r"
            )
        database.close()
        with pytest.raises(BadData, match="not a cache"):
            open_cache(file)

    @pytest.mark.parametrize(
        "more",
        [
            "CREATE TRIGGER t AFTER INSERT ON vectors BEGIN DELETE FROM vectors; END",
            "CREATE TABLE other (x)",
            "CREATE VIEW v AS SELECT 1",
        ],
    )
    def test_more_than_a_cache_has(self, more, file):
        open_cache(file).__exit__()
        with sqlite3.connect(file) as database:
            database.execute(more)
        database.close()
        with pytest.raises(BadData, match="not a cache"):
            open_cache(file)

    def test_a_link_is_not_followed(self, file, tmp_path):
        file.parent.mkdir()
        file.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(NoPermission, match="not this user's alone") as caught:
            open_cache(file)
        assert "--no-cache" in caught.value.fix
        assert not (tmp_path / "elsewhere").exists()

    def test_nor_a_folder_that_is_one(self, file, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        file.parent.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(NoPermission):
            open_cache(file)
        assert not list((tmp_path / "elsewhere").iterdir())

    @pytest.mark.parametrize("which", ["folder", "file"])
    def test_what_others_may_write_to(self, which, file):
        open_cache(file).__exit__()
        (file if which == "file" else file.parent).chmod(0o777)
        with pytest.raises(NoPermission, match="not this user's alone") as caught:
            open_cache(file)
        assert "others may write" in caught.value.found

    @pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
    def test_another_users(self, file):
        open_cache(file).__exit__()
        os.chown(file, 4242, 4242)
        with pytest.raises(NoPermission, match="not this user's alone"):
            open_cache(file)

    def test_locks_that_there_are_not_lead_to_no_cache(self, file):
        with open_cache(file), sqlite3.connect(file, isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(Exception, match="--no-cache"):
                Cache(file, wait_s=0.05)
            other.execute("ROLLBACK")

    def test_a_forged_vector_needs_this_users_rights(self, prompted, tmp_path):
        """The checksum has no key: what keeps others from forging is whose the file is."""
        city = shutil.copytree(prompted, tmp_path / "city")
        command = "topt-run predict bare.parquet --bundle model.topt --mobility mobility.parquet --out p.parquet"
        assert shell(command, city).code == 0
        file = city / ".topt" / "prompts.sqlite"
        with sqlite3.connect(file) as database:
            for (key,) in database.execute("SELECT key FROM vectors").fetchall():
                forged = np.ones(64, np.float32).tobytes()
                database.execute(
                    "UPDATE vectors SET vector=?, checksum=? WHERE key=?", (forged, _checksum(key, forged), key)
                )
        database.close()
        file.chmod(0o666)
        said = shell(command, city)
        assert said.code == 77
        assert "not this user's alone" in said.err


class TestBundle:
    @pytest.mark.parametrize("data", [b"{}", b"null", b'{"version": "1.0"}', b"\xff" * 9, b"[" * 10_000])
    def test_a_tokenizer_that_is_none_is_the_bundles_fault(self, data, encoders, tmp_path, reseal, topt_run):
        bundle = shutil.copytree(encoders("text"), tmp_path / "encoder.topt")
        (bundle / "tokenizer.json").write_bytes(data)
        reseal(bundle, lambda record: None)
        said = topt_run("selftest", bundle)
        assert (said.code, "Traceback" in said.err) == (76, False), said.err

    def test_a_part_that_ends_the_process_is_tried_elsewhere_first(self, tmp_path):
        from topt_deploy.runtime.memory_mapping import survives

        with pytest.raises(BadBundle, match="ends the process"):
            survives(os.abort, tmp_path, "tokenizer.json")
        survives(lambda: 1 / 0, tmp_path, "tokenizer.json")

        def abort(asked):
            os.write(2, b"memory allocation of %d bytes failed" % asked)  # as Rust does
            os.abort()

        with pytest.raises(OutOfMemory):
            survives(lambda: abort(4096), tmp_path, "tokenizer.json")
        with pytest.raises(BadBundle, match="ends the process"):
            survives(lambda: abort(1 << 60), tmp_path, "tokenizer.json")

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "text"])
    def test_every_setting_that_is_missing_or_odd(self, family, encoders, tmp_path, reseal, topt_run):
        bundle = shutil.copytree(encoders(family), tmp_path / "encoder.topt")
        from topt_deploy.bundle.encoder_manifest import open_encoder_bundle

        settings = dict(open_encoder_bundle(bundle).spec.settings) or {"patch": 3}
        for key in settings:
            for odd in ("absent", None, "x", [], {}, [[1]], 0, -1, 1.5, 1 << 62, [1] * 9):
                if family == "qwen2_5_vl" and key in ("image_token", "scale", "mean", "resample") and odd in (0, 1.5):
                    continue  # which these may be

                def change(record, key=key, odd=odd):
                    record["spec"]["settings"] = {**settings, key: odd}
                    if odd == "absent":
                        del record["spec"]["settings"][key]

                if family == "text" and odd == "absent":
                    continue
                reseal(bundle, change)
                said = topt_run("selftest", bundle)
                assert (said.code, "Traceback" in said.err) == (76, False), (key, odd, said.err)

    @pytest.mark.parametrize(
        "change",
        [
            lambda r: r["networks"].pop("vision"),
            lambda r: r["spec"].update(family="other"),
            lambda r: r["spec"].update(context="long"),
            lambda r: r.update(golden=[]),
            lambda r: r.update(tolerance={"cosine": 0.1, "difference": 1e300}),
            lambda r: r.update(past={name: [1 << 40, 1 << 40] for name in r["past"]}),
        ],
    )
    def test_manifests_that_test_nothing_or_lack_a_network(self, change, encoders, tmp_path, reseal, topt_run):
        bundle = shutil.copytree(encoders("qwen2_5_vl"), tmp_path / "encoder.topt")
        reseal(bundle, change)
        said = topt_run("selftest", bundle)
        assert (said.code, "Traceback" in said.err) == (76, False), said.err

    @pytest.mark.parametrize("form", ["no rows", "no vectors", "another width", "text is a number", "images are text"])
    def test_golden_regions_of_another_form(self, form, encoders, tmp_path, reseal, topt_run):
        bundle = shutil.copytree(encoders("text"), tmp_path / "encoder.topt")
        file = bundle / "golden" / "regions.parquet"
        golden = pq.read_table(file)
        vectors = [name for name in golden.column_names if name.startswith("prompt_")]
        golden = {
            "no rows": lambda: golden.slice(0, 0),
            "no vectors": lambda: golden.drop_columns(vectors),
            "another width": lambda: replaced(golden, **{vectors[0]: [[1.0, 2.0]] * len(golden)}),
            "text is a number": lambda: replaced(golden, text=list(range(len(golden)))),
            "images are text": lambda: replaced(golden, images=["x"] * len(golden)),
        }[form]()
        pq.write_table(golden, file)
        reseal(bundle, lambda record: None)
        said = topt_run("selftest", bundle)
        assert (said.code, "Traceback" in said.err) == (76, False), said.err
