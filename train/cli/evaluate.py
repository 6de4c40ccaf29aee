"""``topt-deploy evaluate``."""

from pathlib import Path

import click

from topt_deploy.config.load import load_config
from topt_deploy.config.settings import CONFIG_FILE
from topt_deploy.errors import UsageError

PROTOCOLS = ("honest", "spatial", "paper")
"""Those of :mod:`.protocols`, by name: help must not import PyTorch."""
FIRST_SEED = 2024
"""The published folds' seed. The default preset was designed on folds of seeds 0 to 2 (dev/LOG.md), never on these."""


@click.command("evaluate")
@click.argument("city", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--protocol", type=click.Choice(PROTOCOLS), default="honest", show_default=True, help="How labels are held out."
)
@click.option("--tasks", default="", metavar="A,B", help="Label columns [default: the settings' tasks].")
@click.option("--variants", default="variant", metavar="A,B", help="Forms of ToPT, or none [default: all].")
@click.option("--baselines", default="literature,plain", metavar="A,B", help="Baselines, or none [default: all].")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How often folds are drawn.")
@click.option(
    "--coverage",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Also measure how often intervals of this coverage hold; costs each method twice the time or more.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="The same as for topt-deploy train.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
def evaluate(
    city: Path,
    protocol: str,
    tasks: str,
    variants: str,
    baselines: str,
    seeds: int,
    coverage: float | None,
    device: str,
    out: Path,
) -> None:
    """Evaluate ToPT, its variants and baselines on CITY, on regions whose labels were held out.

    Lists are separated by commas; a name may be a pattern such as 'boosting*', or a whole group: variant, literature,
    plain. The same command again goes on where it stopped, and other methods or tasks add to the same folder.
    """
    if protocol == "paper" and coverage is not None:
        raise UsageError("--coverage has no meaning under `paper`", fix="measure it under honest or spatial")

    import torch

    from ..evaluation.evaluate import evaluate_city
    from ..evaluation.registry import choose
    from ..loop import TrainingDevice
    from ..progress import Reporter
    from ..settle import settle

    torch.set_num_threads(1)
    methods = choose(_names(variants), ["variant"], "--variants")
    methods += choose(_names(baselines), ["literature", "plain"], "--baselines")
    file = city / CONFIG_FILE
    config = load_config(file=file if file.exists() else None, tasks=_names(tasks))
    place = file if file.exists() else None
    config, said = settle(config, city / "regions.parquet", city / "mobility.parquet", file=place)
    reporter = Reporter()
    for sentence in said:
        reporter.say(sentence)
    page = evaluate_city(
        city,
        config,
        methods,
        protocol=protocol,
        seeds=range(FIRST_SEED, FIRST_SEED + seeds),
        nominal=coverage,
        engine=TrainingDevice.choose(device, None, None),
        reporter=reporter,
        out=out,
    )
    click.echo(page)
    click.echo(f"results  {out}")


def _names(listed: str) -> list[str]:
    """The names of a list; ``none`` stands for none."""
    return [name for part in listed.split(",") if (name := part.strip()) not in ("", "none")]
