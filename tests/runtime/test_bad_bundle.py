"""Bundles that were damaged, tampered with or made up: refused before their model is opened."""

import json
import os
import shutil
import zipfile
from hashlib import sha256

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import replaced
from commands import shell
from onnx.external_data_helper import set_external_data

from topt_deploy.bundle.manifest import open_bundle
from topt_deploy.bundle.sealed import MANIFEST, SEAL, seal_bundle
from topt_deploy.runtime.processor import deciding_sets

BAD_BUNDLE = 76
FILES = [
    "models/topt.onnx",
    "models/topt.weights",
    "golden/golden-7.regions.parquet",
    "golden/golden-7.mobility.parquet",
    "golden/golden-31.expected.parquet",
    "MODEL_CARD.md",
    "manifest.json",
    "manifest.json.sha256",
]


def sealed(bundle, change):
    """Change the manifest's record and seal it again, as someone who means harm can do."""
    record = json.loads((bundle / MANIFEST).read_text())
    record = change(record) or record
    text = json.dumps(record)
    (bundle / MANIFEST).write_text(text)
    (bundle / SEAL).write_text(f"{sha256(text.encode()).hexdigest()}  {MANIFEST}\n")


def listed_again(bundle):
    """Describe and seal whatever the folder now holds."""
    manifest = open_bundle(bundle).manifest
    for name in (MANIFEST, SEAL):
        (bundle / name).unlink()
    return lambda: seal_bundle(bundle, manifest)


