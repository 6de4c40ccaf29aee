"""Prompt vectors of a whole city: images and texts in, a table out, through a cache that makes every run resumable."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from topt_deploy.errors import BadData, UsageError

from .cache import Cache, content_key
from .encoder_spec import EncoderSpec
from .families.registry import TEXT
from .images import Picture, open_image
from .pooling import Backend, WholeReader, pooled
from .prompt import Array, Family, Prompt
from .table import IMAGES, PromptRegions, prompt_table
from .templates import Templates

FAIL, SKIP = "fail", "skip"
BATCH_TOKENS = 8192
"""Regions share a batch up to this many tokens, fillers included: a region with many images has one of its own."""

CONTEXT, CHARACTERS_PER_TOKEN = 1 << 17, 32
"""Tokens of one region where a bundle does not say what its model reads, and characters of the longest token."""
REGION_PIXELS = 256_000_000
"""Of all images of one region together: they are held at once, three bytes a pixel."""

Progress = Callable[[int, int], None]
"""Told how many regions are done, and of how many."""


class Encoder(Protocol):
    """A model that is ready to run."""

    @property
    def spec(self) -> EncoderSpec:
        """The encoder's description."""

    @property
    def precision(self) -> str:
        """The precision of the computation."""

    @property
    def runtime(self) -> str:
        """The name of the runtime: vectors of one runtime are not used for another."""

    @property
    def sha256(self) -> str:
        """Of what its vectors depend on besides the weights: configuration and tokenizer, or exported graphs."""

    def prompt(self, text: str, images: Sequence[Array], questions: Sequence[str]) -> Any:
        """One region's input (:class:`.prompt.Family`)."""

    def vectors(self, prompts: Sequence[Any]) -> Array:
        """Prompt vectors, float32 (B, T, H), of B inputs with the same T tasks."""


