"""``topt-deploy sign``."""

from pathlib import Path

import click

_PATH = click.Path(path_type=Path, readable=False)


@click.command("sign")
@click.argument("bundle", type=_PATH)
@click.option("--key", type=_PATH, required=True, help="Private ed25519 key, PEM, as openssl genpkey writes it.")
def sign(bundle: Path, key: Path) -> None:
    """Sign BUNDLE, a folder, so that topt-run --require-signature can check who made it."""
    from topt_deploy.bundle.signature import sign as sign_bundle

    click.echo(f"signature {sign_bundle(bundle, key)}")
