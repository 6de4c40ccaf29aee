"""Images of regions: by the region id in their names, or by the position that the camera wrote into them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topt_deploy.errors import BadConfig, BadData

from .libraries import library
from .locate import OUTSIDE
from .match import Matcher
from .recipe import Source
from .tally import Tally

if TYPE_CHECKING:
    from .city import CityInMaking

Array = np.ndarray[Any, Any]

GPS = 0x8825
"""EXIF's directory of positions; within it 1 to 4 are latitude and longitude with their directions."""


def read_images(
    source: Source,
    city: "CityInMaking",
    tally: Tally,
    files: Sequence[Path],
    told: Callable[[Path, float], None],
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The image files of every region, as paths below the city's folder.

    Args:
        source: As the recipe says; ``by`` is ``name`` (the file's name, or its folder's, is a region's id, with
            anything behind a ``_``, ``-`` or space) or ``position``.
        city: Its regions.
        tally: Where is written down what became of the files.
        files: The images.
        told: Told of a file and the share of it that is done.
    """
    if source.by not in ("name", "position"):
        raise BadConfig(
            "how images belong to regions is not stated",
            column="images.by",
            expected="name or position",
            found=source.by,
        )
    images: list[list[str]] = [[] for _ in city.regions.ids]
    matcher = Matcher(city.regions.ids)
    for number, path in enumerate(files, start=1):
        tally.read += 1
        if source.by == "name":
            place, reason = _by_name(path, matcher), "unknown_region"
        else:
            place, reason = _by_position(path, city)
        if place == OUTSIDE:
            tally.reject(path, np.array([number]), reason, [path.name])
            continue
        tally.assigned += 1
        images[place].append(_below(path, city.out))
        told(path, 1.0)
    return {}, {"images": [sorted(names) for names in images]}


def _below(path: Path, out: Path) -> str:
    try:
        return path.resolve().relative_to(out.resolve()).as_posix()
    except ValueError as error:
        raise BadData(
            "an image is not below the city's folder, where encode looks for it", file=path, expected=f"below {out}",
            fix="move the images there",
        ) from error  # fmt: skip


def _by_name(path: Path, matcher: Matcher) -> int:
    """The region of the longest beginning of the name that is an id; else that of the folder's name."""
    stem = path.stem
    cuts = [len(stem), *(i for i in range(len(stem) - 1, 0, -1) if stem[i] in "_- ")]
    for name in [*(stem[:cut] for cut in cuts), path.parent.name]:
        place = matcher.place(name)
        if place != OUTSIDE:
            return place
    return OUTSIDE


def _by_position(path: Path, city: "CityInMaking") -> tuple[int, str]:
    image = library("PIL.Image", "encoder")
    with image.open(path) as opened:
        gps = opened.getexif().get_ifd(GPS)
    try:
        lat, lon = (_degrees(gps[k + 1], gps[k]) for k in (1, 3))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return OUTSIDE, "blank"
    return int(city.locator.locate(np.array([lon]), np.array([lat])).region[0]), "outside"


def _degrees(parts: Sequence[Any], direction: str) -> float:
    degrees, minutes, seconds = (float(part) for part in parts)
    return (degrees + minutes / 60 + seconds / 3600) * (-1 if direction in ("S", "W") else 1)
