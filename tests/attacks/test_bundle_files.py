"""What a bundle's files can be made to do: zips that swell, files that are swapped, links, pickles, odd manifests.

Names that leave the folder, links, pipes, unlisted files, lying sizes and endless manifests are in
tests/bundle/test_manifest.py and tests/runtime/test_bad_bundle.py.
"""

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
from dataclasses import fields

import pytest
from commands import shell

from topt_deploy.bundle import sealed as sealed_module
from topt_deploy.bundle.archive import DIRECTORY_LIMIT_BYTES
from topt_deploy.bundle.encoder_manifest import _check_spec
from topt_deploy.bundle.manifest import open_bundle
from topt_deploy.bundle.sealed import MANIFEST, READ_LIMIT_BYTES, SEAL
from topt_deploy.errors import BadBundle, NoInput
from topt_deploy.prompts.tokens import Chat
from topt_deploy.runtime import load

BAD_BUNDLE = 76
GRAPH, WEIGHTS, CARD = "models/topt.onnx", "models/topt.weights", "MODEL_CARD.md"
LIMIT_BYTES = 4 << 30


def sealed(bundle, text):
    """A manifest of any text, and its seal."""
    data = text if isinstance(text, bytes) else text.encode()
    (bundle / MANIFEST).write_bytes(data)
    (bundle / SEAL).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n")


def listed(bundle, name, size, sha256):
    record = json.loads((bundle / MANIFEST).read_text())
    record["files"][name] = {"size": size, "sha256": sha256}
    sealed(bundle, json.dumps(record))


def zipped(bundle, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(f for f in bundle.rglob("*") if f.is_file()):
            archive.write(file, file.relative_to(bundle))
    return path


def little_memory():
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))


class TestZips:
    def test_a_listed_bomb(self, desk, refused):
        """400 MB of zeros, listed with their true hash: a thousand times the archive's size, hashed all the same."""
        digest = hashlib.sha256(bytes(400 << 20)).hexdigest()
        listed(desk.bundle, "bomb", 400 << 20, digest)
        path = zipped(desk.bundle, desk.folder / "b.zip")
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("bomb", "w") as entry:
            for _ in range(400):
                entry.write(bytes(1 << 20))
        assert path.stat().st_size < 2 << 20
        refused(BAD_BUNDLE, "too large, or too many files", arguments=("--bundle", path))

    def test_overlapping_entries(self, desk, refused):
        """One packed megabyte that a thousand entries of the directory name: a gigabyte from two thousand bytes."""
        kernel = io.BytesIO()
        with zipfile.ZipFile(kernel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("name", bytes(1 << 20))
        raw = kernel.getvalue()
        start = raw.index(b"PK\1\2")
        entry = raw[start : raw.index(b"PK\5\6")]
        many = b"".join(entry[:-4] + b"%04d" % number for number in range(1000))
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1000, 1000, len(many), start, 0)
        path = desk.folder / "b.zip"
        path.write_bytes(raw[:start] + many + end)
        assert sum(info.file_size for info in zipfile.ZipFile(path).infolist()) == 1000 << 20
        refused(BAD_BUNDLE, "too large, or too many files", arguments=("--bundle", path))

    def test_a_zip_in_a_zip(self, desk, refused):
        """Nothing unpacks what it finds inside: it is a file like others, and not a listed one."""
        inner = zipped(desk.bundle, desk.folder / "inner.zip")
        path = zipped(desk.bundle, desk.folder / "b.zip")
        with zipfile.ZipFile(path, "a") as archive:
            archive.write(inner, "inner.zip")
        refused(BAD_BUNDLE, "not listed in the manifest: inner.zip", arguments=("--bundle", path))

    def test_a_directory_of_half_a_million_entries(self, desk, tmp_path):
        """Python's reader makes an object of each before anyone can count them: ten times the file's size."""
        entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
        directory = entry * (2 * DIRECTORY_LIMIT_BYTES // len(entry))
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory), 0, 0)
        path = tmp_path / "b.zip"
        path.write_bytes(directory + end)
        assert len(zipfile.ZipFile(path).infolist()) > 150_000
        with pytest.raises(BadBundle, match="its directory is too large"):
            open_bundle(path)

    @pytest.mark.parametrize("offset", [1 << 40, 1 << 63, (1 << 64) - 1])
    def test_a_directory_that_lies_beyond_the_file(self, offset, desk, refused):
        """Zip64 gives offsets in 64 bits, which no file has."""
        record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 46, offset)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        path = desk.folder / "b.zip"
        path.write_bytes(record + locator + end)
        refused(BAD_BUNDLE, "neither a folder nor a zip", arguments=("--bundle", path))

    def test_a_link_in_a_zip_is_a_file(self, desk, tmp_path):
        """Unix tools unpack such an entry as a link; here its bytes are bytes, and not those of the manifest."""
        bundle = shutil.copytree(desk.bundle, tmp_path / "m.topt")
        target = b"/etc/hostname"
        (bundle / CARD).unlink()
        path = zipped(bundle, tmp_path / "b.zip")
        info = zipfile.ZipInfo(CARD)
        info.external_attr = 0o120777 << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(info, target)
        with pytest.raises(BadBundle, match="of another size than listed"):
            open_bundle(path)

    @pytest.mark.parametrize("kind", ["pipe", "device"])
    def test_no_file_at_all(self, kind, tmp_path):
        """A pipe would be waited for without end."""
        path = tmp_path / "b.zip"
        if kind == "pipe":
            os.mkfifo(path)
        began = time.process_time()
        with pytest.raises(BadBundle, match="neither a folder nor a plain file"):
            open_bundle(path if kind == "pipe" else type(path)("/dev/zero"))
        assert time.process_time() - began < 5


