"""The shared vocabulary of categories (vocabulary.toml): what publishers call things, and one name for each here.

Models of two cities can be compared, and used for each other, where their categories are the same. There are 42
categories of points of interest and 12 of land use; everything else is ``other``, which is counted as well.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("vocabulary.toml")
OTHER = "other"
POI, LAND_USE = "poi", "land_use"
PUBLISHERS = ("osm", "geofabrik", "overture", "fsq")
"""Whose categories it knows: OpenStreetMap's tags (``key=value``), Geofabrik's classes, Overture's and Foursquare's."""
BELOW = " > "
"""Between the levels of a hierarchy."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Names by kind, publisher and the publisher's own name.

    Attributes:
        named: Categories by kind (:data:`POI`, :data:`LAND_USE`), in order.
        exact: By kind and publisher: the category of each of the publisher's.
        patterns: By kind and publisher: patterns and their categories, the longest first.
    """

    named: Mapping[str, tuple[str, ...]]
    exact: Mapping[tuple[str, str], Mapping[str, str]]
    patterns: Mapping[tuple[str, str], tuple[tuple[str, str], ...]]

    def names(self, kind: str) -> tuple[str, ...]:
        """All categories of a kind, ``other`` last."""
        return (*self.named[kind], OTHER)

    def categories(self, kind: str, publisher: str | None, value: str) -> tuple[str, ...]:
        """The categories of what a publisher calls ``value``; several where it says several, each once.

        Args:
            kind: :data:`POI` or :data:`LAND_USE`.
            publisher: One of :data:`PUBLISHERS`; None where the value is one of the names here already.
            value: ``amenity=cafe``, ``shop=convenience;gas``, ``Retail > Pharmacy``, ``italian_restaurant``.
        """
        if publisher is None:
            plain = value.strip().lower().replace(" ", "_")
            return (plain,) if plain in self.named[kind] else (OTHER,)
        values = [value]
        if publisher == "osm" and ";" in value:
            key, _, several = value.partition("=")
            values = [f"{key}={one.strip()}" for one in several.split(";") if one.strip()]
        found = dict.fromkeys(self._one(kind, publisher, one) for one in values)
        if len(found) > 1:
            found.pop(OTHER, None)  # what has a name is not other as well
        return tuple(found) or (OTHER,)

    def _one(self, kind: str, publisher: str, value: str) -> str:
        exact = self.exact[kind, publisher]
        levels = value.split(BELOW)
        for size in range(len(levels), 0, -1):
            name = exact.get(BELOW.join(levels[:size])) or exact.get(levels[size - 1])
            if name is not None:
                return name
        for pattern, name in self.patterns[kind, publisher]:
            if any(fnmatchcase(level, pattern) for level in levels):
                return name
        return OTHER


@cache
def load_vocabulary(file: Path = FILE) -> Vocabulary:
    """The vocabulary that is shipped."""
    raw = tomllib.loads(file.read_text(encoding="utf-8"))
    exact: dict[tuple[str, str], dict[str, str]] = {(kind, p): {} for kind in raw for p in PUBLISHERS}
    patterns: dict[tuple[str, str], list[tuple[str, str]]] = {key: [] for key in exact}
    for kind, categories in raw.items():
        for name, values in categories.items():
            for publisher, known in values.items():
                for value in known:
                    if "*" in value:
                        patterns[kind, publisher].append((value, name))
                    else:
                        exact[kind, publisher].setdefault(value, name)
                    if publisher == "fsq":
                        exact[kind, publisher].setdefault(value.split(BELOW)[-1], name)
    return Vocabulary(
        named={kind: tuple(categories) for kind, categories in raw.items()},
        exact=exact,
        patterns={key: tuple(sorted(found, key=lambda pair: -len(pair[0]))) for key, found in patterns.items()},
    )
