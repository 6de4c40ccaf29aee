import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import struct
import zipfile

import pytest

from topt_deploy.bundle import archive as archive_module
from topt_deploy.bundle.manifest import CARD, Manifest, open_bundle
from topt_deploy.bundle.sealed import MANIFEST, SEAL, seal_bundle
from topt_deploy.data.city import Schema
from topt_deploy.errors import BadBundle, Exit, NoInput

GRAPH = b"\x08\x08\x3a\x08\x0a\x06\x22\x04Relu" + b"\x32\x80\x02" + bytes(range(256))
"""A model of one node, and a long documentation."""
FILES = {
    CARD: b"# A model\n",
    "models/fp32.onnx": GRAPH,
    "golden/a/regions.parquet": b"PAR1 and so on PAR1",
    "golden/a/expected.json": b'{"crime": [1.0]}',
}
FACTS = {
    "schema_version": 1,
    "version": "0.1.0",
    "source": {"run": "r", "regions": 77},
    "tasks": {"crime": {"prompt": "prompt_crime", "scores": [0.5, 1.0]}},
    "views": {"poi": ["b", "a"], "land_use": ["x"]},
    "mobility": True,
    "prompts": {"prompt_crime": {"width": 16, "encoder": "hashing"}},
    "ranges": {name: [0.0, 9.0] for name in ("poi_b", "poi_a", "land_use_x", "outflow", "inflow")},
    "inputs": ["poi", "land_use", "mobility", "position", "prompt_crime"],
    "opset": 18,
    "variants": {
        "fp32": {
            "graph": "models/fp32.onnx",
            "weights": "models/fp32.onnx",
            "initializers": {"w": [0, [2, 3]]},
            "tolerance": 1e-4,
        }
    },
    "golden": ["a"],
}


def manifest():
    """A manifest with all its fields, those that are not known here empty."""
    fields = {}
    for field in dataclasses.fields(Manifest):
        if field.name in FACTS:
            fields[field.name] = FACTS[field.name]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            fields[field.name] = {}
    return Manifest(**fields)


def write(folder):
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    seal_bundle(folder, manifest())
    return folder