class TestFolders:
    def test_a_sparse_file_of_50_gb(self, desk):
        """No byte on the disk, and 50 GB in memory where weights are read whole."""
        os.truncate(desk.bundle / WEIGHTS, 50 << 30)
        listed(desk.bundle, WEIGHTS, 50 << 30, "0" * 64)
        said = shell("topt-run predict regions.parquet", desk.folder, little_memory, OPENBLAS_NUM_THREADS="1")
        assert said.code == BAD_BUNDLE, said
        assert f"larger than the {READ_LIMIT_BYTES >> 20:,} MB" in said.err

    def test_many_of_them(self, desk, topt_run):
        """Hashing terabytes of nothing would take hours."""
        for number in range(2):
            name = f"golden/{number}"
            (desk.bundle / name).touch()
            os.truncate(desk.bundle / name, 40 << 30)
            listed(desk.bundle, name, 40 << 30, "0" * 64)
        said = topt_run("info", desk.bundle)
        assert said.code == BAD_BUNDLE
        assert "too large, or too many files" in said.err

    def test_a_hard_link_is_the_file_that_it_is(self, desk, tmp_path):
        """It cannot be told from a file, and need not be: bytes that were changed under its other name are refused."""
        os.rename(desk.bundle / CARD, tmp_path / "elsewhere")
        os.link(tmp_path / "elsewhere", desk.bundle / CARD)
        bundle = open_bundle(desk.bundle)
        bundle.verify()
        with (tmp_path / "elsewhere").open("r+b") as file:
            file.write(b"X")
        with pytest.raises(BadBundle, match=CARD):
            bundle.verify()


