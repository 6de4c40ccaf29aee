"""Parquet files that were changed or made up: a city is read, or its table refused."""

import functools
import io
from pathlib import Path

import pyarrow.parquet as pq
from builders import tiny_city_tables
from fuzzing import contained, guided, mutations, scratch
from hypothesis import given

from topt_deploy.data.city import infer_schema, read_city
from topt_deploy.data.parquet import ParquetFile

ASPECTS = {"compression": ["snappy", "none"], "data_page_version": ["1.0", "2.0"], "use_dictionary": [True, False]}


@functools.cache
def city():
    """Regions, mobility and their schema."""
    regions, mobility = tiny_city_tables(8, prompts=["prompt_crime"], prompt_width=4, lists=True)
    schema = infer_schema(regions, views=["poi", "land_use"], mobility=True, prompts=["prompt_crime"])
    return regions, mobility, schema


@functools.cache
def file() -> Path:
    return scratch() / "regions.parquet"


@functools.cache
def seeds() -> list[bytes]:
    """Without checksums, which would catch most changes before they do anything."""
    made = []
    for number in range(2):
        stream = io.BytesIO()
        pq.write_table(city()[0], stream, **{aspect: values[number] for aspect, values in ASPECTS.items()})
        made.append(stream.getvalue())
    return made


def target(data: bytes) -> None:
    """Read the bytes as the regions, and again as the flows."""
    regions, mobility, schema = city()
    ParquetFile(data, "bytes").read()
    file().write_bytes(data)
    read_city(file(), mobility, schema, labels=["crime"])
    read_city(regions, file(), schema)


def test_a_seed_is_sound():
    regions, mobility, schema = city()
    for seed in seeds():
        file().write_bytes(seed)
        assert len(read_city(file(), mobility, schema, labels=["crime"])) == len(regions)


@given(mutations(seeds()))
def test_bytes(data):
    contained(target, data)


def test_guided():
    guided(__file__)