def pack(folder, path, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "m.topt"
    path.mkdir()
    return write(path)


@pytest.fixture(params=["folder", "zip"])
def packed(request, tmp_path):
    """Gives a function that changes the files of a sound bundle and packs it, as a folder or as a zip."""

    def build(change=lambda folder: None):
        path = tmp_path / "m.topt"
        path.mkdir()
        change(write(path))
        if request.param == "folder":
            return path
        pack(path, tmp_path / "m.zip")
        shutil.rmtree(path)
        return tmp_path / "m.zip"

    return build


def reseal(folder, change):
    """An attack by someone who can compute the seal: it is a checksum, no signature."""
    record = json.loads((folder / MANIFEST).read_text())
    change(record)
    seal_text(folder, json.dumps(record))


def seal_text(folder, text):
    (folder / MANIFEST).write_text(text)
    (folder / SEAL).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n")


def refuse(path, *parts):
    with pytest.raises(BadBundle) as caught:
        open_bundle(path).verify()
    assert caught.value.exit_code == Exit.BAD_BUNDLE == 76
    assert str(caught.value).startswith(str(path))
    assert "to do:" in str(caught.value)
    for part in parts:  # beyond the path, which has the test's own name in it
        assert part in str(caught.value).removeprefix(str(path))


class TestSound:
    def test_opens_verifies_and_reads(self, packed):
        bundle = open_bundle(packed())
        bundle.verify()
        assert {name: bundle.read(name) for name in bundle.manifest.files} == FILES
        assert {name: bundle.weights(name) for name in bundle.manifest.files} == FILES
        assert bundle.manifest.opset == 18
        assert bundle.manifest.inputs == tuple(FACTS["inputs"])
        assert bundle.manifest.golden == ("a",)

    def test_folder_and_zip_are_the_same_bundle(self, folder, tmp_path):
        zipped = open_bundle(pack(folder, tmp_path / "m.zip"))
        assert zipped.sha256 == open_bundle(folder).sha256
        assert zipped.sha256 == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        assert vars(zipped.manifest) == vars(open_bundle(folder).manifest)

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_zips_with_and_without_compression(self, folder, tmp_path, compression):
        open_bundle(pack(folder, tmp_path / "m.zip", compression)).verify()

    def test_a_zip_with_entries_for_folders(self, folder, tmp_path):
        shutil.make_archive(str(tmp_path / "m"), "zip", folder)
        with zipfile.ZipFile(tmp_path / "m.zip") as archive:
            assert any(name.endswith("/") for name in archive.namelist())
        open_bundle(tmp_path / "m.zip").verify()

    def test_schema_is_what_the_model_reads(self, folder):
        expected = Schema(views={"poi": ("b", "a"), "land_use": ("x",)}, mobility=True, prompts={"prompt_crime": 16})
        assert vars(open_bundle(folder).manifest.schema) == vars(expected)

    def test_the_manifest_lists_every_other_file(self, folder):
        files = json.loads((folder / MANIFEST).read_text())["files"]
        assert files == {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()
        }

    def test_the_seal_is_that_of_sha256sum(self, folder):
        digest, name = (folder / SEAL).read_text().split("  ")
        assert digest == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        assert name == "manifest.json\n"

    def test_sealing_twice_gives_the_same_bytes(self, folder):
        before = (folder / MANIFEST).read_bytes()
        (folder / MANIFEST).unlink()
        (folder / SEAL).unlink()
        seal_bundle(folder, manifest())
        assert (folder / MANIFEST).read_bytes() == before

    def test_verify_may_skip_what_is_read_anyway(self, folder):
        (folder / "models/fp32.onnx").write_bytes(b"x" * len(FILES["models/fp32.onnx"]))
        bundle = open_bundle(folder)
        bundle.verify(skip=frozenset({"models/fp32.onnx"}))
        with pytest.raises(BadBundle):
            bundle.read("models/fp32.onnx")
        with pytest.raises(BadBundle):
            bundle.weights("models/fp32.onnx")


class TestDamage:
    @pytest.mark.parametrize("name", [MANIFEST, SEAL, *FILES])
    @pytest.mark.parametrize("position", [0, 5, -1])
    @pytest.mark.parametrize("bit", [1, 0x80])
    def test_one_flipped_bit_anywhere(self, packed, name, position, bit):
        def flip(folder):
            data = bytearray((folder / name).read_bytes())
            data[position] ^= bit
            (folder / name).write_bytes(data)

        refuse(packed(flip), name.split("/")[-1] if name in FILES else "manifest")

    @pytest.mark.parametrize("name", FILES)
    def test_a_missing_file(self, packed, name):
        refuse(packed(lambda folder: (folder / name).unlink()), "missing", name)

    @pytest.mark.parametrize("name", [MANIFEST, SEAL])
    def test_a_missing_manifest_or_seal(self, packed, name):
        refuse(packed(lambda folder: (folder / name).unlink()), f"{name} is missing", "not a whole bundle")

    @pytest.mark.parametrize("name", ["extra.txt", "models/weights.bin", "models/deep/down.data"])
    def test_a_file_that_is_not_listed(self, packed, name):
        def add(folder):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"external data")

        refuse(packed(add), "not listed in the manifest", name)

    @pytest.mark.parametrize("change", [b"", b"longer "])
    def test_a_file_of_another_size(self, packed, change):
        def resize(folder):
            (folder / CARD).write_bytes(change * 20)

        refuse(packed(resize), "of another size than listed", CARD)

    def test_a_seal_of_another_manifest(self, packed):
        refuse(
            packed(lambda f: (f / SEAL).write_text(f"{'0' * 64}  {MANIFEST}\n")),
            "not the one that was sealed",
        )

    @pytest.mark.parametrize(
        "trend",
        [
            None,
            [0.0, 1.0, 0.1],
            {"mean": 5.0, "deviation": 2.0},
            {"mean": 5.0, "deviation": 2.0, "slope": 0.1, "more": 1.0},
            {"mean": 5.0, "deviation": 0.0, "slope": 0.1},
            {"mean": 5.0, "deviation": -2.0, "slope": 0.1},
            {"mean": "5", "deviation": 2.0, "slope": 0.1},
            {"mean": True, "deviation": 2.0, "slope": 0.1},
        ],
    )
    def test_a_trend_of_errors_that_is_none(self, folder, trend):
        def change(record, trend):
            record["tasks"]["crime"] |= {"fold_scores": [[0.5], [1.0]], "size_trend": trend}
            record["leverage"] = {"threshold": 1.0}

        reseal(folder, lambda record: change(record, {"mean": 5.0, "deviation": 2.0, "slope": 0.1}))
        open_bundle(folder)
        reseal(folder, lambda record: change(record, trend))
        refuse(folder, "size_trend")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(NoInput, match="no such bundle") as caught:
            open_bundle(tmp_path / "none.topt")
        assert caught.value.exit_code == Exit.NO_INPUT

    def test_a_file_changed_after_opening(self, folder):
        bundle = open_bundle(folder)
        (folder / CARD).write_bytes(b"changed")
        with pytest.raises(BadBundle, match=CARD):
            bundle.read(CARD)

    def test_a_file_that_grew_after_opening(self, folder):
        bundle = open_bundle(folder)
        with (folder / CARD).open("ab") as file:
            file.write(b"more")
        with pytest.raises(BadBundle, match=CARD):
            bundle.read(CARD)


