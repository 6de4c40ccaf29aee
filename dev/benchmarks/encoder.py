"""Speed and memory of the prompt encoder, and of exporting one: writes docs/background/encoder-benchmarks.md.

    python dev/benchmarks/encoder.py SMOLLM2_DIR        # of scripts/smollm2.py; half an hour on a quiet machine

Every figure is of a process of its own, on one thread. "Published" is what the research code does: one full pass per
task through the model with its language-model head, all hidden states kept, the last one's mean taken.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from large_n import peak_mb

from topt_deploy.prompts.options import TASKS
from topt_deploy.runtime.processor import processor_name

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "encoder"
PAGE = ROOT / "docs/background/encoder-benchmarks.md"
TOKENS = 2000
REPEATS = 2
SMALL = {  # Qwen2.5-0.5B's proportions
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2,
}  # fmt: skip
LARGE = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 32,
    "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
WAYS = ("published", "torch", "onnxruntime fp32", "onnxruntime int8", "onnxruntime int4", "openvino fp32",
        "openvino int8", "openvino int4")  # fmt: skip


def random_model(like: Path, out: Path, **sizes: Any) -> Path:
    """Save a decoder of random weights in bfloat16, a layer at a time, with the tokenizer of ``like``."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True)
    config = LlamaConfig(**{**json.loads((like / "config.json").read_text()), **sizes, "head_dim": 64})
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    torch.manual_seed(0)
    files: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    index = {}
    for file, tensors in files.items():
        drawn = {
            n: (torch.randn(s) * s[-1] ** -0.5 if len(s) > 1 else torch.ones(s)).bfloat16() for n, s in tensors.items()
        }
        save_file(drawn, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (like / name).exists():
            shutil.copy(like / name, out / name)
    config.save_pretrained(out)
    return out


def long_text(host: Any) -> str:
    """A geo-text of at least :data:`TOKENS` tokens."""
    text = "Included POIs: 1 kind 0 (1.00%)"
    while len(host.prompt(text, (), [""]).sequences[0].ids) < TOKENS:
        text += "".join(f", {7 * k % 90 + 1} kind {k} ({k % 9}.{k % 7}1%)" for k in range(40))
    return text


def measure(way: str, model: Path, bundles: Path) -> dict[str, float]:
    """Processor seconds for one region and three tasks, best of :data:`REPEATS`, and the process's peak memory."""
    import numpy as np

    from topt_deploy.prompts.pooling import pooled
    from topt_deploy.prompts.templates import load_templates

    questions = [load_templates(None).question(task) for task in TASKS]
    if way in ("published", "torch"):
        import torch
        from transformers import AutoModelForCausalLM

        from topt_deploy.prompts.pytorch.checkpoint import open_checkpoint
        from topt_deploy.prompts.pytorch.load import torch_backend

        torch.set_num_threads(1)
        checkpoint = open_checkpoint(str(model))
        host = checkpoint.spec.host(checkpoint.tokenizer)
        prompt = host.prompt(long_text(host), (), questions)
        if way == "torch":
            backend = torch_backend(checkpoint, device="cpu", precision="fp32")
        else:
            whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    else:
        from topt_deploy.runtime.prompt_encoder import open_encoder

        engine, precision = way.split()
        encoder = open_encoder(bundles / f"{model.name}-{precision}.topt", engine=engine, threads=1).encoder
        host, backend = encoder.host, encoder.backend
        prompt = host.prompt(long_text(host), (), questions)

    def published() -> Any:
        vectors = []
        with torch.inference_mode():
            for sequence in prompt.sequences:
                out = whole(torch.tensor(sequence.ids)[None], output_hidden_states=True)
                vectors.append(out.hidden_states[-1][0].mean(dim=0).numpy())
                del out
        return np.stack(vectors)

    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        vectors = published() if way == "published" else pooled(backend, [prompt])[0]
        seconds.append(time.process_time() - began)
    np.save(bundles / f"{model.name}-{way.replace(' ', '-')}.npy", vectors)
    tokens = [len(sequence.ids) for sequence in prompt.sequences]
    peak = peak_mb() * 2**20
    return {"seconds": min(seconds), "peak": peak, "tokens": max(tokens)}


def exported(model: Path, out: Path, precision: str) -> dict[str, float]:
    """Export, as the command does; seconds and peak memory."""
    from topt_deploy.export.prompts.encoder_bundle import make_encoder

    began = time.perf_counter()
    make_encoder(str(model), out, precision=precision, templates=None, max_pixels=None, say=lambda text: None)
    peak = peak_mb() * 2**20
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"seconds": time.perf_counter() - began, "peak": peak, "bytes": size}


