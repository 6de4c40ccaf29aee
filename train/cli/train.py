"""``topt-deploy train``."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from topt_deploy.config.load import load_config, presets
from topt_deploy.config.settings import CONFIG_FILE
from topt_deploy.console import decimal
from topt_deploy.errors import NoInput, UsageError
from topt_deploy.run_folder import RUNS_DIR, newest_run, open_run

if TYPE_CHECKING:
    from ..run import TaskReport


@click.command("train")
@click.argument("city", type=click.Path(file_okay=False, path_type=Path), default=".")
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
    city: Path,
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
    and networks that share the prediction with them.

    Regions whose label is null are the ones to predict. At the end, held-out figures say what to expect there.
    """
    regions, mobility = city / "regions.parquet", city / "mobility.parquet"
    if not regions.exists():
        raise NoInput(
            "no city in this folder",
            file=regions,
            expected="a folder with regions.parquet and mobility.parquet",
            fix="topt-deploy sample --out demo/, or topt-deploy import, makes one",
        )
    if resume:
        given = {
            "--preset": preset is not None,
            "--config": file is not None,
            "--task": bool(tasks),
            "--set": bool(overrides),
            "--seed": seed is not None,
        }
        changed = [option for option, there in given.items() if there]
        if changed:
            raise UsageError(
                f"{changed[0]} cannot change with --resume", fix="a run keeps its settings; start a new one"
            )
        run = open_run(out) if out else newest_run(city, finished=False)
        if run.finished:
            raise UsageError("this run is finished", file=run.path, fix="topt-deploy export")
        said: list[str] = []
    else:
        from ..settle import settle

        if file is None and (city / CONFIG_FILE).exists():
            file = city / CONFIG_FILE
        settings = [*overrides, *([f"seed={seed}"] if seed is not None else [])]
        config = load_config(preset=preset, file=file, tasks=tasks, overrides=settings)
        config, said = settle(config, regions, mobility, file=file, overrides=overrides)
        out = out or city / RUNS_DIR / datetime.now().strftime("%Y%m%d-%H%M%S")

    import torch

    from ..loop import Engine
    from ..progress import Reporter
    from ..run import METRICS_FILE, start_run, train_run

    engine = Engine.choose(device, precision, compile_)
    torch.set_num_threads(threads or _threads(regions))
    if not resume:
        assert out is not None
        run = start_run(out, city, config, regions=regions, mobility=mobility if config.mobility else None)
    with Reporter(run.path / METRICS_FILE) as reporter:
        reporter.say(f"run {run.path}: preset {run.config.preset}, tasks {', '.join(run.config.tasks)}")
        for sentence in said:
            reporter.say(sentence)
        try:
            reports = train_run(
                run,
                regions=regions,
                mobility=mobility if run.config.mobility else None,
                engine=engine,
                reporter=reporter,
            )
        except KeyboardInterrupt:
            reporter.say(f"interrupted; go on with: topt-deploy train {city} --resume --out {run.path}")
            raise
    click.echo(summary(reports))
    click.echo(made_of(open_run(run.path).facts, reports))
    click.echo(f"run  {run.path}")
    named = "" if run.path.parent == Path(RUNS_DIR) else f" {run.path}"
    click.echo(f"next: topt-deploy export --format onnx{named}")


def _threads(regions: Path) -> int:
    """One thread for a small city: at a hundred regions the second one costs as much as it brings."""
    import os

    from topt_deploy.data.parquet import ParquetFile

    return 1 if ParquetFile(regions).rows <= 500 else os.cpu_count() or 1


def summary(reports: "dict[str, TaskReport]") -> str:
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
    """Tell the weights and use of every task's parts, how often intervals hold, and regions to doubt."""
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
            lines.append(f"  intervals of 90 % hold on {shares} predictions of held-out regions")
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