class TestNotPlainFiles:
    def test_a_link_to_a_file_outside(self, folder, tmp_path):
        (tmp_path / "outside").write_bytes(FILES[CARD])
        (folder / CARD).unlink()
        (folder / CARD).symlink_to(tmp_path / "outside")
        refuse(folder, CARD, "link")

    def test_a_link_to_a_file_inside(self, folder):
        (folder / "copy").symlink_to(CARD)
        refuse(folder, "copy", "link")

    def test_a_link_to_a_folder(self, folder, tmp_path):
        shutil.move(folder / "golden", tmp_path / "golden")
        (folder / "golden").symlink_to(tmp_path / "golden", target_is_directory=True)
        refuse(folder, "golden", "link")

    def test_a_broken_link(self, folder):
        (folder / "broken").symlink_to("nowhere")
        refuse(folder, "broken", "link")

    def test_a_pipe(self, folder):
        os.mkfifo(folder / "pipe")
        refuse(folder, "pipe", "special file")

    def test_a_file_that_became_a_link_after_opening(self, folder, tmp_path):
        bundle = open_bundle(folder)
        shutil.copy(folder / CARD, tmp_path / "copy")
        (folder / CARD).unlink()
        (folder / CARD).symlink_to(tmp_path / "copy")
        with pytest.raises(Exception, match="link") as caught:
            bundle.read(CARD)
        assert caught.value.exit_code in (Exit.BAD_BUNDLE, Exit.IO_ERROR)


HOSTILE_NAMES = [
    "../outside",
    "models/../../outside",
    "/etc/passwd",
    "C:\\windows",
    "models\\fp32.onnx",
    ".hidden",
    "models/.hidden",
    "./a",
    "a//b",
    "a b",
    "a\nb",
    "ä",
    "..",
    "-rf",
    "a/",
    "~root",
    "a:b",
]


