"""What a city does not have is left out where nobody asked for it, and said; what was asked for stays."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from builders import tiny_city_tables

from topt_deploy.config.load import load_config
from topt_deploy.train.settle import settle


@pytest.fixture
def city(tmp_path: Path) -> Path:
    regions, mobility = tiny_city_tables(prompts=("prompt_crime",))
    pq.write_table(regions, tmp_path / "regions.parquet")
    pq.write_table(mobility, tmp_path / "mobility.parquet")
    return tmp_path


def drop(city: Path, *prefixes: str) -> None:
    table = pq.read_table(city / "regions.parquet")
    pq.write_table(
        table.drop_columns([c for c in table.column_names if c.startswith(prefixes)]), city / "regions.parquet"
    )


def settled(city: Path, text: str = "[tasks.crime]\n", overrides: tuple[str, ...] = ()):
    file = city / "topt.toml"
    file.write_text(text)
    config = load_config(file=file, overrides=overrides)
    return settle(config, city / "regions.parquet", city / "mobility.parquet", file=file, overrides=overrides)


def test_a_city_with_everything_keeps_its_settings(city: Path) -> None:
    config, said = settled(city)
    assert said == []
    assert (config.views, config.mobility, config.prompt_columns()) == (("poi", "land_use"), True, ("prompt_crime",))


def test_what_is_not_there_is_left_out_and_said(city: Path) -> None:
    drop(city, "land_use_", "prompt_")
    (city / "mobility.parquet").unlink()
    config, said = settled(city)
    assert (config.views, config.mobility, config.prompt_columns()) == (("poi",), False, ())
    assert said == [
        "regions.parquet has no land_use: trained without",
        "there is no mobility.parquet: trained without flows",
        "regions.parquet has no prompts: trained without (topt-deploy encode makes them)",
    ]


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ('views = ["poi", "land_use"]\nmobility = true\n[prompt4re]\nprompt = "task"\n[tasks.crime]\n', ()),
        ("[tasks.crime]\n", ('views=["poi", "land_use"]', "mobility=true", "prompt4re.enabled=true")),
    ],
)
def test_what_was_asked_for_stays(city: Path, text: str, overrides: tuple[str, ...]) -> None:
    drop(city, "land_use_", "prompt_")
    (city / "mobility.parquet").unlink()
    config, said = settled(city, text, overrides)
    assert said == []
    assert (config.views, config.mobility, config.prompt_columns()) == (("poi", "land_use"), True, ("prompt_crime",))


def test_a_task_whose_prompts_alone_are_absent_is_an_error_still(city: Path) -> None:
    config, said = settled(city, "[tasks.crime]\n[tasks.calls]\n")
    assert said == []
    assert config.prompt_columns() == ("prompt_crime", "prompt_calls")
