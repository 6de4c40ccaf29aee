"""``topt-run selftest``."""

from pathlib import Path
from typing import Any

import click

from topt_deploy.console import Log

from .options import PATH, device_option, encoder_engine_option, log_format_option, signature_option


@click.command()
@click.argument("bundle", type=PATH)
@device_option
@encoder_engine_option
@signature_option
@log_format_option
def selftest(bundle: Path, device: str, encoder_engine: str, require_signature: Path | None, log_format: str) -> None:
    """Predict BUNDLE's golden cities on this machine and compare with the exporter's values; its encoder likewise."""
    from ..selftest import selftests

    log = Log(log_format)
    log.listen()
    lines: list[str] = []
    facts: list[dict[str, Any]] = []
    for done in selftests(bundle, device=device, engine=encoder_engine, key=require_signature):
        lines += [*done.lines, f"self-test passed on {done.engine}"]
        facts += done.facts
    log.result("\n".join(lines), event="selftest", checks=facts)
