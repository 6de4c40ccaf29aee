"""What cities publish, for tests: real files of other packages, and small ones in publishers' own schemas."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from services import service

BIG = 3
"""Squares along each side of the small city."""
WEST, SOUTH, STEP = -87.70, 41.80, 0.01


def chicago() -> Path:
    """libpysal's community areas of Chicago: in feet, and without a .prj."""
    found = find_spec("libpysal")
    if found is None or found.origin is None:
        pytest.skip("libpysal is absent")
    return Path(found.origin).parent / "examples" / "chicago" / "Chicago77.shp"


def opendata(name: str) -> Path:
    """A file of another package's, which make services installs."""
    return Path(service(f"opendata/{name}"))


def squares(folder: Path, *, ids=None, crs: str | None = None) -> Path:
    """areas.geojson: nine squares of 0.01 degrees, ids 1 to 9 from the south-west, row by row."""
    features = []
    for row in range(BIG):
        for column in range(BIG):
            x, y = WEST + column * STEP, SOUTH + row * STEP
            ring = [[x, y], [x + STEP, y], [x + STEP, y + STEP], [x, y + STEP], [x, y]]
            number = row * BIG + column
            area = str(number + 1) if ids is None else ids[number]
            features.append(
                {
                    "type": "Feature",
                    "properties": {"area_numbe": area, "community": f"PLACE {number + 1}"},
                    "geometry": {"type": "Polygon", "coordinates": [ring]},
                }
            )
    path = folder / "areas.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def middle(number: int) -> tuple[float, float]:
    """Longitude and latitude of the middle of square ``number``, from 1."""
    row, column = divmod(number - 1, BIG)
    return round(WEST + (column + 0.5) * STEP, 6), round(SOUTH + (row + 0.5) * STEP, 6)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    """A text file; its lines are indented here, and not there."""
    lines = [line.strip() for line in text.strip().splitlines()]
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return path
