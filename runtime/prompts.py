"""Prompts for regions that lack them: what ``topt-run predict`` does by itself with a bundle that has an encoder."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa

from topt_deploy.bundle import Bundle
from topt_deploy.columns import PROMPT_PREFIX
from topt_deploy.encoder.bundle import open_encoder_bundle
from topt_deploy.encoder.encode import Progress, encode
from topt_deploy.encoder.job import open_cache
from topt_deploy.encoder.table import merge_prompts, read_regions
from topt_deploy.errors import BadBundle, NoInput
from topt_deploy.parquet import read_parquet

from .encoder import load_encoder, locate


class PromptEncoder:
    """The encoder that goes with a bundle.

    Args:
        bundle: The city's bundle, whose manifest names an encoder.
        place: The encoder's own bundle; None looks inside, or beside, the city's.
        engine, threads: Of :func:`.encoder.load_encoder`.

    Raises:
        NoInput: If the encoder's bundle is not there.
        BadBundle: If it is not sound, or not the one that the bundle goes with.
    """

    def __init__(self, bundle: Bundle, place: Path | None, *, engine: str, threads: int) -> None:
        facts = bundle.manifest.encoder
        assert facts is not None
        path, inside = locate(bundle, place)
        if not path.exists():
            raise NoInput(
                "the regions have no prompts, and the bundle's prompt encoder is not here", file=path,
                expected=facts["identity"], fix="copy it there, or name its place with --encoder-bundle",
            )  # fmt: skip
        found = open_encoder_bundle(path, inside)
        if found.sha256 != facts["sha256"]:
            raise BadBundle(
                "another prompt encoder than the bundle goes with", file=path,
                expected=f"{facts['identity']}, manifest {facts['sha256'][:16]}…",
                found=f"{found.spec.identity}, manifest {found.sha256[:16]}…", fix="name the right one",
            )  # fmt: skip
        self._opened = load_encoder(found, engine=engine, threads=threads)

    def add(
        self, regions: pa.Table | Path, columns: Sequence[str], *, id_col: str, cache: bool, progress: Progress
    ) -> tuple[pa.Table, dict[str, Any]]:
        """Regions with prompt columns, and what they were made with.

        Args:
            regions: The regions table, or its Parquet file, below whose folder images lie.
            columns: The prompt columns to add.
            id_col: The column that holds the region ids.
            cache: Whether to keep vectors beside the regions' file; a table has no place for them.
            progress: Told how many regions are done, and of how many.

        Raises:
            BadData: If a text or an image cannot be encoded.
        """
        path = regions if isinstance(regions, Path) else None
        root = path.parent if path is not None else Path()
        tasks = [column.removeprefix(PROMPT_PREFIX) for column in columns]
        encoder, templates = self._opened.encoder, self._opened.templates
        with open_cache(root) if cache and path is not None else nullcontext() as kept:
            done = encode(
                read_regions(regions, templates.wording, id_col=id_col), encoder, templates, tasks,
                root=root, cache=kept, progress=progress,
            )  # fmt: skip
        table = read_parquet(path) if path is not None else regions
        facts = {
            "sha256": self._opened.sha256,
            "identity": self._opened.spec.identity,
            "precision": encoder.precision,
            "engine": encoder.runtime,
            "encoded": done.encoded,
            "cached": done.cached,
        }
        return merge_prompts(table, done.table, id_col=id_col), facts