class TestZip:
    def add(self, folder, tmp_path, name, data=b"x"):
        """A zip with one more entry, which its manifest lists."""
        reseal(
            folder,
            lambda r: r["files"].update({name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}),
        )
        pack(folder, tmp_path / "m.zip")
        with zipfile.ZipFile(tmp_path / "m.zip", "a") as archive:
            archive.writestr(zipfile.ZipInfo(name), data)
        return tmp_path / "m.zip"

    def test_the_helper_makes_sound_ones(self, folder, tmp_path):
        open_bundle(self.add(folder, tmp_path, "models/other.bin")).verify()

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_a_name_that_no_bundle_has(self, folder, tmp_path, name):
        refuse(self.add(folder, tmp_path, name))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.topt", "m.zip"]

    @pytest.mark.parametrize("name", [n for n in HOSTILE_NAMES if n not in (".hidden", "models/.hidden")])
    def test_a_name_listed_in_a_folders_manifest(self, folder, tmp_path, name):
        (tmp_path / "outside").write_bytes(b"x")
        reseal(
            folder,
            lambda r: r["files"].update({name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}),
        )
        refuse(folder, "missing")

    @pytest.mark.parametrize("name", ["a b", ".hidden", "ä", "-rf"])
    def test_a_name_in_a_folder(self, folder, name):
        (folder / name).write_bytes(b"")
        refuse(folder, "which no bundle has")

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    @pytest.mark.parametrize("name", [CARD, MANIFEST, SEAL])
    def test_one_name_twice(self, folder, tmp_path, name):
        pack(folder, tmp_path / "m.zip")
        with zipfile.ZipFile(tmp_path / "m.zip", "a") as archive:
            archive.writestr(name, (folder / name).read_bytes())
        refuse(tmp_path / "m.zip", "two files have the name", name)

    def test_a_bomb_is_not_unpacked_beyond_its_listed_size(self, folder, tmp_path, monkeypatch):
        data = b"\0" * (200 << 20)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in [*FILES, MANIFEST, SEAL]:
                archive.writestr(name, data if name == CARD else (folder / name).read_bytes())
        # The directory says what the manifest says; the stream goes on for 200 MB.
        raw = bytearray(buffer.getvalue())
        for start in (raw.find(b"PK\1\2") + 24, 22):
            raw[start : start + 4] = struct.pack("<I", len(FILES[CARD]))
        (tmp_path / "m.zip").write_bytes(raw)
        most, read = 0, zipfile.ZipExtFile.read

        def counted(self, n=-1):
            nonlocal most
            result = read(self, n)
            most = max(most, len(result))
            return result

        monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
        refuse(tmp_path / "m.zip")
        assert most < 1 << 20

    @pytest.mark.parametrize("name", [MANIFEST, SEAL])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_an_endless_manifest_is_not_read_to_its_end(self, folder, tmp_path, monkeypatch, name, zipped):
        os.truncate(folder / name, 40 << 20)
        path = pack(folder, tmp_path / "m.zip", zipfile.ZIP_STORED) if zipped else folder
        lengths = []
        read = archive_module.Archive.read

        def counted(self, *arguments):
            data = read(self, *arguments)
            lengths.append(len(data))
            return data

        monkeypatch.setattr(archive_module.Archive, "read", counted)
        refuse(path)
        assert max(lengths) <= (16 << 20) + 1
        assert name == MANIFEST or max(lengths) < 1 << 16

    def test_not_a_zip(self, tmp_path):
        (tmp_path / "m.topt").write_bytes(b"just some bytes")
        refuse(tmp_path / "m.topt", "neither a folder nor a zip file")

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "m.topt").write_bytes(b"")
        refuse(tmp_path / "m.topt", "neither a folder nor a zip file")

    def test_an_encrypted_entry(self, folder, tmp_path):
        raw = bytearray(pack(folder, tmp_path / "m.zip").read_bytes())
        entry = raw.find(b"PK\1\2")
        raw[entry + 8] |= 1
        raw[6] |= 1
        (tmp_path / "m.zip").write_bytes(raw)
        refuse(tmp_path / "m.zip", "cannot be unpacked")

    @pytest.mark.parametrize("where", ["entry", "directory"])
    def test_a_name_that_is_no_text(self, folder, tmp_path, where):
        raw = bytearray(pack(folder, tmp_path / "m.zip").read_bytes())
        header, flags, name = (0, 7, 30) if where == "entry" else (raw.find(b"PK\1\2"), 9, 46)
        raw[header + flags] |= 8  # says that the name is UTF-8
        raw[header + name] = 0xE5  # and it is not
        (tmp_path / "m.zip").write_bytes(raw)
        refuse(tmp_path / "m.zip")

    def test_an_empty_name(self, folder, tmp_path):
        raw = bytearray(pack(folder, tmp_path / "m.zip").read_bytes())
        raw[raw.find(b"PK\1\2") + 46] = 0  # names end where a zero is
        (tmp_path / "m.zip").write_bytes(raw)
        refuse(tmp_path / "m.zip")

    @pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_rare_compressions_whose_decoders_raise_errors_of_their_own(self, folder, tmp_path, compression):
        refuse(pack(folder, tmp_path / "m.zip", compression), "compress")

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_an_entry_that_claims_another_compression(self, folder, tmp_path, method):
        raw = bytearray(pack(folder, tmp_path / "m.zip").read_bytes())
        for signature, offset in ((b"PK\1\2", 10), (b"PK\3\4", 8)):
            entry = raw.find(signature)
            raw[entry + offset] = method
        (tmp_path / "m.zip").write_bytes(raw)
        refuse(tmp_path / "m.zip")

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_any_damage_is_refused_or_harmless(self, folder, tmp_path, compression):
        """Bytes flipped and cut all over the archive: never a traceback, never a wrong byte."""
        sound = pack(folder, tmp_path / "m.zip", compression).read_bytes()
        draw, path, refused = random.Random(0), tmp_path / "damaged.zip", 0
        for _ in range(400):
            data = bytearray(sound)
            if draw.random() < 0.15:
                del data[draw.randrange(len(data)) :]
            for _ in range(draw.choice([1, 1, 2, 5])):
                if data:
                    data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
            path.write_bytes(data)
            try:
                bundle = open_bundle(path)
                assert {name: bundle.read(name) for name in bundle.manifest.files} == FILES
            except BadBundle:
                refused += 1
        assert refused > 200


