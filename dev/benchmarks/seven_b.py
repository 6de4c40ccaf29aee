"""Qwen2.5-VL at its published 7 B size, with random weights, exported and served: writes docs/background/seven-b.md.

    python dev/benchmarks/seven_b.py DIR              # 31 GB below DIR; goes on where it was stopped
    python dev/benchmarks/seven_b.py DIR --toy        # the script itself on a model of two layers, in minutes; no page

Every step is one of the project's commands in a process of its own, on one thread. A command that leaves the machine
less than 3 GB of memory is ended.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from topt_deploy.runtime.processor import processor_name

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/background/seven-b.md"
TEXT = {
    "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 128_000,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}  # fmt: skip
VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
"""Both as in config.json of Qwen2.5-VL-7B-Instruct."""
TOY: tuple[dict[str, Any], dict[str, Any]] = (
    {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2},
    {"depth": 2, "hidden_size": 160, "intermediate_size": 320, "num_heads": 2, "out_hidden_size": 512,
     "fullatt_block_indexes": [1]},
)  # fmt: skip
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16_384}
IMAGE_EDGE = 448
PRECISIONS = ("int8", "int4")
ENGINES = ("onnxruntime", "openvino")
LEAST_AVAILABLE_KB = 3 * 2**20
EVERY_S = 0.2
RUN_WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    "from topt_deploy.runtime.cli import main; main()"
)
"""``topt-run``, where importing either is an error."""


def make_checkpoint(out: Path, *, toy: bool) -> None:
    """Save a model of random weights in bfloat16, a layer at a time, in the form of the published one."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from topt_deploy.export.prompts.families.qwen2_5_vl import canonical

    sys.path.append(str(ROOT / "tests" / "support"))
    from encoders_qwen import CLIP

    out.mkdir(parents=True)
    text, vision = ({**of, **(small if toy else {})} for of, small in zip((TEXT, VISION), TOY, strict=True))
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **_save_tokenizer(out, text)
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        stored = canonical(name)
        prefix, layers, rest = stored.partition(".layers." if ".layers." in stored else ".blocks.")
        layer = f"{prefix}-{rest.split('.')[0]}" if layers else stored.removesuffix(".weight")
        files.setdefault(f"{layer}.safetensors", {})[stored] = parameter.shape
    torch.manual_seed(0)
    index = {}
    for file, shapes in files.items():
        save_file({n: _drawn(n, s) for n, s in shapes.items()}, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    kind = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    (out / "preprocessor_config.json").write_text(json.dumps(PIXELS | CLIP | kind | sizes))
    config.save_pretrained(out)  # last: with it the folder is a model


def _drawn(name: str, shape: Sequence[int]) -> Any:
    """A parameter: matrices keep the size of what they are applied to, norms do nothing."""
    import torch

    if name.endswith(".bias"):
        return torch.randn(shape).mul_(0.1).bfloat16()
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape).mul_((torch.Size(shape).numel() / shape[0]) ** -0.5).bfloat16()


def _save_tokenizer(out: Path, text: dict[str, Any]) -> dict[str, int]:
    """A tokenizer of the family, trained on the shipped templates; the configuration's ids of its control tokens."""
    from importlib import resources

    from encoders_qwen import CHAT_TEMPLATE, CONTROL
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    shipped = (resources.files("topt_deploy.prompts") / "templates.toml").read_text(encoding="utf-8")
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(shipped.splitlines(), vocab_size=4000)
    added = [AddedToken(token, special=True) for token in CONTROL[1:]]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    return {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
    }  # fmt: skip


