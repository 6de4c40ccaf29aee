"""The self-test: golden cities and golden regions of a bundle are computed again on this machine and compared."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topt_deploy.bundle.encoder_manifest import EncoderBundle
from topt_deploy.bundle.manifest import SCHEMA_VERSION
from topt_deploy.bundle.sealed import open_sealed

from .encoder_bundles import encoder_of, find_encoder, locate
from .golden_checks import check_golden_regions
from .predictor import load
from .prompt_encoder import check_engine, load_encoder


@dataclass(frozen=True, kw_only=True)
class Done:
    """A self-test that passed: what ran it, and what was measured, for people and for machines."""

    engine: str
    lines: tuple[str, ...]
    facts: tuple[dict[str, Any], ...]


def selftests(path: Path, *, device: str, engine: str, key: Path | None = None) -> Iterator[Done]:
    """Test a city's bundle, its prompt encoder where there is one, or an encoder's bundle.

    Args:
        path: The bundle.
        device: Where both run.
        engine: The library that runs the encoder.
        key: The public key that must have signed the bundle; None asks for no signature.

    Raises:
        BadBundle: If this machine's values are further from the exporter's than the bundle's tolerance.
    """
    check_engine(engine, device)
    if open_sealed(path, SCHEMA_VERSION).is_encoder:
        yield _encoder(find_encoder(path, key), engine, device)
        return
    predictor = load(path, device=device, key=key)
    checks = predictor.selftest()
    yield Done(
        engine=predictor.provider,
        lines=tuple(f"{c.city}: {c.regions} regions, largest relative difference {c.worst:.1e}" for c in checks),
        facts=tuple({"city": c.city, "regions": c.regions, "worst": c.worst} for c in checks),
    )
    if predictor.bundle.manifest.encoder is not None:
        place, _ = locate(predictor.bundle)
        if place.exists():
            yield _encoder(encoder_of(predictor.bundle), engine, device)


def _encoder(bundle: EncoderBundle, engine: str, device: str) -> Done:
    opened = load_encoder(bundle, engine=engine, device=device, threads=1)
    bundle.verify(skip=opened.checked)
    checks = list(
        check_golden_regions(
            bundle, opened,
            lambda region: f"self-test failed on {region}: this machine does not reproduce the exporter's vectors",
            "export with another --encoder-precision, or report it with the processor's name",
        )
    )  # fmt: skip
    return Done(
        engine=f"{opened.encoder.runtime} ({bundle.manifest.precision})",
        lines=tuple(
            f"{c.region}: {c.images} images, cosine {c.cosine:.6f}, difference {c.difference:.1e}" for c in checks
        ),
        facts=tuple({"region": c.region, "cosine": c.cosine, "difference": c.difference} for c in checks),
    )
