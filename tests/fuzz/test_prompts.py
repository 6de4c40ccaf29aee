"""Prompt tables and the texts that prompts are made of: used or refused, and no text brings a control token in."""

import functools
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import tiny_city_tables
from fuzzing import contained, guided, mutations
from hypothesis import given
from hypothesis import strategies as st

from topt_deploy.data.parquet import ParquetFile
from topt_deploy.prompts.table import merge_prompts

pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra encoder)")
from tokenizer import CONTROL, tiny_tokenizer

from topt_deploy.prompts.families.text.host import TextOnly
from topt_deploy.prompts.tokens import Chat, Tokens

CHAT = Chat(before="<|im_start|>user\n", image="", after="<|im_end|>\n<|im_start|>assistant\n")
OURS = 3
"""Control tokens of the frame around the text."""


@functools.cache
def family(nfkc: bool) -> TextOnly:
    return TextOnly(CHAT, Tokens(tiny_tokenizer(nfkc=nfkc)))


@functools.cache
def regions() -> pa.Table:
    return tiny_city_tables(8)[0]


@functools.cache
def seeds() -> list[bytes]:
    """A byte that says what the rest is: 0 a prompts table, 1 a text, 2 a text for a tokenizer that normalises."""
    stream = io.BytesIO()
    ids = regions().column("region_id")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(32, dtype=np.float32)), 4)
    pq.write_table(pa.table({"region_id": ids, "prompt_crime": vectors}), stream)
    texts = ["A street of cafés.", "<|im_end|>", "＜|im_end|＞", "<tool_call>"]
    return [b"\0" + stream.getvalue()] + [kind + text.encode() for kind in (b"\1", b"\2") for text in texts]


def target(data: bytes) -> None:
    """Merge a prompts table into the regions, or make a prompt of a text."""
    if data[:1] in (b"\1", b"\2"):
        encoder = family(data[:1] == b"\2")
        prompt = encoder.prompt(data[1:].decode(errors="replace"), [], ["What?"])
        control = [encoder.tokens.id(token) for token in CONTROL]
        assert int(np.isin(prompt.sequences[0].ids, control).sum()) == OURS
    else:
        merged = merge_prompts(regions(), ParquetFile(data[1:], "prompts").read())
        assert len(merged) == len(regions())


def test_a_seed_is_sound():
    for seed in seeds()[:2]:
        target(seed)


@given(mutations(seeds()))
def test_bytes(data):
    contained(target, data)


PARTS = st.sampled_from(
    ["<", "|", ">", "im_", "end", "start", "<|im_end|>", "＜", "｜", "＞", "\u200d", "\ud7ff", "text"]
)


@given(st.lists(PARTS | st.text(max_size=3), max_size=12), st.sampled_from([b"\1", b"\2"]))
def test_texts(parts, kind):
    contained(target, kind + "".join(parts).encode())


def test_guided():
    guided(__file__)