def zipped(bundle, path, compression=zipfile.ZIP_DEFLATED, extra=()):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(f for f in bundle.rglob("*") if f.is_file()):
            archive.write(file, file.relative_to(bundle))
        for name, data in extra:
            archive.writestr(name, data)
    return path


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_the_list_of_files_is_complete(desk):
    there = {path.relative_to(desk.bundle).as_posix() for path in desk.bundle.rglob("*") if path.is_file()}
    assert set(FILES) < there
    assert {name.split("/")[0] for name in there} == {"models", "golden", "MODEL_CARD.md", MANIFEST, SEAL}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_is_refused(name, where, desk, refused):
    path = desk.bundle / name
    size = path.stat().st_size
    flip(path, {"first": 0, "middle": size // 2, "last": size - 1}[where])
    sealing = name in (MANIFEST, SEAL)
    refused(BAD_BUNDLE, "model.topt", "sealed" if sealing else f"{name} is not the file", "do not edit")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(name, desk, refused):
    (desk.bundle / name).unlink()
    refused(BAD_BUNDLE, name, "missing")


@pytest.mark.parametrize("name", ["extra.txt", "models/extra.onnx", "golden/deeper/x.parquet", "models/.hidden", "a b"])
def test_an_unlisted_file_is_refused(name, desk, refused):
    path = desk.bundle / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"anything")
    refused(BAD_BUNDLE, name)


@pytest.mark.parametrize("name", ["models/topt.weights", "MODEL_CARD.md", "manifest.json"])
def test_a_link_is_refused_even_to_the_very_file(name, desk, refused):
    path = desk.bundle / name
    path.rename(desk.folder / "moved")
    path.symlink_to(desk.folder / "moved")
    refused(BAD_BUNDLE, f"{name} is a link")


def test_a_linked_folder_is_refused(desk, refused):
    (desk.bundle / "models").rename(desk.folder / "moved")
    (desk.bundle / "models").symlink_to(desk.folder / "moved")
    refused(BAD_BUNDLE, "models is a link")


def test_a_pipe_is_refused_and_not_waited_for(desk, refused):
    (desk.bundle / "MODEL_CARD.md").unlink()
    os.mkfifo(desk.bundle / "MODEL_CARD.md")
    refused(BAD_BUNDLE, "MODEL_CARD.md is a link or a special file")


def test_a_truncated_and_a_grown_file_are_refused(desk, refused):
    weights = desk.bundle / "models/topt.weights"
    data = weights.read_bytes()
    for changed in (data[:-64], data + b"\0" * 64):
        weights.write_bytes(changed)
        refused(BAD_BUNDLE, "of another size", "models/topt.weights")


@pytest.mark.parametrize("target", ["file", "folder", "text"])
def test_what_is_no_bundle_is_refused(target, desk, refused):
    shutil.rmtree(desk.bundle)
    if target == "folder":
        desk.bundle.mkdir()
    else:
        desk.bundle.write_bytes(desk.regions.read_bytes() if target == "file" else b"hello")
    refused(BAD_BUNDLE, "model.topt", "missing" if target == "folder" else "neither a folder nor a zip file")


class TestZip:
    def test_a_flipped_bit_anywhere_is_refused_or_of_no_consequence(self, desk, topt_run):
        """Names, times and attributes of a zip may be damaged without a byte of content being another one."""
        assert topt_run("predict", desk.regions).code == 0
        good = desk.out.read_bytes()
        path = zipped(desk.bundle, desk.folder / "bundle.zip")
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        codes = []
        for position in rng.integers(len(whole), size=40):
            path.write_bytes(whole)
            flip(path, position)
            desk.out.unlink(missing_ok=True)
            said = topt_run("predict", desk.regions, "--bundle", path)
            codes.append(said.code)
            assert said.code in (0, BAD_BUNDLE), said.err
            assert desk.out.exists() == (said.code == 0)
            assert said.code != 0 or desk.out.read_bytes() == good
        assert codes.count(BAD_BUNDLE) > len(codes) // 2

    def test_a_cut_is_refused(self, desk, refused):
        path = zipped(desk.bundle, desk.folder / "bundle.zip")
        path.write_bytes(path.read_bytes()[:-1000])
        refused(BAD_BUNDLE, "bundle.zip", "neither a folder nor a zip", arguments=("--bundle", path))

    @pytest.mark.parametrize("name", ["../outside.txt", "/etc/outside", "models\\..\\x", "models/../../x"])
    def test_a_name_that_leaves_the_bundle_is_refused(self, name, desk, refused):
        path = zipped(desk.bundle, desk.folder / "bundle.zip", extra=[(name, b"anything")])
        refused(BAD_BUNDLE, "which no bundle has", arguments=("--bundle", path))

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_two_files_of_one_name_are_refused(self, desk, refused):
        path = zipped(desk.bundle, desk.folder / "bundle.zip", extra=[("models/topt.onnx", b"another")])
        refused(BAD_BUNDLE, "two files have the name", arguments=("--bundle", path))

    def test_a_file_that_unpacks_to_more_than_it_says_is_refused(self, desk, refused):
        path = zipped(desk.bundle, desk.folder / "bundle.zip", extra=[("bomb", b"\0" * (64 << 20))])
        refused(BAD_BUNDLE, "bomb", arguments=("--bundle", path))


class TestSealedWithIntent:
    """The seal is no signature: whoever writes a bundle can seal it. Nothing outside may be reached even so."""

    @pytest.mark.parametrize("name", ["../regions.parquet", "/etc/hostname", "models/../../regions.parquet"])
    def test_a_listed_path_that_leaves_the_folder(self, name, desk, refused):
        facts = {"size": 1, "sha256": "0" * 64}
        sealed(desk.bundle, lambda record: record["files"].update({name: facts}))
        refused(BAD_BUNDLE, name)

    @pytest.mark.parametrize("role", ["graph", "weights"])
    def test_a_variant_that_names_a_file_outside(self, role, desk, refused):
        sealed(desk.bundle, lambda record: record["variants"]["fp32"].update({role: "../regions.parquet"}))
        refused(BAD_BUNDLE, "model.topt")

    @pytest.mark.parametrize("location", ["../regions.parquet", "/etc/hostname"])
    def test_external_data_that_leaves_the_folder(self, location, desk, refused):
        seal = listed_again(desk.bundle)
        path = desk.bundle / "models/topt.onnx"
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.external_data:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                tensor.raw_data = b""
                set_external_data(tensor, location, int(entries["offset"]), int(entries["length"]))
                tensor.ClearField("raw_data")
                break
        path.write_bytes(model.SerializeToString())
        seal()
        refused(BAD_BUNDLE)

    @pytest.mark.parametrize("role", ["graph", "weights"])
    @pytest.mark.parametrize("content", [b"", b"not a model at all"])
    def test_a_model_that_is_none(self, role, content, desk, refused):
        seal = listed_again(desk.bundle)
        (desk.bundle / {"graph": "models/topt.onnx", "weights": "models/topt.weights"}[role]).write_bytes(content)
        seal()
        refused(BAD_BUNDLE)

    @pytest.mark.parametrize("change", [lambda facts: facts.update(scale="log1p"), lambda facts: facts.pop("scale")])
    def test_intervals_on_another_scale(self, change, desk, refused):
        sealed(desk.bundle, lambda record: change(record["tasks"]["check_in"]) and None)
        refused(BAD_BUNDLE, "column 'check_in': intervals are on another scale", "expected: cbrt")

    def test_another_schema_version(self, desk, refused):
        sealed(desk.bundle, lambda record: record.update(schema_version=99))
        refused(BAD_BUNDLE, "another schema version", "expected: 1", "found:    99")

    @pytest.mark.parametrize("text", ["", "[]", "null", '{"schema_version": 1}', "{" * 100_000, "\ud800"])
    def test_a_manifest_that_is_none(self, text, desk, refused):
        data = text.encode(errors="surrogatepass")
        (desk.bundle / MANIFEST).write_bytes(data)
        (desk.bundle / SEAL).write_text(f"{sha256(data).hexdigest()}  {MANIFEST}\n")
        refused(BAD_BUNDLE, "model.topt")

    @pytest.mark.parametrize(
        "change",
        [
            lambda r: r.pop("variants"),
            lambda r: r.update(variants={}),
            lambda r: r.update(variants={"int8": r["variants"]["fp32"]}),
            lambda r: r["variants"]["fp32"].pop("graph"),
            lambda r: r["variants"]["fp32"].update(initializers={"nothing": [0, [1]]}),
            lambda r: r["variants"]["fp32"].update(
                initializers={
                    name: [1 << 40, shape] for name, (_, shape) in r["variants"]["fp32"]["initializers"].items()
                }
            ),
            lambda r: r.update(tasks={"another": next(iter(r["tasks"].values()))}),
            lambda r: r.update(inputs=[*r["inputs"], "another"]),
            lambda r: r["inputs"].remove("trips"),
            lambda r: r.update(files=[1, 2]),
            lambda r: r.update(files=dict.fromkeys(r["files"], "text")),
            lambda r: r.update(golden=None),
            lambda r: r.update(views=["poi"]),
            lambda r: r["ranges"].pop("poi_food"),
            lambda r: r.update(unknown=1),
        ],
        ids=[
            "no variants",
            "empty variants",
            "another precision only",
            "variant without graph",
            "an initialiser that the graph lacks",
            "initialisers beyond the weights",
            "other tasks than the graph's",
            "an input too many",
            "an input too few",
            "files as a list",
            "files without facts",
            "golden null",
            "views as a list",
            "a range too few",
            "an unknown key",
        ],
    )
    def test_a_manifest_that_does_not_add_up(self, change, desk, refused):
        def apply(record):
            change(record)

        sealed(desk.bundle, apply)
        refused(BAD_BUNDLE, "model.topt")


class TestSelfTest:
    def test_passes_and_says_what_it_measured(self, desk, topt_run):
        said = topt_run("selftest", desk.bundle, "--log-format", "json")
        assert said.code == 0
        facts = json.loads(said.out)
        assert [check["regions"] for check in facts["checks"]] == [7, 31, 725]
        assert all(0 <= check["worst"] < 1e-4 for check in facts["checks"])
        assert "self-test passed on CPUExecutionProvider" in topt_run("selftest", desk.bundle).out

    @pytest.mark.parametrize("wrong", [1.001, float("nan")])
    @pytest.mark.parametrize("city", ["golden-7", "golden-31", "enlarged-725"])
    def test_fails_where_one_value_is_another(self, wrong, city, desk, topt_run):
        seal = listed_again(desk.bundle)
        path = desk.bundle / f"golden/{city}.expected.parquet"
        table = pq.read_table(path)
        values = table.column("check_in").to_numpy().copy()
        values[np.argmax(values)] *= wrong
        pq.write_table(replaced(table, check_in=pa.array(values, table.schema.field("check_in").type)), path)
        seal()
        said = topt_run("selftest", desk.bundle)
        assert said.code == BAD_BUNDLE, said.out
        assert f"self-test failed on {city}" in said.err
        assert "relative difference ≤ 0.0001" in said.err

    def test_fails_where_a_weight_is_another(self, desk, topt_run):
        seal = listed_again(desk.bundle)
        weights = desk.bundle / "models/topt.weights"
        values = np.frombuffer(weights.read_bytes(), dtype=np.float32) * np.float32(1.01)
        weights.write_bytes(values.tobytes())
        seal()
        assert topt_run("predict", desk.regions).code == 0, "the seal alone cannot know"
        assert topt_run("selftest", desk.bundle).code == BAD_BUNDLE

    @pytest.mark.parametrize(
        "facts",
        [{"of": "golden-9"}, {"regions": 10**9}, {"regions": 0}, {"rows": [725]}, {"rows": []}, {"rows": "all"}],
        ids=str,
    )
    def test_an_enlarged_city_of_another_form(self, facts, desk, topt_run, reseal):
        reseal(desk.bundle, lambda record: record["enlarged"]["enlarged-725"].update(facts))
        assert topt_run("selftest", desk.bundle).code == BAD_BUNDLE

    def test_an_older_bundle_has_no_enlarged_city(self, desk, topt_run, reseal):
        reseal(desk.bundle, lambda record: record.pop("enlarged"))
        said = topt_run("selftest", desk.bundle)
        assert said.code == 0, said.err
        assert "golden-31" in said.out
        assert "enlarged" not in said.out


def test_a_bundle_that_does_not_name_the_processor_of_its_gate(desk, topt_run, reseal):
    reseal(desk.bundle, lambda record: record.pop("gated_on"))
    said = topt_run("info", desk.bundle)
    assert said.code == 0, "an older bundle still opens"
    assert "gated on" not in said.out
    reseal(desk.bundle, lambda record: record.update(gated_on="avx2"))
    assert topt_run("info", desk.bundle).code == BAD_BUNDLE


def test_info_checks_every_hash(desk, topt_run):
    said = topt_run("info", desk.bundle)
    assert said.code == 0
    for part in ("synthetic-demo, 77 regions", "SYNTHETIC", "poi (12)", "land_use (6)", "flows", "held out: MAE"):
        assert part in said.out
    assert f"gated on   a processor with {', '.join(deciding_sets())}" in said.out
    told = json.loads(topt_run("info", desk.bundle, "--log-format", "json").out)
    assert told["source"]["regions"] == 77
    assert told["gated_on"] == list(deciding_sets())
    flip(desk.bundle / "models/topt.weights", 1000)
    said = topt_run("info", desk.bundle)
    assert said.code == BAD_BUNDLE
    assert "models/topt.weights is not the file" in said.err


def test_the_whole_command_ends_the_same_way(desk):
    flip(desk.bundle / "models/topt.weights", 1000)
    before = desk.state()
    said = shell("topt-run predict regions.parquet", desk.folder)
    assert said.code == BAD_BUNDLE
    assert "models/topt.weights is not the file that the manifest describes" in said.err
    assert said.out == ""
    assert desk.state() == before
