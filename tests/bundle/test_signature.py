"""Signatures: made by the command, checked by the function that the runtime calls, with keys that openssl makes."""

import base64
import json
import shutil
import subprocess
import sys
from hashlib import sha256

import pytest
from commands import shell

from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
from topt_deploy.bundle.manifest import SCHEMA_VERSION, open_bundle
from topt_deploy.bundle.sealed import MANIFEST, SEAL, SIGNATURE, open_sealed
from topt_deploy.bundle.signature import check_signature, sign
from topt_deploy.errors import BadBundle, BadConfig, Exit, NoInput, UsageError

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A pair of keys, as PEM files, and another one."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    folder = tmp_path_factory.mktemp("keys")
    plain = form.NoEncryption()
    pairs = {"mine": Ed25519PrivateKey.generate(), "other": Ed25519PrivateKey.generate()}
    pairs["curve"] = generate_private_key(SECP256R1())
    for name, key in pairs.items():
        pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, plain)
        (folder / f"{name}.pem").write_bytes(pem)
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    locked = form.BestAvailableEncryption(b"secret")
    (folder / "locked.pem").write_bytes(
        pairs["mine"].private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, locked)
    )
    (folder / "text.pem").write_text("no key")
    return folder


@pytest.fixture
def bundle(demo_bundle, tmp_path):
    return shutil.copytree(demo_bundle, tmp_path / "model.topt")


def opened(path):
    return open_sealed(path, SCHEMA_VERSION)


def test_a_signed_bundle_is_accepted_and_works(bundle, keys):
    assert sign(bundle, keys / "mine.pem") == bundle / SIGNATURE
    check_signature(opened(bundle), keys / "mine.pub")
    open_bundle(bundle).verify()


def test_the_signature_is_of_the_manifests_bytes(bundle, keys):
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    sign(bundle, keys / "mine.pem")
    key = load_pem_public_key((keys / "mine.pub").read_bytes())
    key.verify(base64.b64decode((bundle / SIGNATURE).read_text()), (bundle / MANIFEST).read_bytes())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_keys_and_signatures_are_openssls(bundle, tmp_path):
    made = shell("openssl genpkey -algorithm ed25519 -out k.pem && openssl pkey -in k.pem -pubout -out k.pub", tmp_path)
    assert made.code == 0, made
    sign(bundle, tmp_path / "k.pem")
    check_signature(opened(bundle), tmp_path / "k.pub")
    (tmp_path / "sig").write_bytes(base64.b64decode((bundle / SIGNATURE).read_text()))
    checked = shell(
        f"openssl pkeyutl -verify -pubin -inkey k.pub -rawin -in {bundle / MANIFEST} -sigfile sig", tmp_path
    )
    assert checked.code == 0, checked


def refused(path, key, part):
    with pytest.raises(BadBundle, match=part) as caught:
        check_signature(opened(path), key)
    assert caught.value.exit_code == Exit.BAD_BUNDLE == 76


def test_an_unsigned_one(bundle, keys):
    refused(bundle, keys / "mine.pub", "not signed")


def test_another_key(bundle, keys):
    sign(bundle, keys / "mine.pem")
    refused(bundle, keys / "other.pub", "not this key's signature")
    sign(bundle, keys / "other.pem")
    check_signature(opened(bundle), keys / "other.pub")


def test_a_manifest_that_was_sealed_again(bundle, keys, reseal):
    """What the seal alone cannot tell."""
    sign(bundle, keys / "mine.pem")
    reseal(bundle, lambda record: record["source"].update(city_id="elsewhere"))
    open_bundle(bundle).verify()
    refused(bundle, keys / "mine.pub", "not this key's signature")


def test_another_file_behind_the_signed_manifest(bundle, keys):
    sign(bundle, keys / "mine.pem")
    path = bundle / "models/topt.weights"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    check_signature(opened(bundle), keys / "mine.pub")
    with pytest.raises(BadBundle):
        open_bundle(bundle).verify()


@pytest.mark.parametrize("text", ["", "no base64!", "AAAA", "A" * 88, "A" * 10_000])
def test_a_signature_that_is_none(text, bundle, keys):
    (bundle / SIGNATURE).write_text(text)
    refused(bundle, keys / "mine.pub", "not this key's signature")


def test_a_damaged_bundle_is_not_signed(bundle, keys):
    (bundle / "MODEL_CARD.md").write_text("x")
    with pytest.raises(BadBundle):
        sign(bundle, keys / "mine.pem")
    assert not (bundle / SIGNATURE).exists()


def test_a_zip_carries_its_folders_signature(bundle, keys, tmp_path):
    sign(bundle, keys / "mine.pem")
    path = shutil.make_archive(str(tmp_path / "m"), "zip", bundle)
    check_signature(opened(path), keys / "mine.pub")
    with pytest.raises(UsageError, match="before it is zipped"):
        sign(type(bundle)(path), keys / "mine.pem")


@pytest.mark.parametrize("name", ["curve", "locked", "text", "mine.pub"])
def test_what_is_no_private_key(name, bundle, keys):
    with pytest.raises(UsageError, match="no ed25519 private key") as caught:
        sign(bundle, keys / (name if "." in name else f"{name}.pem"))
    assert "openssl genpkey" in str(caught.value)


@pytest.mark.parametrize("name", ["curve.pub", "text.pem", "mine.pem"])
def test_what_is_no_public_key(name, bundle, keys):
    sign(bundle, keys / "mine.pem")
    with pytest.raises(UsageError, match="no ed25519 public key"):
        check_signature(opened(bundle), keys / name)


