"""``topt-deploy evaluate``."""

from pathlib import Path

import click

from topt_deploy.config.load import load_config
from topt_deploy.config.settings import CONFIG_FILE
from topt_deploy.errors import UsageError

PROTOCOLS = ("honest", "spatial", "transfer", "paper")
"""Those of :mod:`.protocols`, by name: help must not import PyTorch."""
FIRST_SEED = 2024
"""The published folds' seed. The default preset was designed on folds of seeds 0 to 2 (dev/LOG.md), never on these."""


@click.command("evaluate")
@click.argument("cities", metavar="CITY...", nargs=-1, required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--protocol", type=click.Choice(PROTOCOLS), default="honest", show_default=True, help="How labels are held out."
)
@click.option("--config", "file", type=click.Path(path_type=Path), help=f"TOML settings [default: CITY/{CONFIG_FILE}].")
@click.option("--tasks", default="", metavar="A,B", help="Label columns [default: the settings' tasks].")
@click.option("--variants", metavar="A,B", help="Forms of ToPT, or none [default: all; with --search: paper].")
@click.option("--baselines", metavar="A,B", help="Baselines, or none [default: all; with --search: none].")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How often folds are drawn.")
@click.option(
    "--labels",
    "few",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of `transfer`: so many labelled regions of the held-out city join the training.",
)
@click.option(
    "--search",
    "trials",
    type=click.IntRange(1),
    metavar="K",
    help="Of `paper`: take the settings of the best of K random trials by the held-out labels, as published.",
)
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, help="Of --search: runs of the best trial."
)
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
    cities: tuple[Path, ...],
    protocol: str,
    file: Path | None,
    tasks: str,
    variants: str | None,
    baselines: str | None,
    seeds: int,
    few: int,
    trials: int | None,
    runs: int,
    coverage: float | None,
    device: str,
    out: Path,
) -> None:
    """Evaluate ToPT, its variants and baselines on CITY, on regions whose labels were held out. The protocol `transfer`
    takes several cities and holds whole ones out.

    Lists are separated by commas; a name may be a pattern such as 'boosting*', or a whole group: variant, literature,
    plain. The same command again goes on where it stopped, and other methods or tasks add to the same folder.
    """
    _refuse(protocol, cities=len(cities), few=few, coverage=coverage, trials=trials)
    if trials:
        variants, baselines = variants or "paper", baselines or "none"

    import torch

    from ..evaluation.evaluate import evaluate_cities, read_problem
    from ..evaluation.published_search import search
    from ..evaluation.registry import METHODS, choose
    from ..loop import TrainingDevice
    from ..progress import Reporter
    from ..settle import common_file, settle_cities

    torch.set_num_threads(1)
    methods = choose(_names(variants or "variant"), ["variant"], "--variants")
    methods += choose(_names(baselines or "literature,plain"), ["literature", "plain"], "--baselines")
    ordered = sorted(cities, key=lambda city: city.resolve().name)
    file = file or common_file(ordered)
    config = load_config(file=file, tasks=_names(tasks))
    config, said = settle_cities(config, ordered, file=file)
    reporter = Reporter()
    for sentence in said:
        reporter.say(sentence)
    engine = TrainingDevice.choose(device, None, None)
    if trials:
        read = read_problem(ordered, config, engine, reporter)
        chosen = {name: METHODS[name].make() for name in methods}
        page = search(*read, chosen, trials=trials, seeds=range(FIRST_SEED, FIRST_SEED + runs), out=out)
    else:
        page = evaluate_cities(
            ordered,
            config,
            methods,
            protocol=protocol,
            seeds=range(FIRST_SEED, FIRST_SEED + seeds),
            nominal=coverage,
            engine=engine,
            reporter=reporter,
            out=out,
            few=few,
        )
    click.echo(page)
    click.echo(f"results  {out}")


def _names(listed: str) -> list[str]:
    """The names of a list; ``none`` stands for none."""
    return [name for part in listed.split(",") if (name := part.strip()) not in ("", "none")]


def _refuse(protocol: str, *, cities: int, few: int, coverage: float | None, trials: int | None) -> None:
    """Raise UsageError for options that have no meaning under the protocol."""
    if protocol in ("paper", "transfer") and coverage is not None:
        raise UsageError(f"--coverage has no meaning under `{protocol}`", fix="measure it under honest or spatial")
    if (protocol == "transfer") != (cities > 1):
        raise UsageError(
            "`transfer` holds whole cities out, and the other protocols regions of one city",
            expected="several cities under transfer, or one city", found=f"{cities} under {protocol}",
        )  # fmt: skip
    if few and protocol != "transfer":
        raise UsageError("--labels has a meaning under `transfer` alone", fix="leave it out")
    if trials and protocol != "paper":
        raise UsageError(
            "--search chooses settings by the held-out labels, which no protocol but `paper` does",
            expected="--protocol paper", found=f"--protocol {protocol}",
        )  # fmt: skip