def child(*arguments: object) -> dict[str, float]:
    """Run a part of this script in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def export(model: Path, precision: str, *, keep: bool) -> dict[str, float]:
    """The cost of exporting a model, now or, with ``keep``, in an earlier run."""
    out = WORK / f"{model.name}-{precision}.topt"
    told = out.with_suffix(".json")
    if not (keep and told.exists()):
        shutil.rmtree(out, ignore_errors=True)
        told.write_text(json.dumps(child("--export", model, out, precision)))
    return dict(json.loads(told.read_text()))


def table(model: Path, bundles: Path) -> list[str]:
    """Every way of one model."""
    import numpy as np

    found = {way: child("--measure", way, model, bundles) for way in WAYS}
    base, exact = found["published"], np.load(bundles / f"{model.name}-published.npy").astype(float)
    lines = [
        "| | seconds | speed | peak memory | of published | smallest cosine |",
        "|---|---|---|---|---|---|",
    ]
    for way, cell in found.items():
        vectors = np.load(bundles / f"{model.name}-{way.replace(' ', '-')}.npy").astype(float)
        cosine = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(exact, axis=1)
        lines.append(
            f"| {way} | {cell['seconds']:.2f} | {base['seconds'] / cell['seconds']:.1f} | {cell['peak'] / 1e6:,.0f} MB "
            f"| {cell['peak'] / base['peak']:.2f} | {cosine.min():.5f} |"
        )
    return [f"{int(base['tokens'])} tokens in the longest of three tasks.", "", *lines]


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("smollm2", type=Path, nargs="?", help="folder of SmolLM2-135M-Instruct as safetensors")
    parser.add_argument("--keep", action="store_true", help="measure what an earlier run has exported")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--export", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, model, bundles = arguments.measure
        print(json.dumps(measure(way, Path(model), Path(bundles))))
        return
    if arguments.export:
        model, out, precision = arguments.export
        print(json.dumps(exported(Path(model), Path(out), precision)))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    small = random_model(arguments.smollm2, WORK / "random-0.4B", **SMALL)
    large = random_model(arguments.smollm2, WORK / "random-1.5B", **LARGE)
    lines = [
        "# The prompt encoder's speed and memory",
        "",
        f"Made by `dev/benchmarks/encoder.py` on {date.today()}: {processor_name()}, one thread, one process per "
        f"figure, processor seconds, best of {REPEATS} runs. One region has a text of {TOKENS:,} tokens "
        "and three tasks.",
        "",
        "- *published*: three full passes of transformers in float32, with logits and all hidden states.",
        "- *torch*: ours in PyTorch. What the tasks have in common is read once, and there are no logits.",
        "- *openvino* computes in bfloat16 if the processor has it, except with fp32. On processors without VNNI it "
        "unpacks 8-bit weights and multiplies in float32.",
        "- Peak memory counts pages of mapped files, for every way. OpenVINO makes a rearranged copy of the weights in "
        "its first run; the pages of the original are given back after that.",
        "",
    ]
    for model in (arguments.smollm2, small):
        costs = []
        for precision in ("fp32", "int8", "int4"):
            cost = export(model, precision, keep=arguments.keep)
            costs.append(f"{precision} {cost['seconds']:.0f} s, {cost['bytes'] / 1e6:,.0f} MB on disk")
        lines += [f"## {model.name}", "", *table(model, WORK), "", f"Exported: {'; '.join(costs)}.", ""]
    cost = export(large, "int8", keep=arguments.keep)
    numbers = sum(file.stat().st_size for file in large.glob("*.safetensors")) / 2
    lines += [
        f"## Exporting {large.name}",
        "",
        f"{numbers / 1e9:.2f} billion weights, {4 * numbers / 1e9:.2f} GB in float32. `topt-deploy export "
        f"--encoder-only --encoder-precision int8`: {cost['seconds']:.0f} s, peak memory {cost['peak'] / 1e9:.2f} GB, "
        f"{cost['peak'] / (4 * numbers):.2f} of that; {cost['bytes'] / 1e9:.2f} GB on disk. "
        "The parity gate is included.",
        "",
    ]
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
