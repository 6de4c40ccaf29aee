"""``topt-run info``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from topt_deploy.console import Log, decimal

from .options import PATH, log_format_option, signature_option

if TYPE_CHECKING:
    from topt_deploy.bundle.manifest import Bundle


@click.command()
@click.argument("bundle", type=PATH)
@signature_option
@log_format_option
def info(bundle: Path, require_signature: Path | None, log_format: str) -> None:
    """Show what BUNDLE predicts, what it needs and how accurate it is, or which encoder it is. Checks every hash."""
    from topt_deploy.bundle.manifest import SCHEMA_VERSION
    from topt_deploy.bundle.sealed import open_sealed

    if open_sealed(bundle, SCHEMA_VERSION).is_encoder:
        lines, about = _encoder(bundle, require_signature)
    else:
        lines, about = _city(bundle, require_signature)
    Log(log_format).result("\n".join(lines), event="info", **about)


def _city(bundle: Path, key: Path | None) -> tuple[list[str], dict[str, Any]]:
    """A description of a city's bundle, for people and for machines."""
    from topt_deploy.bundle.manifest import open_bundle
    from topt_deploy.bundle.sealed import well_formed
    from topt_deploy.bundle.signature import check_signature

    opened = open_bundle(bundle)
    check_signature(opened, key)
    opened.verify()
    with well_formed(bundle):
        return _told(opened)


def _told(opened: "Bundle") -> tuple[list[str], dict[str, Any]]:
    m = opened.manifest
    lines = [
        f"bundle     {opened.path} (schema {m.schema_version}, topt-deploy {m.version})",
        f"sha256     {opened.sha256}",
        f"city       {m.source['city_id']}, {m.source['regions']} regions"
        + (" — SYNTHETIC" if m.source["synthetic"] else ""),
        f"reads      {', '.join(f'{v} ({len(names)})' for v, names in m.views.items())}"
        + (", flows" if m.mobility else ""),
        *(f"prompts    {c}: {f['width']} from {f.get('encoder') or 'unnamed'}" for c, f in m.prompts.items()),
        *([f"encoder    {m.encoder['identity']}, {m.encoder['bundle'] or 'inside'}"] if m.encoder else []),
        *(
            f"variant    {name}: {v['graph']}, tolerance {v['tolerance']:g}{_built(v)}"
            for name, v in m.variants.items()
        ),
        *_gated_on(m.gated_on),
        f"protocol   {m.source['protocol']}",
    ]
    for task, described in m.tasks.items():
        held, trees = described["report"]["held_out"], described["report"]["trees"]
        lines.append(
            f"{task:<16} held out: MAE {held['mae']:.1f}, RMSE {held['rmse']:.1f}, R² {decimal(held['r2'])}"
            f" (boosted trees: MAE {trees['mae']:.1f})"
        )
    facts: dict[str, Any] = {
        "sha256": opened.sha256,
        "tasks": m.tasks,
        "views": m.views,
        "prompts": m.prompts,
        "gated_on": m.gated_on,
    }
    return lines, {"source": m.source, **facts}


def _gated_on(sets: Sequence[str] | None) -> list[str]:
    """A line on the processor that the gate ran on, where the bundle says."""
    if sets is None:
        return []
    return [f"gated on   a processor with {', '.join(sets) or 'none of the instruction sets that matter'}"]


def _built(variant: Mapping[str, Any]) -> str:
    """The engines that a variant holds, and what built them; empty for variants without engines."""
    if "engines" not in variant:
        return ""
    built = ", ".join(variant["engines"])
    return f", engines for {built} by {variant['library']}" if built else ", engines are built on the target"


def _encoder(path: Path, key: Path | None) -> tuple[list[str], dict[str, Any]]:
    """A description of an encoder's bundle, for people and for machines; every byte and the signature are checked."""
    from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
    from topt_deploy.bundle.signature import check_signature

    bundle = open_encoder_bundle(path)
    check_signature(bundle, key)
    bundle.verify()
    m, spec = bundle.manifest, bundle.spec
    worst = min(measured["cosine"] for measured in m.parity)
    lines = [
        f"bundle     {path}, a prompt encoder (schema {m.schema_version}, topt-deploy {m.version})",
        f"sha256     {bundle.sha256}",
        f"encoder    {spec.identity}, family {spec.family}, {spec.width} wide",
        f"precision  {m.precision}; {len(m.kept)} linear maps in another one",
        f"templates  {', '.join(bundle.templates.questions)} (version {bundle.templates.version})",
        f"parity     smallest cosine {worst:.6f}, against {m.source['reference']}",
    ]
    lines += _gated_on(m.gated_on)
    return lines, {
        "sha256": bundle.sha256, "encoder": spec.identity, "precision": m.precision, "parity": m.parity,
        "gated_on": m.gated_on,
    }  # fmt: skip
