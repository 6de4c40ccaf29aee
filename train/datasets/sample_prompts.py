"""Prompt vectors of the demo city by a real language model, shipped: scripts/demo_prompts.py computes them once.

A vector is found by the hash of its region's text and of the questions, so it is never taken for another text's.
A number is stored in one byte, on a scale of its task's and direction's own over the regions: regions differ little
beside what they have in common, and one scale per vector would round the differences away
(docs/background/encoder-figures.md).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from topt_deploy.prompts.cache import content_key

Array = np.ndarray[Any, Any]

FILE = "sample_prompts.npz"
LEVELS = 127


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """Prompt vectors of a city.

    Attributes:
        encoder: The encoder that made them.
        vectors: float32 (N, H) by task.
        fields: The metadata of each task's column.
    """

    encoder: str
    vectors: Mapping[str, Array]
    fields: Mapping[str, Mapping[str, str]]


def shipped_prompts(texts: Sequence[str], templates: Mapping[str, str]) -> Prompts | None:
    """The shipped vectors of these texts; None where not every text is among them.

    Args:
        texts: The regions' geo-texts (N).
        templates: By task, the hash of its template.
    """
    with (resources.files(__package__) / FILE).open("rb") as file, np.load(file) as stored:
        facts = json.loads(stored["facts"].item())
        rows = {key: row for row, key in enumerate(stored["keys"].tolist())}
        keys = _keys(texts, templates)
        if not rows.keys() >= set(keys):
            return None
        codes = stored["codes"][:, [rows[key] for key in keys]]  # (T, N, H)
        vectors = stored["offset"][:, None] + stored["scale"][:, None] * codes.astype(np.float32)
    return Prompts(
        encoder=facts["encoder"],
        vectors=dict(zip(facts["tasks"], vectors, strict=True)),
        fields={
            task: {"encoder": facts["encoder"], "template": templates[task], "precision": facts["precision"]}
            for task in facts["tasks"]
        },
    )


def store_prompts(
    path: Path,
    texts: Sequence[str],
    templates: Mapping[str, str],
    vectors: Mapping[str, Array],
    *,
    encoder: str,
    precision: str,
) -> None:
    """Write the file that :func:`shipped_prompts` reads.

    Args:
        texts, templates: As there.
        vectors: float32 (N, H) by task, in the order of ``templates``.
        encoder, precision: The encoder and precision of the vectors.
    """
    stacked = np.stack([vectors[task] for task in templates])  # (T, N, H)
    low, high = stacked.min(axis=1), stacked.max(axis=1)
    offset, scale = (high + low) / 2, np.maximum((high - low) / (2 * LEVELS), np.finfo(np.float32).tiny)
    np.savez_compressed(
        path,
        facts=json.dumps({"encoder": encoder, "precision": precision, "tasks": list(templates)}),
        keys=_keys(texts, templates),
        offset=offset,
        scale=scale,
        codes=np.rint((stacked - offset[:, None]) / scale[:, None]).astype(np.int8),
    )


def _keys(texts: Sequence[str], templates: Mapping[str, str]) -> list[str]:
    return [content_key(text=text, templates=dict(templates)) for text in texts]