def test_a_key_that_is_not_there(bundle, keys):
    for call in (lambda: sign(bundle, keys / "none"), lambda: check_signature(opened(bundle), keys / "none")):
        with pytest.raises(NoInput, match="no such key"):
            call()


def test_without_the_library(bundle, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(BadConfig, match=r"topt-deploy\[sign\]") as caught:
        sign(bundle, keys / "mine.pem")
    assert caught.value.exit_code == Exit.BAD_CONFIG


def test_the_library_is_not_imported_before_it_is_used():
    code = "import sys, topt_deploy.bundle.signature, topt_deploy.runtime.cli; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class TestEncoders:
    """A city's signature covers its encoder: inside by the list of files, beside by the hash in the manifest."""

    def test_inside(self, prompted, keys, tmp_path):
        bundle = shutil.copytree(prompted / "model.topt", tmp_path / "model.topt")
        sign(bundle, keys / "mine.pem")
        check_signature(opened(bundle), keys / "mine.pub")
        path = bundle / "encoder/decoder.weights"
        path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(BadBundle):
            opened(bundle).verify()

    def test_beside(self, prompted, keys, tmp_path, reseal, topt_run):
        """Another encoder under the name of the right one, sound in itself, is not the one that was signed."""
        city = shutil.copytree(prompted, tmp_path / "city")
        sign(city / "beside.topt", keys / "mine.pem")
        facts = open_bundle(city / "beside.topt").manifest.encoder
        assert facts["sha256"] == open_encoder_bundle(city / "encoder.topt").sha256
        predict = ["predict", city / "bare.parquet", "--bundle", city / "beside.topt", "--no-cache"]
        assert topt_run(*predict).code == 0
        reseal(city / "encoder.topt", lambda record: record.update(version="another"))
        check_signature(opened(city / "beside.topt"), keys / "mine.pub")
        said = topt_run(*predict)
        assert said.code == Exit.BAD_BUNDLE
        assert "not the prompt encoder that the bundle was exported with" in said.err

    def test_of_its_own(self, prompted, keys, tmp_path):
        bundle = shutil.copytree(prompted / "encoder.topt", tmp_path / "encoder.topt")
        sign(bundle, keys / "mine.pem")
        check_signature(open_encoder_bundle(bundle), keys / "mine.pub")
        open_encoder_bundle(bundle).verify()


class TestCommand:
    def test_signs(self, bundle, keys, topt_deploy):
        said = topt_deploy("sign", bundle, "--key", keys / "mine.pem")
        assert said.code == 0, said
        assert str(bundle / SIGNATURE) in said.out
        check_signature(opened(bundle), keys / "mine.pub")

    @pytest.mark.parametrize(
        ("key", "code"), [("none.pem", Exit.NO_INPUT), ("text.pem", Exit.USAGE), ("curve.pem", Exit.USAGE)]
    )
    def test_says_what_is_wrong(self, key, code, bundle, keys, topt_deploy):
        said = topt_deploy("sign", bundle, "--key", keys / key)
        assert said.code == code
        assert said.err.startswith("error: ")
        assert not (bundle / SIGNATURE).exists()

    def test_of_no_bundle(self, keys, topt_deploy, tmp_path):
        assert topt_deploy("sign", tmp_path / "none", "--key", keys / "mine.pem").code == Exit.NO_INPUT
        assert topt_deploy("sign", tmp_path, "--key", keys / "mine.pem").code == Exit.BAD_BUNDLE


def test_sealing_does_not_list_a_signature(bundle, keys, reseal):
    from topt_deploy.bundle.sealed import seal_bundle

    sign(bundle, keys / "mine.pem")
    manifest = open_bundle(bundle).manifest
    for name in (MANIFEST, SEAL):
        (bundle / name).unlink()
    seal_bundle(bundle, manifest)
    assert SIGNATURE not in json.loads((bundle / MANIFEST).read_text())["files"]
    assert (bundle / SEAL).read_text().split()[0] == sha256((bundle / MANIFEST).read_bytes()).hexdigest()


@pytest.mark.parametrize("command", ["predict", "encode", "info", "selftest"])
def test_every_command_of_the_runtime_asks_for_it(command, prompted, keys, tmp_path, topt_run):
    city = shutil.copytree(prompted, tmp_path / "city", ignore=shutil.ignore_patterns("runs"))
    bundle = city / "model.topt"
    told = {
        "predict": [city / "regions.parquet", "--bundle", bundle],
        "encode": [city / "bare.parquet", "--bundle", bundle, "--task", "crime", "--out", tmp_path / "prompts.parquet"],
    }
    asked = [command, *told.get(command, [bundle]), "--require-signature", keys / "mine.pub"]
    said = topt_run(*asked)
    assert said.code == Exit.BAD_BUNDLE
    assert "the bundle is not signed" in said.err
    assert not (city / "predictions.parquet").exists()
    sign(bundle, keys / "mine.pem")
    assert topt_run(*asked).code == 0
    asked[-1] = keys / "other.pub"
    assert topt_run(*asked).code == Exit.BAD_BUNDLE


def test_a_batch_asks_for_it_too(bundle, keys, tmp_path, topt_run, demo_city):
    key = keys / "mine.pub"
    asked = ["predict", demo_city, "--bundle", bundle, "--out", f"{tmp_path}/out/", "--require-signature", key]
    assert topt_run(*asked).code == Exit.BAD_BUNDLE
    sign(bundle, keys / "mine.pem")
    assert topt_run(*asked).code == 0
