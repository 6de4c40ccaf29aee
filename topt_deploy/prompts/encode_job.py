"""One call of an encode command: where things are, what is refused beforehand, and what is said at the end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from topt_deploy.data.parquet import write_parquet
from topt_deploy.data.parquet_parts import open_table
from topt_deploy.errors import CannotCreate, Exit, NoInput, UsageError
from topt_deploy.storage.os_errors import check_place
from topt_deploy.storage.outputs import TABLES, check_outputs, check_suffix
from topt_deploy.storage.table_parts import find_table, home_of

from .cache import Cache
from .encode import Encoded, Encoder, Progress, encode
from .options import CACHE, OUT, REGIONS, TASKS
from .table import merge_prompts, read_regions
from .templates import Templates


class Team(Protocol):
    """Processes that encode a city together, each a share."""

    @property
    def rank(self) -> int:
        """This process's number; 0 merges and reports."""

    @property
    def size(self) -> int:
        """The number of regions."""

    def total(self, count: int) -> int:
        """The sum of every process's count, once all have come this far."""


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """A city to encode; the fields are what the user asked for.

    Attributes:
        city: regions.parquet or its folder.
        shared_cache: A cache file in place of the city's own, by which processes hand over their shares.
        read, bundles: Other files and bundles that are used, which no output takes the place of.
    """

    city: Path
    tasks: Sequence[str]
    out: Path | None
    update_regions: bool
    images_root: Path | None
    on_bad_image: str
    resume: bool
    no_cache: bool
    shared_cache: Path | None = None
    read: Sequence[Path] = ()
    bundles: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if not self.regions.exists():
            raise NoInput(
                "no city in this folder", file=self.regions, expected="a regions.parquet, or a folder with one"
            )
        if self.place.resolve() == self.regions.resolve():
            raise UsageError("the output would overwrite its input", file=self.place, fix="--update-regions adds to it")
        check_suffix(self.place, TABLES, "--out")
        check_outputs([self.place], read=[self.regions, *self.read], bundles=self.bundles)
        if self.update_regions and self.regions.is_dir():
            raise UsageError(
                "the regions are a table in parts, which is not changed", file=self.regions, expected="one file",
                fix="leave --update-regions out and join prompts.parquet to them, or write one regions.parquet",
            )  # fmt: skip
        if self.update_regions:
            check_place(self.regions)
        if self.resume and self.no_cache:
            raise UsageError("--resume needs the cache, which --no-cache switches off")
        if self.resume and not self.cache.exists():
            raise UsageError("there is nothing to resume", file=self.cache, fix="start without --resume")

    @cached_property
    def regions(self) -> Path:
        """The file of the regions, or the folder of their parts."""
        return find_table(self.city) or self.city / REGIONS

    @property
    def place(self) -> Path:
        """Of the output."""
        return self.out or home_of(self.regions) / OUT

    @property
    def cache(self) -> Path:
        """The file of the cache."""
        return self.shared_cache or home_of(self.regions) / CACHE

    def run(self, encoder: Encoder, templates: Templates, *, batch: int, progress: Progress) -> Encoded:
        """Encode, and write the table.

        Raises:
            ToptError: As :func:`.encode.encode`, and where a file cannot be read or written.
        """
        with self._ready(encoder, templates, batch) as encoding:
            return self._written(encoding(progress=progress))

    def run_in(
        self, team: Team, encoder: Encoder, templates: Templates, *, batch: int, progress: Progress
    ) -> Encoded | None:
        """:meth:`run` as one of several processes. What each computes goes into the cache, whence the first one takes
        it all for the table.

        Returns:
            What was done by all of them; None in another process than the first.
        """
        with self._ready(encoder, templates, batch) as encoding:
            own = encoding(progress=progress, share=(team.rank, team.size))
            computed = team.total(own.encoded)
            if team.rank:
                return None
            done = encoding()
        return self._written(replace(done, encoded=done.encoded + computed, cached=done.cached - computed))

    @contextmanager
    def _ready(self, encoder: Encoder, templates: Templates, batch: int) -> Iterator[Callable[..., Encoded]]:
        """:func:`.encode.encode` of this city, with its cache open."""
        regions = read_regions(self.regions, templates.wording)
        with nullcontext() if self.no_cache else open_cache(self.cache) as cache:
            yield partial(
                encode,
                regions,
                encoder,
                templates,
                tuple(dict.fromkeys(self.tasks or TASKS)),
                root=self.images_root or home_of(self.regions),
                cache=cache,
                batch=batch,
                on_bad_image=self.on_bad_image,
            )

    def _written(self, done: Encoded) -> Encoded:
        write_parquet(self.place, done.table)
        if self.update_regions:
            write_parquet(self.regions, merge_prompts(open_table(self.regions).read(), done.table))
        return done

    def summary(self, done: Encoded) -> str:
        """The lines to print at the end."""
        lines = [
            f"prompts {self.place}: {done.encoded} regions encoded, {done.cached} as they were, {done.skipped} skipped"
        ]
        lines += [f"updated {self.regions}"] if self.update_regions else []
        return "\n".join(lines)

    def exit_code(self, done: Encoded) -> int:
        """Done, or done in part where regions were skipped."""
        return int(Exit.PARTIAL if done.skipped else Exit.DONE)

    def facts(self, done: Encoded) -> dict[str, Any]:
        """The same for machines."""
        counts = {"encoded": done.encoded, "cached": done.cached, "skipped": done.skipped}
        return {"event": "encoded", "file": str(self.place), **counts}


def open_cache(path: Path) -> Cache:
    """A cache, and its folder where that is absent.

    Raises:
        CannotCreate: If this user may not write there.
    """
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise CannotCreate(
            f"no cache can be kept here ({error.strerror})",
            file=path,
            fix="let this user write there, or go without: --no-cache",
        ) from error
    return Cache(path)
