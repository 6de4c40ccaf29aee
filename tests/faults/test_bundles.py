"""Bundles that someone has made and sealed: each fault is the bundle's, and told in time."""

import json
import shutil
import time
import zipfile

import pyarrow.parquet as pq
import pytest
from builders import replaced
from commands import shell

from topt_deploy.bundle.manifest import open_bundle
from topt_deploy.bundle.tolerances import PREDICTIONS, PROMPTS
from topt_deploy.errors import BadBundle
from topt_deploy.runtime.predictor import load

BAD_BUNDLE, NO_INPUT = 76, 66


class TestSelfTest:
    @pytest.mark.parametrize(
        "change",
        [
            lambda r: r.update(golden=[]),
            lambda r: r["variants"]["fp32"].update(tolerance=1e300),
            lambda r: r["variants"]["fp32"].update(tolerance=0.01),
            lambda r: r["variants"]["fp32"].update(tolerance=0),
            lambda r: r["variants"]["fp32"].update(tolerance=True),
            lambda r: r["variants"]["fp32"].update(precision="fp2"),
        ],
    )
    def test_one_that_tests_nothing(self, change, desk, topt_run, reseal):
        reseal(desk.bundle, change)
        assert topt_run("selftest", desk.bundle).code == BAD_BUNDLE
        assert topt_run("predict", desk.regions).code == BAD_BUNDLE

    @pytest.mark.parametrize("part", ["regions", "mobility", "expected"])
    @pytest.mark.parametrize("form", ["no rows", "no columns", "text", "not Parquet"])
    def test_golden_tables_of_other_forms(self, part, form, desk, topt_run, reseal):
        file = desk.bundle / f"golden/golden-7.{part}.parquet"
        table = pq.read_table(file)
        last = table.column_names[-1]
        if form == "not Parquet":
            file.write_bytes(b"x" * 100)
        else:
            changed = {
                "no rows": lambda: table.slice(0, 0),
                "no columns": lambda: table.select(table.column_names[:1]),
                "text": lambda: replaced(table, **{last: ["x"] * len(table)}),
            }[form]()
            pq.write_table(changed, file)
        reseal(desk.bundle, lambda record: None)
        said = topt_run("selftest", desk.bundle)
        assert (said.code, "Traceback" in said.err) == (BAD_BUNDLE, False), said.err

    def test_what_an_exporter_writes_is_not_refused(self, demo_bundle):
        variants = open_bundle(demo_bundle).manifest.variants
        assert variants["fp32"]["tolerance"] == PREDICTIONS["fp32"]
        assert PROMPTS.keys() == PREDICTIONS.keys()
        assert [check.regions for check in load(demo_bundle).selftest()] == [7, 31, 725]


def test_an_encoder_without_its_place(prompted, tmp_path, reseal, topt_run):
    city = shutil.copytree(prompted, tmp_path / "city")
    reseal(city / "model.topt", lambda r: r["encoder"].pop("bundle"))
    said = topt_run("predict", city / "bare.parquet", "--bundle", city / "model.topt", "--out", city / "p.parquet")
    assert (said.code, "Traceback" in said.err) == (BAD_BUNDLE, False)


def test_a_zip_of_thousands_of_graphs_opens_in_seconds(desk, reseal, tmp_path):
    """Each of them opened the zip anew: 132 seconds for 4,000."""
    graph = (desk.bundle / "models/topt.onnx").read_bytes()
    record = json.loads((desk.bundle / "manifest.json").read_text())
    for number in range(3000):
        name = f"more/{number}.onnx"
        (desk.bundle / "more").mkdir(exist_ok=True)
        (desk.bundle / name).write_bytes(graph[:0] + b"\x3a\x00")  # a model of an empty graph
        record["files"][name] = {"size": 2, "sha256": ""}
    reseal(desk.bundle, lambda r: r.update(files=record["files"]))
    reseal(desk.bundle, lambda r: None)
    packed = tmp_path / "packed.topt"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in desk.bundle.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(desk.bundle))
    opened = open_bundle(packed)
    began = time.process_time()
    opened.verify()
    assert time.process_time() - began < 20


def test_a_graph_is_not_larger_than_graphs_are(desk, reseal, monkeypatch):
    monkeypatch.setattr("topt_deploy.bundle.sealed.GRAPH_LIMIT_BYTES", 1000)
    with pytest.raises(BadBundle, match="larger than"):
        open_bundle(desk.bundle).verify()


class TestWhose:
    def test_what_the_operator_has_set_comes_first(self, desk, topt_run, monkeypatch, reseal):
        trusted = shutil.move(desk.bundle, desk.folder / "trusted.topt")
        bundle = shutil.copytree(trusted, desk.folder / "model.topt")
        reseal(bundle, lambda r: r["source"].update(city_id="planted"))
        monkeypatch.setenv("TOPT_BUNDLE", str(trusted))
        assert topt_run("predict", desk.regions).code == 0
        assert json.loads(desk.receipt.read_text())["bundle"]["file"] == str(trusted)
        monkeypatch.delenv("TOPT_BUNDLE")
        assert topt_run("predict", desk.regions).code == 0
        assert json.loads(desk.receipt.read_text())["bundle"]["file"] == str(bundle)

    def test_the_receipt_says_whose_signature_was_found(self, desk, topt_run):
        pytest.importorskip("cryptography", reason="needs the sign extra")
        keys = "openssl genpkey -algorithm ed25519 -out k.pem && openssl pkey -in k.pem -pubout -out k.pub"
        if shell(keys, desk.folder).code:
            pytest.skip("openssl is not installed")
        assert topt_run("predict", desk.regions).code == 0
        assert json.loads(desk.receipt.read_text())["bundle"]["signed_by"] is None
        assert topt_run("predict", desk.regions, "--require-signature", desk.folder / "k.pub").code == BAD_BUNDLE
        assert shell("topt-deploy sign model.topt --key k.pem", desk.folder).code == 0
        assert shell("topt-run predict regions.parquet", desk.folder, TOPT_REQUIRE_SIGNATURE="k.pub").code == 0
        found = json.loads(desk.receipt.read_text())["bundle"]["signed_by"]
        assert found == shell("sha256sum k.pub", desk.folder).out.split()[0]

    def test_mlflow_can_require_a_signature(self, desk, monkeypatch):
        from topt_deploy.runtime.mlflow import _load_pyfunc

        assert _load_pyfunc(str(desk.bundle))
        (desk.folder / "k.pub").write_text("no key")
        monkeypatch.setenv("TOPT_REQUIRE_SIGNATURE", str(desk.folder / "k.pub"))
        with pytest.raises(Exception, match=r"ed25519 public key|cryptography"):
            _load_pyfunc(str(desk.bundle))


def test_a_card_shows_names_and_does_nothing_else():
    from topt_deploy.export.model_card import _plain

    shown = _plain("<script>alert(1)</script> [x](http://y) | `z`\n# a heading\x1b[2J")
    assert "<" not in shown
    assert "\n" not in shown
    assert "\x1b" not in shown
    assert "\\[x\\](http" in shown
    assert "\\|" in shown
    assert _plain("St. Louis, Münster & Co") == "St. Louis, Münster &amp; Co"
