"""A city of five regions with texts and images of mixed sizes, and encoders that count or stop."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from topt_deploy.data.parquet import write_parquet
from topt_deploy.prompts.encode import Encoder

IDS = ("04", "00", "03", "01", "02")
SIZES = {
    "00": [(70, 90), (40, 130)],
    "01": [(56, 56)],
    "02": [],
    "03": [(90, 70), (64, 64), (30, 61)],
    "04": [(45, 200)],
}


def write_city(folder: Path, *, images: bool = True) -> Path:
    """Write regions.parquet and its images to ``folder``; return the table's path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    named: dict[str, list[str]] = {region: [] for region in IDS}
    for region, sizes in SIZES.items() if images else ():
        for number, (height, width) in enumerate(sizes):
            name = f"images/{region}_{number}.{'png' if number % 2 else 'jpg'}"
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
            named[region].append(name)
    table = {
        "region_id": list(IDS),
        "city_id": ["Tiny"] * len(IDS),
        "lon": [-87.6 + 0.01 * int(region) for region in IDS],
        "lat": [41.8] * len(IDS),
        "text": [f"Region {region} has {int(region) * 7} shops." for region in IDS],
        "poi_food": [1, 2, 3, 4, 5],
    }
    if images:
        table["images"] = [named[region] for region in IDS]
    write_parquet(folder / "regions.parquet", pa.table(table))
    return folder / "regions.parquet"


class Stopped(Exception):
    pass


@dataclass
class Watched:
    """An encoder that counts what it computes, and stops before computing the region after ``stop_after``."""

    inner: Encoder
    stop_after: int | None = None
    computed: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def vectors(self, prompts: Any) -> Any:
        if self.stop_after is not None and sum(self.computed) + len(prompts) > self.stop_after:
            raise Stopped
        self.computed.append(len(prompts))
        return self.inner.vectors(prompts)
