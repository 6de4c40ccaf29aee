"""A city whose model was trained with a tiny text model's prompts, exported with that as its prompt encoder."""

import shutil
from pathlib import Path

from builders import tiny_city_tables
from click.testing import CliRunner

from topt_deploy.bundle.encoder_manifest import open_encoder_bundle
from topt_deploy.cli import cli
from topt_deploy.data.parquet import read_parquet, write_parquet
from topt_deploy.export.city_bundle import export_bundle
from topt_deploy.run_folder import newest_run

TASKS = ("crime", "check_in")
SETTINGS = """\
preset = "srel"

[srel]
width = 16
ffn_width = 24
layers = 1
epochs = 10

[prompt4re]
epochs = 10
lr = 5e-2 # so that what the prompts add is not too small to be tested
folds = 3

[tasks.crime]
[tasks.check_in]
"""


def make_prompted_city(folder: Path, model: Path, encoder: Path) -> None:
    """Encode and train a city, and export it with its encoder inside and beside.

    Args:
        folder: To be made.
        model: The language model.
        encoder: The same, exported.
    """
    folder.mkdir()
    regions, mobility = tiny_city_tables(20, tasks=TASKS)
    write_parquet(folder / "bare.parquet", regions)
    write_parquet(folder / "regions.parquet", regions)
    write_parquet(folder / "mobility.parquet", mobility)
    (folder / "topt.toml").write_text(SETTINGS)
    tasks = [argument for task in TASKS for argument in ("--task", task)]
    _call("encode", folder, "--model", model, "--update-regions", "--no-cache", *tasks)
    assert "prompt_crime" in read_parquet(folder / "regions.parquet").column_names
    _call("train", folder)
    shutil.copytree(encoder, folder / "encoder.topt")
    shutil.copytree(encoder, folder / "moved.topt")
    run = newest_run(folder, finished=True)
    for name, place, inside in (("model.topt", "moved.topt", True), ("beside.topt", "encoder.topt", False)):
        opened = open_encoder_bundle(folder / place)
        export_bundle(run, folder / name, say=lambda _: None, encoder=opened, inside=inside)
    assert not (folder / "moved.topt").exists(), "it is moved into the bundle, not copied"


def _call(*arguments: object) -> None:
    CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False, standalone_mode=False)
