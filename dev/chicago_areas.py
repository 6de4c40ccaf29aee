"""The shapes of Chicago's 77 community areas, which libpysal brings, as ``topt-deploy import hafusion`` takes them."""

import importlib.util
from pathlib import Path

FEET = "EPSG:3435"
"""Illinois East in US feet, which Chicago77.shp is in; it has no .prj."""


def chicago_areas() -> tuple[str | Path, ...]:
    """The options of the import.

    Raises:
        SystemExit: If libpysal is absent.
    """
    found = importlib.util.find_spec("libpysal")
    if found is None or found.origin is None:
        raise SystemExit("libpysal is absent: pip install 'topt-deploy[test]'")
    file = Path(found.origin).parent / "examples" / "chicago" / "Chicago77.shp"
    return "--geometry", file, "--geometry-id", "AREA_NUMBE", "--geometry-name", "COMMUNITY", "--src-crs", FEET