def make_region(folder: Path) -> None:
    """A city of one region with counts of places, for its geo-text, and two images."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:IMAGE_EDGE, :IMAGE_EDGE] / 30.0
    for number in range(2):
        waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-2, 2, size=(3, 3))]
        Image.fromarray((127.5 + 127 * np.stack(waves, -1)).astype(np.uint8)).save(folder / f"{number}.png")
    places = {f"poi_{kind}": [1 + 7 * i % 60] for i, kind in enumerate(("food", "retail", "school", "park", "hotel"))}
    images = pa.array([["0.png", "1.png"]], pa.list_(pa.string()))
    table = {"region_id": ["R1"], "lon": [-30.0], "lat": [40.0], **places, "images": images}
    pq.write_table(pa.table(table), folder / "regions.parquet")


def watched(*command: object) -> dict[str, float]:
    """Run a command on one thread: wall and processor seconds, and peak memory in all and without mapped files.

    The former is the system's own figure, of which pages of mapped files are a part; the latter is looked at five
    times a second.
    """
    print("$", *command, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], env=environment)
    whole = anonymous = 0
    while process.poll() is None:
        held = _numbers(Path(f"/proc/{process.pid}/status"))
        whole, anonymous = max(whole, held.get("VmHWM", 0)), max(anonymous, held.get("RssAnon", 0))
        if _numbers(Path("/proc/meminfo"))["MemAvailable"] < LEAST_AVAILABLE_KB:
            process.send_signal(signal.SIGKILL)
        time.sleep(EVERY_S)
    if process.returncode:
        raise SystemExit(f"ended with {process.returncode}; held {whole / 1e6:.2f} GB, {anonymous / 1e6:.2f} anonymous")
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "processor_s": seconds, "peak": whole * 1024, "anonymous": anonymous * 1024}


def _numbers(file: Path) -> dict[str, int]:
    """The lines of a file of Linux that have a number in kB."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def export(model: Path, precision: str) -> dict[str, float]:
    """Export the model's encoder."""
    bundle = _bundle(model, precision)
    shutil.rmtree(bundle, ignore_errors=True)
    command = Path(sys.executable).parent / "topt-deploy"
    found = watched(
        command, "export", "--encoder-only", "--prompt-encoder", model, "--encoder-precision", precision,
        "--encoder-bundle", bundle,
    )  # fmt: skip
    return found | {"bytes": _size(bundle)}


def encode(model: Path, precision: str, engine: str) -> dict[str, float]:
    """Encode the region with an exported encoder, without PyTorch."""
    city = model.parent / "city"
    make_region(city)
    return watched(
        sys.executable, "-c", RUN_WITHOUT_TORCH, "encode", city / "regions.parquet", "--no-cache",
        "--bundle", _bundle(model, precision), "--encoder-engine", engine, "--threads", 1,
        "--out", city / f"{precision}-{engine}.parquet",
    )  # fmt: skip


def _bundle(model: Path, precision: str) -> Path:
    return model.with_name(f"{model.name}-{precision}.topt")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def tokens(bundle: Path, city: Path) -> tuple[int, int]:
    """Tokens of the region's longest prompt, and how many of them are its images'."""
    import numpy as np
    from PIL import Image

    from topt_deploy.bundle.encoder_manifest import TOKENIZER, open_encoder_bundle
    from topt_deploy.prompts.table import read_regions

    opened = open_encoder_bundle(bundle)
    region = read_regions(city / "regions.parquet", opened.templates.wording)
    images = [np.asarray(Image.open(city / name)) for name in region.images[0]]
    questions = list(opened.templates.questions.values())
    prompt = opened.spec.host(opened.read(TOKENIZER)).prompt(region.texts[0], images, questions)
    longest = max((sequence.ids for sequence in prompt.sequences), key=len)
    return len(longest), int((longest == prompt.image_token).sum())


def parity(bundle: Path) -> tuple[dict[str, float], int]:
    """The smallest cosine that the gate measured, by engine, and how many maps are kept in a higher precision."""
    from topt_deploy.bundle.encoder_manifest import open_encoder_bundle

    manifest = open_encoder_bundle(bundle).manifest
    smallest = {e: min(one["cosine"] for one in manifest.parity if one["engine"] == e) for e in ENGINES}
    return smallest, len(manifest.kept)


