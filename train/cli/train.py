"""``topt-deploy train``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from topt_deploy.config.load import presets
from topt_deploy.config.settings import CONFIG_FILE
from topt_deploy.console import decimal
from topt_deploy.run_folder import RUNS_DIR, open_run

if TYPE_CHECKING:
    from ..metrics import TaskReport


@click.command("train")
@click.argument("cities", metavar="[CITY]...", nargs=-1, type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Run folder [default: CITY/runs/<time>].")
@click.option("--preset", type=click.Choice(presets()), help="Settings to start from [default: the file's].")
@click.option("--config", "file", type=click.Path(path_type=Path), help=f"TOML settings [default: CITY/{CONFIG_FILE}].")
@click.option("--task", "tasks", multiple=True, help="Train this task only (repeatable).")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting.")
@click.option("--seed", type=int, help="Seed of the run [default: the settings'].")
@click.option("--resume", is_flag=True, help="Continue --out, or the newest unfinished run.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="The command fails if the device is missing.",
)
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16"]), help="[default: fp32; tf32 on CUDA]")
@click.option("--compile/--no-compile", "compile_", default=None, help="Compile the steps [default: on CUDA].")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: 1 up to 500 regions].")
def train(
    cities: tuple[Path, ...],
    out: Path | None,
    preset: str | None,
    file: Path | None,
    tasks: tuple[str, ...],
    overrides: tuple[str, ...],
    seed: int | None,
    resume: bool,
    device: str,
    precision: str | None,
    compile_: bool | None,
    threads: int | None,
) -> None:
    """Train SREL and Prompt4RE on CITY, a folder with regions.parquet and mobility.parquet, beside Gaussian processes
    and networks that share the prediction with them. CITY is this folder by default. Several cities with the same
    categories train one model, which also predicts cities without a single label; they need --out.

    Regions whose label is null are the ones to predict. At the end, held-out figures say what to expect there.
    """
    from ..trained_run import train_cities

    done = train_cities(
        cities or (Path(),), out=out, preset=preset, config=file, tasks=tasks, overrides=overrides, seed=seed,
        resume=resume, device=device, precision=precision, compile_=compile_, threads=threads,
    )  # fmt: skip
    click.echo(summary(done.metrics))
    click.echo(made_of(open_run(done.path).facts, done.metrics))
    click.echo(f"run  {done.path}")
    named = "" if done.path.parent == Path(RUNS_DIR) else f" {done.path}"
    click.echo(f"next: topt-deploy export --format onnx{named}")


def summary(reports: "Mapping[str, TaskReport]") -> str:
    """The table that a run ends with, and what it means for each task."""
    lines = [
        "Held out: each region is predicted by a fold that did not train on it; nothing is selected on these labels.",
        "Expect errors of this size where labels are null. Trees and mean are plain baselines under the same folds.",
        "In sample: how closely the final fit follows its own labels. This does not measure quality.",
        "",
        f"{'':<16}{'':>8}  {'held out':^25}  {'trees':^16}  {'mean':>9}  {'in sample':>9}",
        f"{'task':<16}{'regions':>8}  {'MAE':>9}{'RMSE':>9}{'R²':>7}  {'MAE':>9}{'R²':>7}  {'MAE':>9}  {'R²':>9}",
    ]
    for task, r in reports.items():
        h, trees = r.held_out, r.trees
        lines.append(
            f"{task:<16}{h.regions:>8}  {h.mae:>9.1f}{h.rmse:>9.1f}{decimal(h.r2):>7}"
            f"  {trees.mae:>9.1f}{decimal(trees.r2):>7}  {r.mean.mae:>9.1f}  {decimal(r.in_sample.r2):>9}"
        )
    return "\n".join([*lines, "", *(f"{task}: {verdict(report)}" for task, report in reports.items())])


REGIONS_SHOWN = 8


def made_of(facts: Mapping[str, Any], reports: "Mapping[str, TaskReport]") -> str:
    """Tell the weights and use of every task's parts, how often intervals hold, the figures of each of several cities,
    and regions to doubt."""
    from topt_deploy.intervals import COVERAGE  # numpy: not for a command's help

    lines: list[str] = []
    for task, parts in facts.get("parts", {}).items():
        lines += ["", f"{task}: what its parts weigh, and the held-out MAE without each"]
        mae = reports[task].held_out.mae
        for name, part in parts.items():
            without = part.get("mae_without")
            brings = ""
            if without is not None:
                brings = f"{without:>10.1f}" + ("" if without > mae else "  earns nothing here")
            lines.append(f"  {name:<20}{part['weight']:>6.0%}{brings}")
        if held := facts["coverage"].get(task):
            shares = ", ".join(f"{share:.0%} of {size}" for size, share in held.items())
            lines.append(f"  intervals of {COVERAGE:.0%} hold on {shares} predictions of held-out regions")
    cities = facts.get("cities", [])
    lines += [""] if cities else []
    for city in cities:
        for task, own in city["tasks"].items():
            maes = f"MAE {own['held_out']['mae']:.1f}, boosted trees {own['trees']['mae']:.1f}"
            lines.append(f"{city['city_id']} ({city['regions']} regions), {task}, held out: {maes}")
    far = facts.get("far", [])
    if far:
        more = f" and {len(far) - REGIONS_SHOWN} more" if len(far) > REGIONS_SHOWN else ""
        lines += ["", f"unlike the other regions, do not trust: {', '.join(far[:REGIONS_SHOWN])}{more}"]
    return "\n".join(lines)


def verdict(r: "TaskReport") -> str:
    """One sentence on whether the model earns its keep, by MAE under the same folds."""
    best, name = min((r.trees.mae, "boosted trees"), (r.mean.mae, "predicting the mean"))
    if best == 0:
        return f"no model could be better: {name} is never wrong here; this model's MAE is {r.held_out.mae:.1f}"
    change = 100 * (1 - r.held_out.mae / best)
    if change > 0:
        return f"MAE {change:.0f} % below the better of the run's two plain baselines ({name})"
    return f"the plain baseline wins: {name} is better; this model's MAE is {-change:.0f} % above it"
