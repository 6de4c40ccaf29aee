"""Places of tables: paths, and addresses in object stores, as text."""

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from topt_deploy.errors import UsageError

SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "file")
"""``az://CONTAINER/…`` is Azure's; the account comes from the environment, as everyone's credentials do."""


def is_uri(place: str) -> bool:
    """True if a place is a URI of one of :data:`SCHEMES`."""
    scheme, found, _ = place.partition("://")
    if found and scheme not in SCHEMES and scheme.isalnum():
        raise UsageError("unknown kind of address", file=place, expected=", ".join(f"{s}://" for s in SCHEMES))
    return bool(found)


def parted(place: str) -> tuple[str, str]:
    """A URI without its settings, and these: ``?region=…``, or nothing. A path has none, whatever is in it."""
    uri, mark, settings = place.partition("?") if is_uri(place) else (place, "", "")
    return uri, mark + settings


def local_path(place: str) -> Path | None:
    """The path of a place on this machine, by path or by ``file://``; None for a place in a store."""
    if not is_uri(place):
        return Path(place)
    scheme, _, path = parted(place)[0].partition("://")
    return Path(unquote(path)) if scheme == "file" else None


def shown(place: str) -> str:
    """A place as it may be told and kept: a URI without its settings, and without a password before its host."""
    return re.sub(r"(?<=://)([^/@:]*):[^/@]*@", r"\1@", parted(place)[0]) if is_uri(place) else place


def joined(place: str, name: str) -> str:
    """A file below a folder: a path below a path, or a URI, escaped, below a URI."""
    uri, settings = parted(place)
    return f"{uri.rstrip('/')}/{quote(os.fsencode(name), safe='/=') if is_uri(place) else name}{settings}"