def page(model: Path, found: dict[str, dict[str, float]]) -> str:
    """The page's text."""
    files = list(model.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    city = model.parent / "city"
    whole, of_images = tokens(_bundle(model, PRECISIONS[0]), city)
    made, exports, encodes = found["checkpoint"], [], []
    for precision in PRECISIONS:
        cosine, kept = parity(_bundle(model, precision))
        one = found[f"export {precision}"]
        exports.append(
            f"| {precision} | {_cost(one)} | {one['bytes'] / 1e9:.2f} GB | {kept} | {cosine[ENGINES[0]]:.4f} "
            f"| {cosine[ENGINES[1]]:.4f} |"
        )
        encodes += [f"| {precision} | {e} | {_cost(found[f'encode {precision} {e}'])} |" for e in ENGINES]
    return f"""# A model of 7 billion weights

Made by `make seven-b` on {date.today()}: {processor_name()}, one thread, one process per figure, on a machine that
is shared with other work. So processor seconds say more than seconds. The model has the published configuration
of Qwen2.5-VL-7B-Instruct with random weights: {size / 2e9:.2f} billion in bfloat16, {size / 1e9:.1f} GB in {len(files)}
files, one per layer, written in {made["processor_s"]:,.0f} processor seconds. Random weights take the time and memory
of trained ones. What they say about accuracy is that the graphs compute what PyTorch does, and no more.

Peak memory is the most that the process held in memory, with pages of mapped files, which the system takes back when
it needs them. "Without files" is the largest amount of the rest, looked at five times a second.

## Export

`topt-deploy export --encoder-only --encoder-precision …`, with the parity gate on ONNX Runtime and on OpenVINO.

Maps kept are linear maps that stay in the next higher precision. The cosines are the gate's smallest.

| | seconds | processor seconds | peak memory | without files | bundle | maps kept | ONNX Runtime | OpenVINO |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(exports)}

## Encode one region

`topt-run encode`, in a process in which importing PyTorch or transformers is an error: a region with two images of
{IMAGE_EDGE} × {IMAGE_EDGE} pixels and a text made from its counts, three tasks, {whole:,} tokens in the longest of
them, of which {of_images:,} are the images'. Opening the bundle is included.

| | engine | seconds | processor seconds | peak memory | without files |
|---|---|---|---|---|---|
{chr(10).join(encodes)}
"""


def _cost(one: dict[str, float]) -> str:
    """The cells of a process."""
    seconds, memory = (one["wall_s"], one["processor_s"]), (one["peak"], one["anonymous"])
    return " | ".join([f"{value:,.0f}" for value in seconds] + [f"{value / 1e9:.2f} GB" for value in memory])


def main() -> None:
    """Measure what has not been measured, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder for the model and the bundles")
    parser.add_argument("--toy", action="store_true", help="a model of two layers; no page")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model: Path = arguments.folder.resolve() / ("qwen2.5-vl-toy" if arguments.toy else "qwen2.5-vl-7b-random")
    if arguments.make:
        make_checkpoint(model, toy=arguments.toy)
        return
    model.parent.mkdir(parents=True, exist_ok=True)
    file = model.with_name(f"{model.name}.json")
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    steps = {"checkpoint": lambda: watched(sys.executable, *sys.argv, "--make")}
    for precision in PRECISIONS:
        steps[f"export {precision}"] = lambda precision=precision: export(model, precision)
        for engine in ENGINES:
            steps[f"encode {precision} {engine}"] = lambda p=precision, e=engine: encode(model, p, e)
    for name, step in steps.items():
        if name not in found:
            found[name] = step()
            file.write_text(json.dumps(found, indent=1))
        print(name, found[name], flush=True)
    if not arguments.toy:
        PAGE.write_text(page(model, found))


if __name__ == "__main__":
    main()
