"""Where the prompt encoder of a bundle is: inside it, beside it, or where the user says."""

from pathlib import Path

from topt_deploy.bundle.encoder_manifest import SCHEMA_VERSION, EncoderBundle, open_encoder_bundle
from topt_deploy.bundle.manifest import ENCODER, Bundle, open_bundle
from topt_deploy.bundle.sealed import open_sealed
from topt_deploy.bundle.signature import check_signature
from topt_deploy.errors import BadBundle, NoInput, UsageError


def locate(city: Bundle, place: Path | None = None) -> tuple[Path, str]:
    """The place of a city's encoder: the path of a bundle, which need not exist, and the folder inside it, or "".

    Args:
        city: The city's bundle.
        place: The encoder's own bundle; None looks beside the city's. Ignored where the city's holds the encoder.

    Raises:
        UsageError: If it has no encoder.
    """
    facts = city.manifest.encoder
    if facts is None:
        raise UsageError(
            "the bundle has no prompt encoder", file=city.path,
            fix="export it with topt-deploy export --prompt-encoder",
        )  # fmt: skip
    return (city.path, ENCODER) if facts["bundle"] is None else (place or city.path.parent / facts["bundle"], "")


def encoder_of(city: Bundle, place: Path | None = None) -> EncoderBundle:
    """The encoder that a city's bundle goes with, opened.

    Args:
        city: The city's bundle.
        place: Of :func:`locate`.

    Raises:
        NoInput: If the encoder's bundle is not there.
        BadBundle: If it is not sound, or another one.
        UsageError: If the city's bundle goes with none.
    """
    path, inside = locate(city, place)
    facts = city.manifest.encoder
    assert facts is not None
    if not path.exists():
        raise NoInput(
            "the bundle's prompt encoder was not found", file=path, expected=facts["identity"],
            fix="copy it there, or name its place with --encoder-bundle",
        )  # fmt: skip
    found = open_encoder_bundle(path, inside)
    if found.sha256 != facts["sha256"]:
        raise BadBundle(
            "not the prompt encoder that the bundle was exported with", file=path,
            expected=f"{facts['identity']}, manifest {facts['sha256'][:16]}…",
            found=f"{found.spec.identity}, manifest {found.sha256[:16]}…", fix="name the right one",
        )  # fmt: skip
    return found


def find_encoder(path: Path, key: Path | None = None) -> EncoderBundle:
    """The encoder that a path means: its own bundle, or that of a city.

    Args:
        path: The bundle.
        key: The public key that must have signed it; None asks for no signature.

    Raises:
        NoInput, BadBundle, UsageError: If there is none, it is not sound, or not signed.
    """
    if open_sealed(path, SCHEMA_VERSION).is_encoder:
        found = open_encoder_bundle(path)
        check_signature(found, key)
        return found
    city = open_bundle(path)
    check_signature(city, key)
    return encoder_of(city)
