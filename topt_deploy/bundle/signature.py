"""Signatures of bundles: ed25519 over the manifest's bytes, and through its hashes over everything.

The seal tells a whole bundle from a damaged one; whoever writes a bundle can seal it. A signature tells who wrote it.
It stands beside the manifest as ``manifest.json.sig``, in base64. Keys are PEM files that ``openssl`` makes
(docs/how-to/sign.md); nothing here makes or keeps one.
"""

from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

from topt_deploy.errors import BadBundle, BadConfig, NoInput, UsageError
from topt_deploy.storage.os_errors import read_plain
from topt_deploy.storage.text_files import write_text

from .manifest import SCHEMA_VERSION
from .sealed import MANIFEST, SIGNATURE, Sealed, open_sealed

KEY_LIMIT_BYTES = 1 << 16


def sign(path: Path, key: Path) -> Path:
    """Sign a bundle, a city's or an encoder's, once all of it is found to be what its manifest says.

    Args:
        path: The bundle's folder; zip it afterwards.
        key: Private key, PEM (PKCS8), not encrypted.

    Returns:
        The signature's file. One that was there is replaced.

    Raises:
        UsageError: If the bundle is a zip, or the key is no ed25519 private key.
        NoInput, BadBundle: If there is no sound bundle.
        BadConfig: If ``cryptography`` is not installed.
    """
    path = Path(path)
    if path.is_file():
        raise UsageError(
            "a zip's signature is made before it is zipped", file=path, expected="a folder", found="a file",
            fix="unzip it, sign the folder, and zip that again",
        )  # fmt: skip
    private = _key(key, private=True)
    sealed = open_sealed(path, SCHEMA_VERSION)
    sealed.verify()
    place = path / SIGNATURE
    write_text(place, b64encode(private.sign(sealed.data)).decode() + "\n")
    return place


def check_signature(sealed: Sealed, key: Path | None) -> None:
    """Refuse a bundle that the owner of a key did not sign.

    Args:
        sealed: The opened bundle.
        key: Public key, PEM; None asks for no signature.

    Raises:
        BadBundle: If it has no signature, or not that key's, or its manifest is not the one that was signed.
        UsageError: If the key is no ed25519 public key.
        NoInput: If there is no such file.
        BadConfig: If ``cryptography`` is not installed.
    """
    if key is None:
        return
    public = _key(key, private=False)
    from cryptography.exceptions import InvalidSignature

    where = sealed.path / sealed.inside if sealed.inside else sealed.path
    if sealed.signature is None:
        raise BadBundle(
            "the bundle is not signed", file=where, expected=f"{SIGNATURE}, by the key of {key}", found="none",
            fix="topt-deploy sign, by whoever holds the private key",
        )  # fmt: skip
    try:
        public.verify(b64decode(sealed.signature.strip(), validate=True), sealed.data)
    except (InvalidSignature, ValueError) as error:
        raise BadBundle(
            f"{SIGNATURE} is not this key's signature of {MANIFEST}", file=where, expected=f"signed by {key}",
            fix="get the bundle again from whoever holds the private key; do not use this one",
        ) from error  # fmt: skip


def _key(path: Path, *, private: bool) -> Any:
    """An ed25519 key of a PEM file."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise BadConfig(
            "signatures need cryptography, which is not installed", fix="pip install 'topt-deploy[sign]'"
        ) from error
    path = Path(path)
    if not path.exists():
        raise NoInput("no such key", file=path, fix="docs/how-to/sign.md says how to make a pair of keys")
    data = read_plain(path, KEY_LIMIT_BYTES)
    try:
        key = load_pem_private_key(data, password=None) if private else load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        key, reason = None, str(error).splitlines()[0]
    else:
        reason = type(key).__name__
    if not isinstance(key, Ed25519PrivateKey if private else Ed25519PublicKey):
        raise UsageError(
            f"no ed25519 {'private' if private else 'public'} key", file=path, found=reason,
            expected="a PEM file, not encrypted" if private else "a PEM file",
            fix="openssl genpkey -algorithm ed25519 -out KEY.pem; openssl pkey -in KEY.pem -pubout -out KEY.pub",
        )  # fmt: skip
    return key