def _too_long(found: str, limit: int) -> BadData:
    return BadData(
        "text and images are longer than the language model reads", expected=f"at most {limit:,} tokens", found=found,
        fix="shorten the text, or name fewer images",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledEncoder:
    """An :class:`Encoder` of networks that share the tasks' common beginning (:func:`.pooling.pooled`)."""

    spec: EncoderSpec
    precision: str
    runtime: str
    sha256: str
    host: Family
    backend: Backend | WholeReader

    def prompt(self, text: str, images: Sequence[Array], questions: Sequence[str]) -> Prompt:
        """One region's input.

        Raises:
            BadData: If it is longer than the model was made for: what lies beyond would be read as noise.
        """
        limit = self.spec.context or CONTEXT
        if len(text) > limit * CHARACTERS_PER_TOKEN:
            raise _too_long(f"a text of {len(text):,} characters", limit)
        prompt = self.host.prompt(text, images, questions)
        longest = max(len(sequence.ids) for sequence in prompt.sequences)
        if longest > limit:
            raise _too_long(f"{longest:,}", limit)
        return prompt

    def vectors(self, prompts: Sequence[Prompt]) -> Array:
        """Prompt vectors, float32 (B, T, H), of B inputs."""
        return np.concatenate([pooled(self.backend, together) for together in _batches(prompts)])


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts in order, as many at a time as may run together."""
    batch: list[Prompt] = []
    for prompt in prompts:
        alone = any(p.sequences[0].visible is not None for p in (*batch, prompt))
        lengths = [len(sequence.ids) for p in (*batch, prompt) for sequence in p.sequences]
        # What is longer than the shortest region is read once for every task (backend.pooled).
        row = max(lengths) + (len(prompt.sequences) - 1) * (max(lengths) - min(lengths))
        if batch and (alone or row * (len(batch) + 1) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


def limit_pixels(spec: EncoderSpec, max_pixels: int) -> EncoderSpec:
    """The encoder with images resized to fewer pixels: another encoder, and named so.

    Raises:
        UsageError: If the family has no such limit.
    """
    if "max_pixels" not in spec.settings:
        raise UsageError(
            f"{spec.name} cuts images into tiles of its own size, or reads none",
            expected="--max-pixels with a Qwen2.5-VL model",
        )
    settings = {**spec.settings, "max_pixels": max_pixels}
    return replace(spec, name=f"{spec.name} max_pixels={max_pixels}", settings=settings)


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """The result of :func:`encode`.

    Attributes:
        table: Of :func:`.table.prompt_table`.
        encoded, cached, skipped: How many regions were computed at least in part, found in the cache, left out.
    """

    table: pa.Table
    encoded: int
    cached: int
    skipped: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Waiting:
    """A region to be computed: its row, its input, and the cache keys of the tasks, by column, that it lacks."""

    row: int
    prompt: Any
    keys: dict[int, str]


def encode(
    regions: PromptRegions,
    encoder: Encoder,
    templates: Templates,
    tasks: Sequence[str],
    *,
    root: Path | None,
    cache: Cache | None = None,
    batch: int = 1,
    on_bad_image: str = FAIL,
    progress: Progress = lambda done, total: None,
    share: tuple[int, int] = (0, 1),
) -> Encoded:
    """Encode every region for every task.

    Regions are computed together within blocks of ``batch`` rows of the table, whatever of them is in the cache: so
    vectors come out of the same batches in one process as in several.

    Args:
        regions: Whose texts and images.
        encoder: The model.
        templates: Of the questions.
        tasks: T tasks of ``templates``.
        root: The folder that images lie below; None where there is none, and none may be named.
        cache: Vectors that need not be computed; what is computed goes there at once.
        batch: How many regions to compute at once.
        on_bad_image: :data:`SKIP` leaves a region with an unreadable image out as a whole, and says why: a vector of
            the remaining images would look like any other and mean something else.
        progress: Called after each region.
        share: k, n: encode every n-th block of rows from the k-th on, and leave the others' vectors null.

    Raises:
        BadData: If an image or a text cannot be encoded; naming region and file.
        UsageError: If there is no template for a task.
    """
    _check_reads_images(encoder, regions)
    part, parts = share
    own = [row for row in range(len(regions)) if row // batch % parts == part]
    work = _Encoding(
        regions, encoder, [templates.question(task) for task in tasks], root=root, cache=cache,
        skip_bad_images=on_bad_image == SKIP, progress=lambda done: progress(done, len(own)),
    )  # fmt: skip
    for _, block in groupby(own, lambda row: row // batch):
        together: list[_Waiting] = []
        for row in block:
            one = work.look_up(row)
            if one is None:
                continue
            if together and together[0].keys.keys() != one.keys.keys():
                work.compute(together)
                together = []
            together.append(one)
        work.compute(together)
    table = prompt_table(
        regions,
        {task: work.vectors[:, column] for column, task in enumerate(tasks)},
        reasons=work.reasons,
        encoder=encoder.spec.identity,
        precision=encoder.precision,
        templates={task: templates.sha256(task) for task in tasks},
    )
    return Encoded(table=table, encoded=work.encoded, cached=work.cached, skipped=work.skipped)


def _check_reads_images(encoder: Encoder, regions: PromptRegions) -> None:
    if encoder.spec.family == TEXT and any(regions.images):
        raise BadData(
            f"{encoder.spec.name} reads no images",
            column=IMAGES,
            ids=[region for region, names in zip(regions.region_id, regions.images, strict=True) if names],
            fix="take a vision-language model, or drop this column to encode texts alone",
        )


class _Encoding:
    """A city on its way: what is known of its regions, and what is still to be computed.

    Args:
        regions, encoder: Of :func:`encode`.
        questions: One per task.
        root, cache: Of :func:`encode`.
        skip_bad_images: Whether regions with unreadable images are left out.
        progress: Called with the number of regions that are done.

    Attributes:
        vectors: float32 (N, T, H), NaN where there is none.
        reasons: Per region, why it has none.
        encoded, cached, skipped: How many regions were computed at least in part, found in the cache, left out.
    """

    def __init__(
        self,
        regions: PromptRegions,
        encoder: Encoder,
        questions: Sequence[str],
        *,
        root: Path | None,
        cache: Cache | None,
        skip_bad_images: bool,
        progress: Callable[[int], None],
    ) -> None:
        self._regions, self._encoder, self._questions = regions, encoder, questions
        self._root, self._cache, self._skip, self._progress = root, cache, skip_bad_images, progress
        self._itself = _facts(encoder)
        self.vectors = np.full((len(regions), len(questions), encoder.spec.width), np.nan, np.float32)
        self.reasons: list[str | None] = ["another process's share"] * len(regions)
        self.encoded = self.cached = self.skipped = 0

    def look_up(self, row: int) -> _Waiting | None:
        """Take a region's vectors from the cache; its input for those that are not there, or None if none is needed.

        Raises:
            BadData: If an image or a text cannot be encoded.
        """
        region, text, questions = str(self._regions.region_id[row]), self._regions.texts[row], self._questions
        self.reasons[row] = None
        try:
            pictures = _pictures(self._root, self._regions.images[row])
            hashes = [picture.sha256 for picture in pictures]
            keys = [content_key(encoder=self._itself, text=text, question=q, images=hashes) for q in questions]
            known = self._cache.get(keys, width=self._encoder.spec.width) if self._cache is not None else {}
            lacking = {column: key for column, key in enumerate(keys) if key not in known}
            asked = [questions[column] for column in lacking]
            prompt = _prompt(self._encoder, region, text, pictures, asked) if lacking else None
        except _BadImage as bad:
            if not self._skip:
                more = "; or leave such regions out with --on-bad-image skip"
                fix = (bad.error.fix or "mend or remove it") + more
                raise _of(bad.error, region, file=bad.error.file or bad.name, fix=fix) from bad.error
            self.reasons[row] = f"{bad.name}: {bad.error.message}"
            self.skipped += 1
            self._finish()
            return None
        for column, key in enumerate(keys):
            if key in known:
                self.vectors[row, column] = known[key]
        if prompt is None:
            self.cached += 1
            self._finish()
            return None
        return _Waiting(row=row, prompt=prompt, keys=lacking)

    def compute(self, together: Sequence[_Waiting]) -> None:
        """Compute the vectors of regions that lack the same tasks'; they go into the cache at once.

        Raises:
            BadData: If a vector is of no use.
        """
        if not together:
            return
        columns = list(together[0].keys)
        found = self._encoder.vectors([one.prompt for one in together])
        useless = [
            self._regions.region_id[one.row]
            for one, values in zip(together, found, strict=True)
            if not (np.isfinite(values).all() and values.any(axis=1).all())
        ]
        if useless:  # told now, not after the last region
            raise BadData(
                f"the encoder gave no usable vector at precision {self._encoder.precision}",
                ids=useless,
                expected="finite numbers, not all 0",
                fix="encode in a higher precision",
            )
        fresh: dict[str, Array] = {}
        for one, values in zip(together, found, strict=True):
            self.vectors[one.row, columns] = values
            fresh |= dict(zip(one.keys.values(), values, strict=True))
        if self._cache is not None:
            self._cache.put(fresh)
        self.encoded += len(together)
        self._finish()

    def _finish(self) -> None:
        self._progress(self.encoded + self.cached + self.skipped)


def _facts(encoder: Encoder) -> str:
    """The hash of everything of the encoder that its vectors depend on; its name is none of it."""
    spec = encoder.spec
    return content_key(
        weights=spec.weights_sha256,
        sha256=encoder.sha256,
        family=spec.family,
        settings=dict(spec.settings),
        chat=dict(spec.chat),
        imageless=spec.imageless and dict(spec.imageless),
        precision=encoder.precision,
        runtime=encoder.runtime,
    )


class _BadImage(Exception):
    """An image that cannot be encoded, by the table's name for it."""

    def __init__(self, name: str, error: BadData) -> None:
        super().__init__(name)
        self.name, self.error = name, error


def _pictures(root: Path | None, names: Sequence[str]) -> list[Picture]:
    """A region's images."""
    pictures: list[Picture] = []
    pixels = 0
    for name in names:
        if root is None:
            raise BadData(
                "a table in memory names images, and has no folder that they may lie in", column=IMAGES, found=name,
                fix="give the table as a file: its folder is where images are read from",
            )  # fmt: skip
        try:
            pictures.append(open_image(root, name))
            pixels += pictures[-1].pixels.shape[0] * pictures[-1].pixels.shape[1]
            if pixels > REGION_PIXELS:
                raise BadData(
                    "the region's images have too many pixels together", expected=f"at most {REGION_PIXELS:,}",
                    found=f"{pixels:,} in {len(pictures)} of {len(names)} images", fix="name fewer, or scale them down",
                )  # fmt: skip
        except BadData as error:
            raise _BadImage(name, error) from error
    return pictures


def _prompt(encoder: Encoder, region: str, text: str, pictures: Sequence[Picture], questions: Sequence[str]) -> Any:
    """A region's input; where it has none, an error that says which image's or text's fault it is."""
    try:
        return encoder.prompt(text, [picture.pixels for picture in pictures], questions)
    except BadData as error:
        for picture in pictures:
            try:
                encoder.prompt("", [picture.pixels], [""])
            except BadData as its:
                raise _BadImage(picture.name, its) from its
        raise _of(error, region) from error


def _of(error: BadData, region: str, *, file: object = None, fix: str | None = None) -> BadData:
    """The error, with the region that it is about."""
    return BadData(
        error.message,
        file=file or error.file,
        column=error.column,
        ids=[region],
        expected=error.expected,
        found=error.found,
        fix=fix or error.fix,
    )