class TestSwaps:
    """A file is another one after it was checked: what was hashed is what is used."""

    def other_weights(self, desk):
        data = bytearray((desk.bundle / WEIGHTS).read_bytes())
        data[:4096] = bytes(4096)
        return bytes(data)

    @pytest.mark.parametrize("name", [GRAPH, WEIGHTS, "golden/golden-7.regions.parquet"])
    def test_after_opening_and_verifying(self, name, desk):
        bundle = open_bundle(desk.bundle)
        bundle.verify()
        data = bytearray((desk.bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (desk.bundle / name).write_bytes(data)
        with pytest.raises(BadBundle, match="not the file that the manifest describes"):
            bundle.read(name)

    def test_a_pipe_in_a_files_place(self, desk):
        """Opening one waits for whoever writes to it, which nobody does."""
        bundle = open_bundle(desk.bundle)
        (desk.bundle / CARD).unlink()
        os.mkfifo(desk.bundle / CARD)
        with pytest.raises(BadBundle, match="neither a folder nor a plain file"):
            bundle.read(CARD)

    def test_while_a_file_is_read(self, desk, monkeypatch):
        """The bytes that were hashed are those that are returned: there is one reading, not two."""
        bundle = open_bundle(desk.bundle)
        good, hashing = (desk.bundle / WEIGHTS).read_bytes(), sealed_module.sha256_bytes

        def swapped_meanwhile(data):
            (desk.bundle / WEIGHTS).write_bytes(self.other_weights(desk))
            return hashing(data)

        monkeypatch.setattr(sealed_module, "sha256_bytes", swapped_meanwhile)
        assert bundle.read(WEIGHTS) == good
        with pytest.raises(BadBundle):
            bundle.read(WEIGHTS)

    def test_while_predictions_are_made(self, desk):
        """A loaded bundle has no more need of its files."""
        predictor = load(desk.bundle)
        before = predictor.predict(desk.regions, desk.mobility)
        (desk.bundle / WEIGHTS).write_bytes(self.other_weights(desk))
        (desk.bundle / GRAPH).unlink()
        assert predictor.predict(desk.regions, desk.mobility).equals(before)

    def test_a_whole_other_bundle_with_a_seal_of_its_own(self, desk, reseal):
        """Between opening and reading, the folder becomes another sound bundle: its files are not the first one's."""
        bundle = open_bundle(desk.bundle)
        (desk.bundle / WEIGHTS).write_bytes(self.other_weights(desk))
        reseal(desk.bundle, lambda record: None)
        open_bundle(desk.bundle).verify()
        with pytest.raises(BadBundle):
            bundle.read(WEIGHTS)


class TestManifests:
    def test_a_key_that_occurs_twice(self, desk, refused):
        """Whoever looks at the first sees another value than whoever reads the last."""
        text = (desk.bundle / MANIFEST).read_text()
        sealed(desk.bundle, text.replace('"opset"', '"mobility": true,\n "opset"', 1))
        refused(BAD_BUNDLE, "a key occurs twice")

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "1" * 5000, "9" * 20])
    def test_a_number_that_is_none(self, number, desk, refused):
        """A tolerance of infinity would pass every self-test; a size of 400 digits overflows what it meets."""
        text = (desk.bundle / MANIFEST).read_text()
        record = json.loads(text)
        record["variants"]["fp32"]["tolerance"] = "here"
        sealed(desk.bundle, json.dumps(record).replace('"here"', number))
        refused(BAD_BUNDLE, "number" if len(number) < 4000 else "manifest cannot be read")

    @pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":['])
    def test_nesting(self, opening, desk, refused):
        sealed(desk.bundle, opening * 100_000)
        refused(BAD_BUNDLE, "model.topt")

    def test_16_mb_of_the_smallest_things(self, desk):
        """Empty objects have thirty times their size in memory: half a gigabyte, and not more."""
        sealed(desk.bundle, "[" + "{}," * ((16 << 20) // 3 - 1) + "{}]")
        said = shell("topt-run info model.topt", desk.folder, little_memory, OPENBLAS_NUM_THREADS="1")
        assert said.code == BAD_BUNDLE, said

    @pytest.mark.parametrize(
        "place",
        [[1 << 62, [1]], [0, [1 << 62, 1 << 62]], [0, [1 << 40]], [4, [0, 1 << 62]]],
        ids=["offset", "overflow", "size", "empty"],
    )
    def test_dimensions_beyond_the_weights(self, place, desk, refused):
        record = json.loads((desk.bundle / MANIFEST).read_text())
        places = record["variants"]["fp32"]["initializers"]
        places[next(iter(places))] = place
        sealed(desk.bundle, json.dumps(record))
        refused(BAD_BUNDLE, "model.topt")


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


class TestPickles:
    @pytest.mark.parametrize("name", ["model.pkl", "weights.pt", "models/extra.pkl", "golden/x.npy"])
    @pytest.mark.parametrize("is_listed", [False, True])
    def test_in_a_bundle(self, name, is_listed, desk, topt_run, tmp_path):
        """An unlisted one is refused, a listed one is bytes like any other: nothing opens it."""
        data = pickle.dumps(Canary(tmp_path / "ran"))
        (desk.bundle / name).write_bytes(data)
        if is_listed:
            listed(desk.bundle, name, len(data), hashlib.sha256(data).hexdigest())
        for command in (["info", desk.bundle], ["selftest", desk.bundle], ["predict", desk.regions]):
            assert topt_run(*command).code == (0 if is_listed else BAD_BUNDLE)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", [GRAPH, WEIGHTS, "golden/golden-7.regions.parquet", MANIFEST])
    def test_in_a_files_place(self, name, desk, topt_run, tmp_path, reseal):
        data = pickle.dumps(Canary(tmp_path / "ran"))
        if name == MANIFEST:
            sealed(desk.bundle, data)
        else:
            (desk.bundle / name).write_bytes(data)
            reseal(desk.bundle, lambda record: None)
        assert topt_run("selftest", desk.bundle).code in (BAD_BUNDLE, 65)
        assert not (tmp_path / "ran").exists()

    def test_in_a_table(self, desk, topt_run, tmp_path):
        """pyarrow before 14.0.1 unpickled a column's type from its field's metadata (CVE-2023-47248)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(desk.regions)
        index = table.column_names.index("lon")
        metadata = {
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Canary(tmp_path / "ran"), 0),
        }
        field = pa.field("lon", table.schema.field("lon").type, metadata=metadata)
        pq.write_table(table.set_column(index, field, table.column("lon")), desk.regions)
        assert topt_run("predict", desk.regions).code in (0, 65)
        assert not (tmp_path / "ran").exists()

    def test_in_a_run(self, demo_city, tmp_path, topt_deploy):
        """A run's weights are safetensors: a pickle under their name is a damaged run."""
        shutil.copytree(demo_city, tmp_path / "city", ignore=shutil.ignore_patterns("model.topt"))
        (run,) = (tmp_path / "city/runs").iterdir()
        for file in run.glob("*.safetensors"):
            file.write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
        said = topt_deploy("export", run, "--out", tmp_path / "out.topt")
        assert said.code in (65, 66, 76, 78), said
        assert "Traceback" not in said.err
        assert not (tmp_path / "ran").exists()

    def test_no_code_of_ours_unpickles(self):
        """Nor evaluates text: a look at every call in the tree."""
        import ast
        from pathlib import Path

        root = Path(__file__).parents[2]
        bad = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
        for folder in ("topt_deploy", "train", "export", "runtime", "dev", "scripts"):
            for file in sorted((root / folder).rglob("*.py")):
                for found in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                    where = f"{file.relative_to(root)}:{getattr(found, 'lineno', 0)}"
                    if isinstance(found, ast.Import | ast.ImportFrom):
                        names = [a.name for a in found.names] + [getattr(found, "module", None) or ""]
                        assert not {name.split(".")[0] for name in names} & bad, where
                    if not isinstance(found, ast.Call):
                        continue
                    called = ast.unparse(found.func)
                    assert called not in ("eval", "exec", "torch.load", "yaml.load", "pd.read_pickle"), where
                    keys = {k.arg: ast.unparse(k.value) for k in found.keywords}
                    assert keys.get("allow_pickle", "False") == "False", where
                    assert keys.get("trust_remote_code", "False") == "False", where


def test_nothing_there_is_no_bundle(tmp_path):
    with pytest.raises(NoInput):
        open_bundle(tmp_path / "none")


SETTINGS = {
    "image_token": 151655, "patch": 14, "frames": 2, "merge": 2, "window": 112, "min_pixels": 3136,
    "max_pixels": 12845056, "resample": 3, "scale": 0.0039, "mean": [0.5, 0.5, 0.5], "std": [0.3, 0.3, 0.3],
}  # fmt: skip
CHAT = dict.fromkeys((field.name for field in fields(Chat)), "<|x|>")
SPEC = {
    "family": "qwen2_5_vl",
    "name": "n",
    "weights_sha256": "0" * 64,
    "width": 3584,
    "settings": SETTINGS,
    "chat": CHAT,
}


def test_an_honest_encoders_sizes_are_let_through():
    _check_spec(SPEC)
    _check_spec(SPEC | {"settings": {"tile": 560, "tiles": 4, "patches": 1601}})
    _check_spec(SPEC | {"settings": {"resolutions": [[384, 384], [1152, 1152]], "side": 14}})


@pytest.mark.parametrize(
    "change",
    [
        {"width": 10**9},
        {"settings": SETTINGS | {"max_pixels": 10**9}},
        {"settings": SETTINGS | {"frames": 10**6}},
        {"settings": SETTINGS | {"patch": 10**6}},
        {"settings": SETTINGS | {"window": 10**18}},
        {"settings": {"tile": 10**5, "tiles": 4}},
        {"settings": {"tile": 560, "tiles": 10**6}},
        {"settings": {"resolutions": [[384, 384], [10**6, 10**6]], "side": 14}},
    ],
)
def test_absurd_sizes_of_an_encoder(change):
    """Each would have an image of a few bytes made into gigabytes, by a manifest that is sealed and well formed."""
    with pytest.raises(TypeError, match="spec is not of the right form"):
        _check_spec(SPEC | change)
