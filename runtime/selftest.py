"""The self-test: golden cities and golden regions of a bundle are computed again on this machine and compared."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.bundle.encoder_manifest import EncoderBundle
from topt_deploy.bundle.manifest import SCHEMA_VERSION
from topt_deploy.bundle.sealed import open_sealed
from topt_deploy.prompts.golden_regions import read_golden, reproduce

from .encoder_bundles import encoder_of, find_encoder, locate
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
    regions, expected = read_golden(bundle)
    questions = [bundle.templates.question(task) for task in expected]
    lines, facts = [], []
    for i, region in enumerate(regions):
        prompt = opened.encoder.prompt(region.text, region.images, questions)
        cosine, difference = reproduce(
            opened.encoder.backend, prompt, np.stack([vectors[i] for vectors in expected.values()]),
            bundle.manifest.tolerance, file=bundle.path,
            failed=f"self-test failed on {region.name}: this machine does not reproduce the exporter's vectors",
            fix="export with another --encoder-precision, or report it with the processor's name",
        )  # fmt: skip
        lines.append(f"{region.name}: {len(region.images)} images, cosine {cosine:.6f}, difference {difference:.1e}")
        facts.append({"region": region.name, "cosine": cosine, "difference": difference})
    return Done(
        engine=f"{opened.encoder.runtime} ({bundle.manifest.precision})", lines=tuple(lines), facts=tuple(facts)
    )
