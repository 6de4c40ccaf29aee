"""Prompts for regions that lack them: what ``topt-run predict`` does by itself with a bundle that has an encoder."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from topt_deploy.bundle.manifest import Bundle
from topt_deploy.data.columns import PROMPT_PREFIX, REGION_ID, Given
from topt_deploy.prompts.encode import Progress, encode
from topt_deploy.prompts.encode_job import open_cache
from topt_deploy.prompts.options import CACHE
from topt_deploy.prompts.table import REASON, merge_prompts, read_regions

from .bad_rows import in_memory
from .encoder_bundles import encoder_of
from .prompt_encoder import load_encoder


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompted:
    """Regions with prompts.

    Attributes:
        table: The regions table with the prompt columns, null where a region was skipped.
        skipped: Why, by region id.
        facts: The encoder of the prompts, for the receipt.
    """

    table: pa.Table
    skipped: Mapping[str, str]
    facts: Mapping[str, Any]


class PromptEncoder:
    """The encoder that goes with a bundle.

    Args:
        bundle: The city's bundle, whose manifest names an encoder.
        place: The encoder's own bundle; None looks inside, or beside, the city's.
        engine, device, threads: Of :func:`.prompt_encoder.load_encoder`.

    Raises:
        NoInput: If the encoder's bundle is not there.
        BadBundle: If it is not sound, or not the one that the bundle goes with.
    """

    def __init__(self, bundle: Bundle, place: Path | None, *, engine: str, device: str, threads: int) -> None:
        found = encoder_of(bundle, place)
        self._opened = load_encoder(found, engine=engine, device=device, threads=threads)

    def add(
        self,
        regions: Given,
        columns: Sequence[str],
        *,
        home: Path | None,
        id_col: str,
        on_bad_image: str,
        cache: bool,
        progress: Progress,
    ) -> Prompted:
        """Make prompt columns.

        Args:
            regions: The regions table, or its Parquet file.
            columns: The prompt columns to add.
            home: The folder that images lie below and that the cache is in; without one there is neither.
            id_col: The column that holds the region ids.
            on_bad_image: Of :func:`topt_deploy.prompts.encode.encode`.
            cache: True to keep vectors, and to take what is kept.
            progress: Told how many regions are done, and of how many.

        Raises:
            BadData: If a text or an image cannot be encoded.
        """
        tasks = [column.removeprefix(PROMPT_PREFIX) for column in columns]
        encoder, templates = self._opened.encoder, self._opened.templates
        with open_cache(home / CACHE) if cache and home is not None else nullcontext() as kept:
            done = encode(
                read_regions(regions, templates.wording, id_col=id_col), encoder, templates, tasks,
                root=home, cache=kept, on_bad_image=on_bad_image, progress=progress,
            )  # fmt: skip
        facts = {
            "sha256": self._opened.sha256,
            "identity": self._opened.spec.identity,
            "precision": encoder.precision,
            "engine": encoder.runtime,
            "device": self._opened.device.as_dict(),
            "encoded": done.encoded,
            "cached": done.cached,
        }
        reasons = zip(done.table.column(REGION_ID).to_pylist(), done.table.column(REASON).to_pylist(), strict=True)
        return Prompted(
            table=merge_prompts(in_memory(regions), done.table, id_col=id_col),
            skipped={region: reason for region, reason in reasons if reason is not None},
            facts=facts,
        )
