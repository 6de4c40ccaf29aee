"""Settings that fit what a city has: what nobody asked for and is not there is left out, and said."""

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from topt_deploy.config.settings import CONFIG_FILE, Config
from topt_deploy.data.columns import PROMPT_PREFIX
from topt_deploy.data.parquet_parts import open_table
from topt_deploy.errors import BadConfig
from topt_deploy.storage.os_errors import reading

from .datasets.city_files import MOBILITY, REGIONS


def settle(
    config: Config, regions: Path, mobility: Path, *, file: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[Config, list[str]]:
    """Leave out what the settings read by default alone, and the city does not have.

    What the settings' file or ``--set`` names is wanted, and its absence stays an error, told by the reader.

    Args:
        config: The settings.
        regions, mobility: The city's tables; the second may be absent.
        file: The TOML file that the settings come from.
        overrides: ``KEY=VALUE`` settings.

    Returns:
        The settings, and a sentence for everything that was left out.
    """
    asked = {override.partition("=")[0] for override in overrides}
    if file is not None:
        with reading(file):
            asked |= set(tomllib.loads(file.read_text(encoding="utf-8")))
    columns = open_table(regions).names
    said: list[str] = []
    there = [view for view in config.views if any(c == view or c.startswith(f"{view}_") for c in columns)]
    if "views" not in asked and there and len(there) < len(config.views):
        absent = [view for view in config.views if view not in there]
        said.append(f"{regions.name} has no {' and no '.join(absent)}: trained without")
        config = replace(config, views=tuple(there))
    if config.mobility and "mobility" not in asked and not mobility.exists():
        said.append(f"there is no {mobility.name}: trained without flows")
        config = replace(config, mobility=False)
    wanted = config.prompt_columns()
    named = any(key == "prompt4re" or key.startswith("prompt4re.") for key in asked)
    if wanted and not named and not any(column.startswith(PROMPT_PREFIX) for column in columns):
        said.append(f"{regions.name} has no prompts: trained without (topt-deploy encode makes them)")
        tasks = {
            name: replace(task, prompt4re=replace(task.prompt4re, enabled=False)) for name, task in config.tasks.items()
        }
        config = replace(config, tasks=tasks)
    return config, said


def settle_cities(
    config: Config, cities: Sequence[Path], *, file: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[Config, list[str]]:
    """:func:`settle` for the cities of these folders: what one of them does not have is left out for all."""
    said: list[str] = []
    for city in cities:
        tables = city / REGIONS, city / MOBILITY
        config, more = settle(config, *tables, file=file, overrides=overrides)
        said += more if len(cities) == 1 else [f"{city.resolve().name}: {sentence}" for sentence in more]
    return config, said


def common_file(cities: Sequence[Path]) -> Path | None:
    """The settings' file that the cities have, if any.

    Raises:
        BadConfig: If their files differ.
    """
    files = [city / CONFIG_FILE for city in cities if (city / CONFIG_FILE).exists()]
    for other in files[1:]:
        if other.read_bytes() != files[0].read_bytes():
            raise BadConfig(
                "the cities' settings differ", file=other, expected=f"what {files[0]} holds",
                fix="name one file for all of them with --config",
            )  # fmt: skip
    return files[0] if files else None