class TestManifest:
    """Manifests that someone wrote and sealed on purpose: refused, without a traceback."""

    def test_another_schema_version_names_both(self, folder):
        reseal(folder, lambda record: record.update(schema_version=2))
        refuse(folder, "another schema version", "expected: 1", "found:    2")

    @pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(Manifest) if f.name != "files"])
    def test_a_missing_key(self, folder, key):
        field = next(f for f in dataclasses.fields(Manifest) if f.name == key)
        if field.default is field.default_factory is dataclasses.MISSING:
            reseal(folder, lambda record: record.pop(key))
            refuse(folder, key)

    def test_an_unknown_key(self, folder):
        reseal(folder, lambda record: record.update(surprise=1))
        refuse(folder, "surprise")

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "{}", "\ufeff{}"])
    def test_no_record_at_all(self, folder, text):
        seal_text(folder, text)
        refuse(folder, "manifest")

    def test_endless_nesting(self, folder):
        seal_text(folder, "[" * 200_000)
        refuse(folder, "manifest")

    @pytest.mark.parametrize(
        "files",
        [
            None,
            [],
            3,
            "x",
            {CARD: None},
            {CARD: 3},
            {CARD: []},
            {CARD: {}},
            {CARD: {"size": 10}},
            {CARD: {"size": "10", "sha256": ""}},
            {CARD: {"size": 10.0}},
            {CARD: {"size": -1, "sha256": ""}},
        ],
    )
    def test_a_list_of_files_of_the_wrong_form(self, folder, files):
        for name in FILES:
            if name != CARD:
                (folder / name).unlink()
        reseal(folder, lambda record: record.update(files=files))
        refuse(folder)

    @pytest.mark.parametrize(
        "key", ["source", "tasks", "views", "prompts", "ranges", "variants", "files", "inputs", "golden"]
    )
    @pytest.mark.parametrize("value", [None, 3, "x"])
    def test_a_value_of_the_wrong_kind(self, folder, key, value):
        reseal(folder, lambda record: record.update({key: value}))
        refuse(folder, key)

    def test_a_name_that_is_not_listed_cannot_be_read(self, folder):
        bundle = open_bundle(folder)
        for name in ("models/other.onnx", "../outside", MANIFEST):
            with pytest.raises(BadBundle):
                bundle.read(name)
